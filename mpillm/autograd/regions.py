"""The conjugate pairs: six movements of a tensor between placements, each the other's adjoint.

A tensor has a placement on an axis: ``replicated`` (equal on all ranks; counts once in an inner product),
``sharded(dim)`` (each rank has its block), ``partial`` (a sum over ranks is pending) or ``varying`` (each rank uses its
own). With that inner product (:func:`mpillm.autograd.adjoint.inner_product`) the backward of each is its exact adjoint.

====================  ==============  ======================  ==============
function              forward         placement               backward
====================  ==============  ======================  ==============
copy_to               identity        replicated → varying    allreduce
reduce_from           allreduce       partial → replicated    identity
scatter_to            slice           replicated → sharded    allgather
gather_from           allgather       sharded → replicated    slice
allgather_to          allgather       sharded → varying       reduce_scatter
reduce_scatter_from   reduce_scatter  partial → sharded       allgather
====================  ==============  ======================  ==============

Every rank runs forward and backward, in the same order. All work on CPU and CUDA tensors, under ``torch.no_grad`` and
recompute, and accumulate like any operation. Where ranks share memory nothing is sent.
"""

from mpillm.autograd.node import Node
from mpillm.comm import collectives
from mpillm.comm.group import as_group
from mpillm.errors import ShapeError
from mpillm.schedules.blocks import bounds, counts


def copy_to(x, comm):
    """Use a replicated tensor on every rank: identity; the gradients of all ranks are summed on the way back.

    Collective over ``comm``: equal shapes and dtypes. Only backward sends something.

    Parameters
    ----------
    x : Tensor, any shape, replicated
    comm : Comm or Group
        ``p`` ranks.

    Returns
    -------
    Tensor, same shape, varying

    Notes
    -----
    Backward sends ``2 (p-1)/p n`` bytes a rank, with ``n`` those of ``x``.
    """
    return _Movement.apply(x, as_group(comm), _identity, _allreduce)


def reduce_from(x, comm):
    """Sum a partial tensor over the ranks of ``comm``; the gradient passes unchanged.

    Collective over ``comm``: equal shapes and dtypes. Only forward sends something.

    Parameters
    ----------
    x : Tensor, any shape, partial
    comm : Comm or Group
        ``p`` ranks.

    Returns
    -------
    Tensor, same shape, replicated

    Notes
    -----
    Forward sends ``2 (p-1)/p n`` bytes a rank, with ``n`` those of ``x``.
    """
    return _Movement.apply(x, as_group(comm), _allreduce, _identity)


def scatter_to(x, comm, dim=0):
    """Keep this rank's block of ``dim`` of a replicated tensor; gradient blocks are gathered on the way back.

    Collective over ``comm``: equal shapes and dtypes. Only backward sends something.

    Parameters
    ----------
    x : Tensor, shape (..., n, ...), replicated
    comm : Comm or Group
        ``p`` ranks.
    dim : int

    Returns
    -------
    Tensor, shape (..., n_i, ...), sharded(dim)
        ``n_i`` is the size of this rank's block.

    Notes
    -----
    Backward sends ``(p-1)/p n`` bytes a rank, with ``n`` those of ``x``.
    """
    whole = x.shape[collectives.check_dim("scatter_to", x, dim)]
    return _Movement.apply(x, as_group(comm), _slice(dim), _allgather(dim, whole))


def gather_from(x, comm, dim=0, size=None):
    """Join the blocks of ``dim`` into a replicated tensor; each keeps its block of the gradient on the way back.

    Collective over ``comm``: equal dtypes, and equal shapes but for ``dim``. Only forward sends something.

    Parameters
    ----------
    x : Tensor, shape (..., n_i, ...), sharded(dim)
    comm : Comm or Group
        ``p`` ranks.
    dim : int
    size : int, optional
        The whole size of ``dim``; without it the ranks exchange their sizes first.

    Returns
    -------
    Tensor, shape (..., n, ...), replicated

    Notes
    -----
    Forward sends ``(p-1)/p n`` bytes a rank, with ``n`` those of the whole.
    """
    group = as_group(comm)
    whole = _whole_size(x, group, dim, size)
    return _Movement.apply(x, group, _allgather(dim, whole), _slice(dim))


def allgather_to(x, comm, dim=0, size=None):
    """Join the blocks of ``dim`` for each rank's own use; the gradients are summed and scattered on the way back.

    Collective over ``comm``, as is backward: equal dtypes, and equal shapes but for ``dim``.

    Parameters
    ----------
    x : Tensor, shape (..., n_i, ...), sharded(dim)
    comm : Comm or Group
        ``p`` ranks.
    dim : int
    size : int, optional
        The whole size of ``dim``; without it the ranks exchange their sizes first.

    Returns
    -------
    Tensor, shape (..., n, ...), varying

    Notes
    -----
    Sends ``(p-1)/p n`` bytes a rank each way, with ``n`` those of the whole.
    """
    group = as_group(comm)
    whole = _whole_size(x, group, dim, size)
    return _Movement.apply(x, group, _allgather(dim, whole), _reduce_scatter(dim))


def reduce_scatter_from(x, comm, dim=0):
    """Sum a partial tensor and keep this rank's block of ``dim``; gradient blocks are gathered on the way back.

    Collective over ``comm``, as is backward: equal shapes and dtypes.

    Parameters
    ----------
    x : Tensor, shape (..., n, ...), partial
    comm : Comm or Group
        ``p`` ranks.
    dim : int

    Returns
    -------
    Tensor, shape (..., n_i, ...), sharded(dim)
        ``n_i`` is the size of this rank's block.

    Notes
    -----
    Sends ``(p-1)/p n`` bytes a rank each way, with ``n`` those of ``x``.
    """
    whole = x.shape[collectives.check_dim("reduce_scatter_from", x, dim)]
    return _Movement.apply(x, as_group(comm), _reduce_scatter(dim), _allgather(dim, whole))


class _Movement(Node):
    """A linear movement and its adjoint, each a function of ``(tensor, group)``."""

    @staticmethod
    def forward(ctx, x, group, move, adjoint):
        ctx.group, ctx.adjoint = group, adjoint
        return move(x, group) if group.size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (ctx.adjoint(grad, ctx.group) if ctx.group.size > 1 else grad), None, None, None


def _identity(x, group):
    return x.view_as(x)


def _allreduce(x, group):
    return collectives.allreduce(x, group)


def _slice(dim):
    def move(x, group):
        start, stop = bounds(x.shape[dim], group.size, group.rank)
        return x.narrow(dim, start, stop - start).contiguous()

    return move


def _allgather(dim, size):
    return lambda x, group: collectives.allgather(x, group, dim, size)


def _reduce_scatter(dim):
    return lambda x, group: collectives.reduce_scatter(x, group, dim)


def _whole_size(x, group, dim, size):
    """Return the whole size of ``dim``, asking the other ranks where it was not given; blocks that are not those of
    scatter are refused on all of them."""
    collectives.check_dim("allgather", x, dim)
    if size is not None:
        return size
    lengths = group.comm.allgather(x.shape[dim])
    wanted = counts(sum(lengths), group.size)
    if lengths != wanted:
        raise ShapeError(
            f"allgather: dim {dim} of the ranks' blocks has {lengths} items, the blocks of {sum(lengths)} over "
            f"{group.size} ranks are {wanted}: pass the blocks that scatter gives"
        )
    return sum(lengths)

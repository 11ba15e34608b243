"""Collective operations on tensors over any communicator.

Every function takes an mpi4py communicator or a :class:`~mpillm.comm.group.Group`, any contiguous or strided CPU or
CUDA tensor (CUDA is staged through pinned host memory), of float64, float32, bfloat16, float16 or an integer type, and
returns a new tensor; inputs are never changed. Half types travel as two bytes and are summed in float32, rounded once.
Blocks of a dimension are those of :mod:`mpillm.schedules.blocks`: sizes need not divide, and may be zero.
"""

import os

import torch

from mpillm.comm.buffers import HALF_TYPES, as_array, as_bytes, host_empty, staged, unstaged
from mpillm.comm.group import Group, as_group
from mpillm.errors import ShapeError
from mpillm.schedules.blocks import bounds, counts
from mpillm.schedules.tree import tree_sum


def allreduce(x, comm, op="sum"):
    """Combine ``x`` over all ranks; every rank gets the result.

    Collective over ``comm``: equal shapes and dtypes.

    Parameters
    ----------
    x : Tensor, any shape, partial
    comm : Comm or Group
    op : {"sum", "max"}

    Returns
    -------
    Tensor, same shape, replicated

    Notes
    -----
    Backward as a linear operator: see :mod:`mpillm.autograd.regions`. Sends ``2 (p-1)/p n`` bytes a rank. The sum has
    the order of the group: the MPI library's, or the fixed tree; half types and the tree exchange blocks directly and
    add them where they arrive.
    """
    return iallreduce(x, comm, op).wait()


def iallreduce(x, comm, op="sum"):
    """Start :func:`allreduce`; return a :class:`Pending` whose ``wait()`` gives its result."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    n_bytes = x.numel() * x.element_size()
    group.record("allreduce", 2 * (n_bytes - n_bytes // group.size))
    source = staged(x)
    if op == "sum" and _is_direct(x, group):
        flat = source.reshape(-1)
        block = _direct_reduce(flat, counts(flat.numel(), group.size), group)
        whole = _gather_blocks(block, counts(flat.numel(), group.size), group)
        return Pending(unstaged(whole.view(x.shape), x))
    if x.dtype in HALF_TYPES:  # a maximum in float32 is exact
        unrecorded = Group(group.comm, group.name)
        return Pending(allreduce(x.float(), unrecorded, op).to(x.dtype))
    out = host_empty(x.shape, x)
    request = group.comm.Iallreduce(as_array(source), as_array(out), _mpi_op(op))
    return Pending(out, request, (source,), lambda: unstaged(out, x))


def reduce_scatter(x, comm, dim=0):
    """Sum ``x`` over the ranks and leave each rank its block of ``dim``.

    Collective over ``comm``: equal shapes and dtypes.

    Parameters
    ----------
    x : Tensor, shape (..., n, ...), partial
    comm : Comm or Group
    dim : int

    Returns
    -------
    Tensor, shape (..., n_i, ...), sharded(dim)
        ``n_i`` is the size of this rank's block.

    Notes
    -----
    Sends ``n`` less the own block. Order of sums: as in :func:`allreduce`.
    """
    return ireduce_scatter(x, comm, dim).wait()


def ireduce_scatter(x, comm, dim=0):
    """Start :func:`reduce_scatter`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    rows = staged(x.movedim(dim, 0))
    width = rows[0].numel() if rows.shape[0] else 0
    sizes = [rows_i * width for rows_i in counts(rows.shape[0], group.size)]
    group.record("reduce_scatter", (rows.numel() - sizes[group.rank]) * x.element_size())
    low, high = bounds(rows.shape[0], group.size, group.rank)
    shape = (high - low, *rows.shape[1:])
    if _is_direct(x, group):
        block = _direct_reduce(rows.reshape(-1), sizes, group).view(shape)
        return Pending(unstaged(block, x).movedim(0, dim))
    out = host_empty(shape, x)
    request = group.comm.Ireduce_scatter(as_array(rows), as_array(out), sizes, _mpi_op("sum"))
    return Pending(out, request, (rows,), lambda: unstaged(out, x).movedim(0, dim))


def allgather(x, comm, dim=0, size=None):
    """Join the blocks of all ranks along ``dim``; every rank gets the whole.

    Collective over ``comm``: equal dtypes, and equal shapes but for ``dim``.

    Parameters
    ----------
    x : Tensor, shape (..., n_i, ...), sharded(dim)
    comm : Comm or Group
    dim : int
    size : int, optional
        The whole size of ``dim`` where the blocks are those of :mod:`mpillm.schedules.blocks`; without it the ranks
        tell each other their sizes first, and any sizes will do.

    Returns
    -------
    Tensor, shape (..., n, ...), replicated

    Raises
    ------
    ShapeError
        On this rank, before any message, if ``size`` was given and ``x`` is not this rank's block of it.

    Notes
    -----
    Sends the own block ``p-1`` times.
    """
    return iallgather(x, comm, dim, size).wait()


def iallgather(x, comm, dim=0, size=None):
    """Start :func:`allgather`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    if size is None:
        lengths = group.comm.allgather(x.shape[dim])
    else:
        lengths = counts(size, group.size)
        if x.shape[dim] != lengths[group.rank]:
            raise ShapeError(
                f"allgather: dim {dim} of the block of rank {group.rank} has {x.shape[dim]} items, its share of "
                f"size={size} over {group.size} ranks is {lengths[group.rank]}: pass the block that scatter gives"
            )
    rows = staged(x.movedim(dim, 0))
    group.record("allgather", (group.size - 1) * rows.numel() * x.element_size())
    out = host_empty((sum(lengths), *rows.shape[1:]), x)
    width = out[0].numel() * x.element_size() if out.shape[0] else 0
    request = group.comm.Iallgatherv(as_bytes(rows), [as_bytes(out), [n * width for n in lengths]])
    return Pending(out, request, (rows,), lambda: unstaged(out, x).movedim(0, dim))


def reduce_scatter_blocks(x, comm):
    """Sum flat ``x`` over the ranks where it lies; return this rank's block of the sum, a view of ``x``'s beginning.

    Collective over ``comm``: equal shapes and dtypes. Destroys ``x``: for buffers too large to have twice.
    """
    group = as_group(comm)
    if group.size == 1:
        return x
    sizes = counts(len(x), group.size)
    own = x[:sizes[group.rank]]
    if x.is_cuda or _is_direct(x, group):
        return own.copy_(reduce_scatter(x, group))
    group.record("reduce_scatter", (len(x) - len(own)) * x.element_size())
    finish(group.comm.Ireduce_scatter(_in_place(), as_array(x), sizes, _mpi_op("sum")))
    return own


def allgather_blocks(x, comm):
    """Fill flat ``x`` where it lies: every rank gives its own block and gets all others.

    Collective over ``comm``: equal shapes and dtypes.
    """
    group = as_group(comm)
    if group.size == 1:
        return
    own = counts(len(x), group.size)
    group.record("allgather", (group.size - 1) * own[group.rank] * x.element_size())
    host = staged(x)
    lengths = [n * x.element_size() for n in own]
    finish(group.comm.Iallgatherv(_in_place(), [as_bytes(host), lengths]))
    if x.is_cuda:
        x.copy_(host)


def bcast(x, comm, root=0):
    """Give every rank the ``x`` of ``root``.

    Collective over ``comm``: equal shapes and dtypes on all ranks; only the root's values count.

    Returns
    -------
    Tensor, same shape, replicated
    """
    return ibcast(x, comm, root).wait()


def ibcast(x, comm, root=0):
    """Start :func:`bcast`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    out = staged(x).clone()
    group.record("bcast", x.numel() * x.element_size() if group.rank == root else 0)
    return Pending(out, group.comm.Ibcast(as_bytes(out), root), (), lambda: unstaged(out, x))


def alltoall(x, comm, dim=0):
    """Send block ``j`` of ``dim`` to rank ``j``; receive this rank's block of every rank, in rank order.

    Collective over ``comm``: equal dtypes, equal shapes.

    Parameters
    ----------
    x : Tensor, shape (..., n, ...), varying

    Returns
    -------
    Tensor, shape (..., p * n_i, ...), varying
        ``n_i`` the size of this rank's block of ``n``.
    """
    return ialltoall(x, comm, dim).wait()


def ialltoall(x, comm, dim=0):
    """Start :func:`alltoall`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    rows = staged(x.movedim(dim, 0))
    mine = counts(rows.shape[0], group.size)[group.rank]
    out = host_empty((group.size * mine, *rows.shape[1:]), x)
    width = rows[0].numel() * x.element_size() if rows.shape[0] else 0
    send = [n * width for n in counts(rows.shape[0], group.size)]
    group.record("alltoall", sum(send) - send[group.rank])
    request = group.comm.Ialltoallv([as_bytes(rows), send], [as_bytes(out), [mine * width] * group.size])
    return Pending(out, request, (rows,), lambda: unstaged(out, x).movedim(0, dim))


def scatter(x, comm, dim=0, root=0):
    """Give each rank its block of ``dim`` of the root's ``x``.

    Collective over ``comm``: ``x`` has the same shape and dtype on all ranks; only the root's values count.

    Returns
    -------
    Tensor, shape (..., n_i, ...), sharded(dim)
    """
    return iscatter(x, comm, dim, root).wait()


def iscatter(x, comm, dim=0, root=0):
    """Start :func:`scatter`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    rows = staged(x.movedim(dim, 0))
    low, high = bounds(rows.shape[0], group.size, group.rank)
    out = host_empty((high - low, *rows.shape[1:]), x)
    width = rows[0].numel() * x.element_size() if rows.shape[0] else 0
    send = [n * width for n in counts(rows.shape[0], group.size)]
    group.record("scatter", sum(send) - send[root] if group.rank == root else 0)
    sending = [as_bytes(rows), send] if group.rank == root else None
    return Pending(out, group.comm.Iscatterv(sending, as_bytes(out), root), (rows,),
                   lambda: unstaged(out, x).movedim(0, dim))


def gather(x, comm, dim=0, root=0):
    """Join the blocks of all ranks along ``dim`` on ``root``.

    Collective over ``comm``: equal dtypes, and equal shapes but for ``dim``.

    Returns
    -------
    Tensor, shape (..., n, ...) on the root; shape (..., 0, ...) elsewhere
    """
    return igather(x, comm, dim, root).wait()


def igather(x, comm, dim=0, root=0):
    """Start :func:`gather`; the ranks tell each other their sizes first."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    lengths = group.comm.allgather(x.shape[dim])
    rows = staged(x.movedim(dim, 0))
    here = group.rank == root
    out = host_empty((sum(lengths) if here else 0, *rows.shape[1:]), x)
    width = out[0].numel() * x.element_size() if out.shape[0] else 0
    group.record("gather", 0 if here else rows.numel() * x.element_size())
    receiving = [as_bytes(out), [n * width for n in lengths]] if here else None
    return Pending(out, group.comm.Igatherv(as_bytes(rows), receiving, root), (rows,),
                   lambda: unstaged(out, x).movedim(0, dim))


class Pending:
    """A started operation. ``wait()`` finishes it and returns its tensor; ``test()`` lets it progress."""

    def __init__(self, result, request=None, keep=(), finish=None):
        self._result, self._request, self._keep, self._finish = result, request, keep, finish

    def test(self):
        """Let MPI work; tell whether the operation has finished."""
        return self._request is None or self._request.Test()

    def wait(self):
        """Block until finished and return the result."""
        if self._request is not None:
            finish(self._request)
            self._request = None
        self._keep = ()
        return self._result if self._finish is None else self._finish()


def finish(request):
    """Wait for an MPI request, leaving the core to others meanwhile: ranks may outnumber cores."""
    while not request.Test():
        os.sched_yield()


def add_tree(parts):
    """Add tensors along the fixed tree; half types in float32, rounded once at the end."""
    if parts[0].dtype in HALF_TYPES:
        return tree_sum([part.float() for part in parts], torch.add).to(parts[0].dtype)
    return tree_sum(parts, torch.add)


def _is_direct(x, group):
    """Tell whether a sum must be done here rather than by the MPI library."""
    return group.order == "tree" or x.dtype in HALF_TYPES


def _direct_reduce(flat, sizes, group):
    """Exchange blocks directly and add the ``p`` contributions to the own block in rank order, along the tree."""
    mine, item = sizes[group.rank], flat.element_size()
    received = torch.empty(group.size * mine, dtype=flat.dtype)
    send = [n * item for n in sizes]
    finish(group.comm.Ialltoallv([as_bytes(flat), send], [as_bytes(received), [mine * item] * group.size]))
    return add_tree(list(received.view(group.size, mine)))


def _gather_blocks(block, sizes, group):
    whole = torch.empty(sum(sizes), dtype=block.dtype)
    item = block.element_size()
    finish(group.comm.Iallgatherv(as_bytes(block), [as_bytes(whole), [n * item for n in sizes]]))
    return whole


def _in_place():
    from mpi4py import MPI

    return MPI.IN_PLACE


def _mpi_op(op):
    from mpi4py import MPI

    return {"sum": MPI.SUM, "max": MPI.MAX}[op]

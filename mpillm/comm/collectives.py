"""Collective operations on tensors over any communicator.

Every function takes an mpi4py communicator or a :class:`~mpillm.comm.group.Group`, any contiguous or strided CPU or
CUDA tensor (CUDA is staged through pinned host memory), of float64, float32, bfloat16, float16 or a signed integer
type, and returns a new tensor; inputs are never changed. Half types travel as two bytes and are summed in float32,
rounded once. Blocks of a dimension are those of :mod:`mpillm.schedules.blocks`: any sizes, zero too.

Here tensors become flat host memory and back; what carries them, a :class:`~mpillm.comm.transport.Transport`, the group's
decision table says: the MPI library (:mod:`mpillm.comm.library`), memory that the ranks share
(:mod:`mpillm.comm.shared`) or a schedule (:mod:`mpillm.comm.executor`).
"""

import time
from functools import wraps

import torch

from mpillm.comm.buffers import even_blocks, flat, host_empty, moved, row_blocks, staged, unstaged
from mpillm.comm.group import as_group
from mpillm.comm.progress import finish
from mpillm.comm.transport import DONE
from mpillm.errors import ShapeError
from mpillm.schedules.blocks import all_bounds, bounds, counts


def _timed(operation):
    """Let the group's recorder know how long a blocking operation keeps this rank."""

    @wraps(operation)
    def timed(x, comm, *arguments, **options):
        group, start = as_group(comm), time.perf_counter()
        result = operation(x, group, *arguments, **options)
        group.recorder.collective_s += time.perf_counter() - start
        return result

    return timed


@_timed
def allreduce(x, comm, op="sum", out=None):
    """Combine ``x`` over all ranks; every rank gets the result.

    Collective over ``comm``: equal shapes and dtypes.

    Parameters
    ----------
    x : Tensor, any shape, partial
    comm : Comm or Group
    op : {"sum", "max"}
    out : Tensor, optional
        Contiguous, like ``x``: where the result goes; may be ``x``.

    Returns
    -------
    Tensor, same shape, replicated

    Raises
    ------
    ShapeError
        On this rank, before any message, if ``out`` is not so.

    Notes
    -----
    Backward as a linear operator: see :mod:`mpillm.autograd.regions`. Sends ``2 (p-1)/p n`` bytes a rank, or nothing
    where memory is shared; what lies in a window (:meth:`mpillm.comm.shared.Node.empty`) is combined there. The order
    of sums is that of the algorithm, or with a group of order ``"tree"`` the fixed tree.
    """
    return iallreduce(x, comm, op, out, may_block=True).wait()


def iallreduce(x, comm, op="sum", out=None, may_block=False):
    """Start :func:`allreduce`; return a :class:`Pending` whose ``wait()`` gives its result.

    ``may_block`` lets it take an algorithm that makes no progress by itself, such as shared memory; so in all others.
    """
    group = as_group(comm)
    if out is not None and not (out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()):
        raise ShapeError(f"allreduce: out is {_described(out)}, x is {_described(x)}: pass a contiguous tensor like x")
    if group.size == 1:
        return Pending(x.detach().clone() if out is None else out.copy_(x.detach()))
    n_bytes = x.nbytes
    group.enter("allreduce", sent_bytes("allreduce", group.size, n_bytes), x, op=op)
    source = staged(x)
    host = torch.empty_like(source, pin_memory=x.is_cuda) if out is None or out.is_cuda else out
    start = flat(source)
    result = start if host is source else flat(host)
    transport = group.transport("allreduce", x.dtype, n_bytes, may_block, group.holds(host))
    request = transport.allreduce(start, result, op)
    return Pending(host, request, (source,),
                   lambda: unstaged(host, x) if out is None or host is out else out.copy_(host))


@_timed
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
    return ireduce_scatter(x, comm, dim, may_block=True).wait()


def ireduce_scatter(x, comm, dim=0, may_block=False):
    """Start :func:`reduce_scatter`."""
    group = as_group(comm)
    check_dim("reduce_scatter", x, dim)
    if group.size == 1:
        return Pending(x.detach().clone())
    rows = staged(moved(x, dim, 0))
    cuts = even_blocks(rows, group.size)
    low, high = bounds(rows.shape[0], group.size, group.rank)
    out = host_empty((high - low, *rows.shape[1:]), x)
    n_bytes = rows.nbytes
    group.enter("reduce_scatter", sent_bytes("reduce_scatter", group.size, n_bytes, out.nbytes), x)
    transport = group.transport("reduce_scatter", x.dtype, n_bytes, may_block, group.holds(rows))
    request = transport.reduce_scatter(flat(rows), flat(out), cuts, "sum")
    return Pending(out, request, (rows,), lambda: moved(unstaged(out, x), 0, dim))


@_timed
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
        On this rank, before any message, if ``x`` has no ``dim``, as in all operations that have one, or ``size`` was
        given and ``x`` is not this rank's block of it.

    Notes
    -----
    Sends the own block ``p-1`` times.
    """
    return iallgather(x, comm, dim, size, may_block=True).wait()


def iallgather(x, comm, dim=0, size=None, may_block=False):
    """Start :func:`allgather`."""
    group = as_group(comm)
    dim = check_dim("allgather", x, dim)
    if group.size == 1:
        return Pending(x.detach().clone())
    sent = sent_bytes("allgather", group.size, own_bytes=x.nbytes)
    group.enter("allgather", sent, x, (*x.shape[:dim], size, *x.shape[dim + 1:]))
    if size is None:
        lengths = group.comm.allgather(x.shape[dim])
    else:
        lengths = counts(size, group.size)
        if x.shape[dim] != lengths[group.rank]:
            raise ShapeError(
                f"allgather: dim {dim} of the block of rank {group.rank} has {x.shape[dim]} items, its share of "
                f"size={size} over {group.size} ranks is {lengths[group.rank]}: pass the block that scatter gives"
            )
    rows = staged(moved(x, dim, 0))
    out = host_empty((sum(lengths), *rows.shape[1:]), x)
    transport = group.transport("allgather", x.dtype, out.nbytes, may_block)
    request = transport.allgather(flat(rows), flat(out), row_blocks(tuple(lengths), out))
    return Pending(out, request, (rows,), lambda: moved(unstaged(out, x), 0, dim))


@_timed
def reduce_scatter_blocks(x, comm):
    """Sum flat ``x`` over the ranks where it lies; return this rank's block of it, which holds the sum.

    Collective over ``comm``: equal shapes and dtypes. Destroys the other blocks: for buffers too large to have twice.
    """
    return ireduce_scatter_blocks(x, comm, may_block=True).wait()


def ireduce_scatter_blocks(x, comm, may_block=False):
    """Start :func:`reduce_scatter_blocks`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x)
    cuts, host = all_bounds(len(x), group.size), staged(x)
    own = slice(*cuts[group.rank])
    block = x[own]
    group.enter("reduce_scatter", sent_bytes("reduce_scatter", group.size, x.nbytes, block.nbytes), x)
    transport = group.transport("reduce_scatter", x.dtype, x.nbytes, may_block, group.holds(host))
    request = transport.reduce_scatter(host, host[own], cuts, "sum")
    return Pending(block, request, (host,), lambda: block if host is x else block.copy_(host[own]))


@_timed
def allgather_blocks(x, comm):
    """Fill flat ``x`` where it lies: every rank gives its own block and gets all others.

    Collective over ``comm``: equal shapes and dtypes.
    """
    return iallgather_blocks(x, comm, may_block=True).wait()


def iallgather_blocks(x, comm, may_block=False):
    """Start :func:`allgather_blocks`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x)
    cuts, is_apart = all_bounds(len(x), group.size), x.is_cuda or not x.is_contiguous()
    host, mine = host_empty(x.shape, x) if is_apart else x, slice(*cuts[group.rank])
    own = host[mine].copy_(x[mine]) if is_apart else host[mine]
    group.enter("allgather", sent_bytes("allgather", group.size, own_bytes=own.nbytes), x)
    transport = group.transport("allgather", x.dtype, x.nbytes, may_block, group.holds(host))
    request = transport.allgather(own, host, cuts)
    return Pending(x, request, (host,), lambda: x.copy_(host) if is_apart else x)


@_timed
def bcast(x, comm, root=0):
    """Give every rank the ``x`` of ``root``.

    Collective over ``comm``: equal shapes and dtypes on all ranks; only the root's values count.

    Returns
    -------
    Tensor, same shape, replicated
    """
    return ibcast(x, comm, root, may_block=True).wait()


def ibcast(x, comm, root=0, may_block=False):
    """Start :func:`bcast`."""
    group = as_group(comm)
    if group.size == 1:
        return Pending(x.detach().clone())
    out = staged(x).clone()
    n_bytes = x.nbytes
    group.enter("bcast", sent_bytes("bcast", group.size, n_bytes, is_root=group.rank == root), x, root=root)
    request = group.transport("bcast", x.dtype, n_bytes, may_block).bcast(flat(out), root)
    return Pending(out, request, (), lambda: unstaged(out, x))


@_timed
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
    return ialltoall(x, comm, dim, may_block=True).wait()


def ialltoall(x, comm, dim=0, may_block=False):
    """Start :func:`alltoall`."""
    group = as_group(comm)
    check_dim("alltoall", x, dim)
    if group.size == 1:
        return Pending(x.detach().clone())
    rows = staged(moved(x, dim, 0))
    low, high = bounds(rows.shape[0], group.size, group.rank)
    mine, n_bytes = high - low, rows.nbytes
    out = host_empty((group.size * mine, *rows.shape[1:]), x)
    group.enter("alltoall", sent_bytes("alltoall", group.size, n_bytes, out.nbytes // group.size), x)
    transport = group.transport("alltoall", x.dtype, n_bytes, may_block, group.holds(rows))
    arrivals = row_blocks((mine,) * group.size, out)
    request = transport.alltoall(flat(rows), flat(out), even_blocks(rows, group.size), arrivals)
    return Pending(out, request, (rows,), lambda: moved(unstaged(out, x), 0, dim))


@_timed
def scatter(x, comm, dim=0, root=0):
    """Give each rank its block of ``dim`` of the root's ``x``.

    Collective over ``comm``: ``x`` has the same shape and dtype on all ranks; only the root's values count.

    Returns
    -------
    Tensor, shape (..., n_i, ...), sharded(dim)
    """
    return iscatter(x, comm, dim, root, may_block=True).wait()


def iscatter(x, comm, dim=0, root=0, may_block=False):
    """Start :func:`scatter`."""
    group = as_group(comm)
    check_dim("scatter", x, dim)
    if group.size == 1:
        return Pending(x.detach().clone())
    rows = staged(moved(x, dim, 0))
    low, high = bounds(rows.shape[0], group.size, group.rank)
    out = host_empty((high - low, *rows.shape[1:]), x)
    n_bytes = rows.nbytes
    group.enter("scatter", sent_bytes("scatter", group.size, n_bytes, out.nbytes, group.rank == root), x, root=root)
    request = group.transport("scatter", x.dtype, n_bytes, may_block).scatter(
        flat(rows), flat(out), even_blocks(rows, group.size), root)
    return Pending(out, request, (rows,), lambda: moved(unstaged(out, x), 0, dim))


@_timed
def gather(x, comm, dim=0, root=0):
    """Join the blocks of all ranks along ``dim`` on ``root``.

    Collective over ``comm``: equal dtypes, and equal shapes but for ``dim``.

    Returns
    -------
    Tensor, shape (..., n, ...) on the root; shape (..., 0, ...) elsewhere
    """
    return igather(x, comm, dim, root, may_block=True).wait()


def igather(x, comm, dim=0, root=0, may_block=False):
    """Start :func:`gather`; the ranks tell each other their sizes first."""
    group = as_group(comm)
    dim = check_dim("gather", x, dim)
    if group.size == 1:
        return Pending(x.detach().clone())
    sent = sent_bytes("gather", group.size, own_bytes=x.nbytes, is_root=group.rank == root)
    group.enter("gather", sent, x, (*x.shape[:dim], *x.shape[dim + 1:]), root)
    lengths = group.comm.allgather(x.shape[dim])
    rows = staged(moved(x, dim, 0))
    out = host_empty((sum(lengths) if group.rank == root else 0, *rows.shape[1:]), x)
    cuts = row_blocks(tuple(lengths), rows)
    transport = group.transport("gather", x.dtype, cuts[-1][1] * x.element_size(), may_block)
    return Pending(out, transport.gather(flat(rows), flat(out), cuts, root), (rows,),
                   lambda: moved(unstaged(out, x), 0, dim))


class Pending:
    """A started operation. ``wait()`` finishes it and returns its tensor; ``test()`` lets it progress."""

    def __init__(self, result, request=DONE, keep=(), finish=None):
        self._result, self._request, self._keep, self._finish = result, request, keep, finish

    def test(self):
        """Let MPI work; tell whether the operation has finished."""
        return self._request.Test()

    def wait(self):
        """Block until finished and return the result."""
        finish(self._request)
        self._request = DONE
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        self._keep = ()
        return self._result


def sent_bytes(op, ranks, n_bytes=0, own_bytes=0, is_root=False):
    """Return what a rank sends: of a whole of ``n_bytes``, with a block of ``own_bytes`` that is its own. Local."""
    if op == "allreduce":
        return 2 * (n_bytes - n_bytes // ranks)
    if op == "allgather":
        return (ranks - 1) * own_bytes
    if op == "bcast":
        return n_bytes if is_root else 0
    if op == "gather":
        return 0 if is_root else own_bytes
    return n_bytes - own_bytes if op != "scatter" or is_root else 0  # that, reduce_scatter and alltoall


def check_dim(operation, x, dim):
    """Return ``dim`` of ``x`` counted from the front; refuse one that ``x`` does not have. Local."""
    if not -x.dim() <= dim < x.dim():
        what = f"has the {x.dim()} dimensions {list(x.shape)}" if x.dim() else "is a single number: pass x[None]"
        raise ShapeError(f"{operation}: there is no dim {dim}: x {what}")
    return dim % x.dim()


def _described(x):
    return f"{'' if x.is_contiguous() else 'strided '}{x.dtype} {list(x.shape)}"

"""Collectives bound to tensors: everything is looked up once, and they are started again and again."""

import time
from functools import partial

from mpillm.comm import collectives
from mpillm.comm.buffers import flat
from mpillm.comm.progress import finish
from mpillm.comm.transport import DONE, bind
from mpillm.errors import ConfigError, ShapeError
from mpillm.schedules.blocks import all_bounds, counts

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall")
_IN_PLACE = {
    "allreduce": lambda x, group, may_block: collectives.iallreduce(x, group, out=x, may_block=may_block),
    "reduce_scatter": collectives.ireduce_scatter_blocks,
    "allgather": collectives.iallgather_blocks,
}


class Bound:
    """A collective on flat tensors where they lie; :meth:`mpillm.comm.group.Group.bind` makes it.

    What its transport can keep is made at the first start: persistent requests of the MPI library, views of the windows of
    other ranks, a schedule's requests and scratch memory.
    """

    def __init__(self, group, op, x, out, root):
        if op not in OPERATIONS:
            raise ConfigError(f"bind: {op}: what can be bound is {', '.join(OPERATIONS)}")
        self._group, self._op, self._starts, self._kept, self._request = group, op, {}, {}, None
        self._is_staged, self._enter = x.is_cuda or not x.is_contiguous(), _nothing
        if self._is_staged:
            if out is not None or op not in _IN_PLACE:
                raise ShapeError(f"bind: {op} of a tensor that is no contiguous host memory: what can be bound there is "
                                 f"{', '.join(_IN_PLACE)} in place; pass a contiguous tensor on the CPU, and no out")
            self._x, self._result = x, x[_own(x, group)] if op == "reduce_scatter" else x
            return
        self._arguments, self._result, own_bytes = _bound(group, op, flat(x), out, root)
        self._x = self._arguments[1 if op == "allgather" else 0]  # the whole vector
        self._in_window = group.holds(self._x)
        if group.size > 1:
            sent = collectives.sent_bytes(op, group.size, self._x.nbytes, own_bytes, group.rank == root)
            self._enter = group.entrance(op, sent, self._x, root=root if op == "bcast" else None,
                                         op="sum" if op == "allreduce" else None)

    def start(self, may_block=False):
        """Begin, with what the tensors hold now; they must not be touched before :meth:`wait`.

        Collective over the group, in the same order as all its operations.

        Parameters
        ----------
        may_block : bool
            Whether it may take an algorithm that makes no progress by itself, such as shared memory.

        Returns
        -------
        Bound
            Itself.
        """
        start = self._starts.get(may_block) or self._make(may_block)
        self._enter()
        self._request = start()
        return self

    def is_started(self):
        """Tell whether it was started and not yet waited for. Local."""
        return self._request is not None

    def test(self):
        """Let it progress; tell whether it has finished. Local."""
        return self._request.Test()

    def wait(self):
        """Block until it has finished; return the tensor that holds the result. Local."""
        finish(self._request)
        self._request = None
        return self._result

    def run(self):
        """Carry it out by the fastest algorithm, which may block, and return as :meth:`wait`. Collective."""
        start = self._starts.get(True) or self._make(True)
        began_s = time.perf_counter()  # written out, because small messages would feel every call on the way
        self._enter()
        request = start()
        if request is not DONE:
            finish(request)
        self._group.recorder.collective_s += time.perf_counter() - began_s
        return self._result

    def free(self):
        """Release what is kept, and let go of the tensors; it must have finished and is not to be started again. Local."""
        for made in self._kept.values():
            made.free()
        self._kept, self._starts, self._enter, self._x, self._arguments, self._result, self._group = {}, {}, *[None] * 5

    def _make(self, may_block):
        """Return what starts it."""
        if self._is_staged:
            key, make = may_block, lambda: _Staged(partial(_IN_PLACE[self._op], self._x, self._group, may_block))
        elif self._group.size == 1:
            key, make = None, lambda: _Alone(self._arguments[0], self._result)
        else:
            key = self._group.transport(self._op, self._x.dtype, self._x.nbytes, may_block, self._in_window)
            make = partial(bind, key, self._op, *self._arguments)
        if key not in self._kept:  # one, where both ways to start are carried out by the same
            self._kept[key] = make()
        self._starts[may_block] = self._kept[key].start
        return self._starts[may_block]


def _nothing():
    """Note nothing: a rank alone sends nothing, and what is staged is noted by the call that does it."""


class _Alone:
    """An operation of one rank."""

    def __init__(self, x, result):
        self._x, self._result = x, result

    def start(self):
        if self._result.data_ptr() != self._x.data_ptr():
            self._result.copy_(self._x)
        return DONE

    def free(self):
        self._x = self._result = None


class _Staged:
    """An operation on a tensor that goes through other memory each time."""

    def __init__(self, call):
        self._call, self._pending = call, None

    def start(self):
        self._pending = self._call()
        return self

    def Test(self):
        """Let it progress; tell whether the result is in its place."""
        if self._pending is not None and self._pending.test():
            self._pending.wait()
            self._pending = None
        return self._pending is None

    def free(self):
        self._call = None


def _bound(group, op, x, out, root):
    """Return what the transport's operation takes, what holds the result, and how large this rank's block is."""
    if op == "allreduce":
        result = x if out is None else _checked(op, out, x, len(x))
        return (x, result, "sum"), result, 0
    if op == "bcast":
        return (x, root), x, 0
    if op == "reduce_scatter":
        own = _own(x, group)
        result = x[own] if out is None else _checked(op, out, x, own.stop - own.start)
        return (x, result, all_bounds(len(x), group.size), "sum"), result, result.nbytes
    if op == "allgather":
        whole = x if out is None else flat(out)
        own = _own(whole, group)
        block = whole[own] if out is None else _checked(op, x, whole, own.stop - own.start)
        return (block, whole, all_bounds(len(whole), group.size)), whole, block.nbytes
    mine = counts(len(x), group.size)[group.rank]
    result = _checked(op, out, x, mine * group.size)
    arrivals = [(rank * mine, (rank + 1) * mine) for rank in range(group.size)]
    return (x, result, all_bounds(len(x), group.size), arrivals), result, mine * x.element_size()


def _own(x, group):
    return slice(*all_bounds(len(x), group.size)[group.rank])


def _checked(op, out, x, length):
    """Return ``out`` flat; refuse one that is not contiguous host memory of ``length`` items like those of ``x``."""
    if out is None or out.is_cuda or not out.is_contiguous() or out.dtype != x.dtype or out.numel() != length:
        what = "none" if out is None else f"{out.dtype} {list(out.shape)} on {out.device}"
        raise ShapeError(f"bind: {op} needs beside {x.dtype} {list(x.shape)} a contiguous tensor on the CPU of the same dtype "
                         f"with {length} items, not {what}")
    return flat(out)

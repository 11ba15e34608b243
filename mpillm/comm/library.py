"""The MPI library's own collectives, on flat host tensors.

A :class:`~mpillm.comm.transport.Transport`.
"""

import os
from functools import partial

import torch

from mpillm.comm.buffers import HALF_TYPES, as_numbers, as_words, counts_and_places, is_within
from mpillm.comm.progress import finish, under_way
from mpillm.comm.sums import combine_tree
from mpillm.comm.transport import DONE, KEPT_BYTES, Prepared
from mpillm.schedules.blocks import all_bounds

_POLLS = 20  # before a wait is left to the library: it comes back a microsecond later than from its test
# Whose persistent requests are faster than calls, where every rank has a core. Others were not: Open MPI 5.0.11 takes up to
# 1.9 times as long for sums.
_PERSISTENT = {"MPICH": ("allreduce", "reduce_scatter", "allgather", "alltoall", "bcast"),
               "Open MPI": ("allgather", "alltoall")}


class Library:
    """The library's collectives over one group.

    MPI knows no half types and promises no order of sums: sums of half types, and all sums of a group with the fixed
    order, are exchanged directly and added where they arrive.
    """

    def __init__(self, group, may_block):
        self.comm, self.rank, self.size, self._may_block = group.comm, group.rank, group.size, may_block
        self._has_fixed_order = group.order == "tree"
        if self.size > 1:
            from mpi4py import MPI

            self._in_place, self._ops = MPI.IN_PLACE, {"sum": MPI.SUM, "max": MPI.MAX}
            has_core = self.size <= len(os.sched_getaffinity(0))
            self._persistent = _PERSISTENT.get(MPI.get_vendor()[0], ()) if has_core else ()

    def allreduce(self, x, out, op):
        if self._is_direct(x):
            cuts = all_bounds(len(x), self.size)
            own = out[slice(*cuts[self.rank])]
            self.reduce_scatter(x, own, cuts, op)
            return self.allgather(own, out, cuts)
        return self._call(*self._allreduce(x, out, op))

    def reduce_scatter(self, x, out, cuts, op):
        if not self._is_direct(x):
            return self._call(*self._reduce_scatter(x, out, cuts, op))
        received = torch.empty(self.size * len(out), dtype=x.dtype)
        arrivals = [(rank * len(out), (rank + 1) * len(out)) for rank in range(self.size)]
        finish(self.alltoall(x, received, cuts, arrivals))
        out.copy_(combine_tree(list(received.view(self.size, len(out))), op))
        return DONE

    def allgather(self, x, out, cuts):
        return self._call(*self._allgather(x, out, cuts))

    def bcast(self, x, root):
        return self._call(*self._bcast(x, root))

    def alltoall(self, x, out, sends, receives):
        return self._call(*self._alltoall(x, out, sends, receives))

    def scatter(self, x, out, cuts, root):
        return self._call(*self._scatter(x, out, cuts, root))

    def gather(self, x, out, cuts, root):
        return self._call(*self._gather(x, out, cuts, root))

    def bind(self, op, *arguments):
        """Return the persistent form of an operation on these arguments; collective, as the operation itself."""
        x, out, *_ = arguments
        is_sum, needs_memory = op in ("allreduce", "reduce_scatter"), op == "reduce_scatter" and is_within(out, x)
        if is_sum and self._is_direct(x) or needs_memory and x.nbytes > KEPT_BYTES:
            return Prepared(partial(getattr(self, op), *arguments))
        name, call, result = getattr(self, f"_{op}")(*arguments)
        if self._may_block and op not in self._persistent:
            return Prepared(_blocking(partial(getattr(self.comm, name), *call), result))
        return Persistent(getattr(self.comm, f"{name}_init")(*call), result, self._may_block)

    # What is called for each operation: MPI's name, the arguments, and (where from, where to) a result is copied if it
    # does not arrive in its place.

    def _allreduce(self, x, out, op):
        words = as_numbers(out)
        source = self._in_place if x is out or x.data_ptr() == out.data_ptr() else as_numbers(x)
        return "Allreduce", (source, words, self._ops[op]), None

    def _reduce_scatter(self, x, out, cuts, op):
        # MPI leaves the result of a call in place at the beginning, where it would destroy what others may still read.
        is_in_place = is_within(out, x)
        part = torch.empty_like(out) if is_in_place else out
        sizes, _ = counts_and_places(tuple(cuts))
        call = as_numbers(x), as_numbers(part), sizes, self._ops[op]
        return "Reduce_scatter", call, (part.numpy(), out.numpy()) if is_in_place else None

    def _allgather(self, x, out, cuts):
        low, high = cuts[self.rank]
        is_in_place = low == high or out.data_ptr() + low * out.element_size() == x.data_ptr()
        source = self._in_place if is_in_place else as_words(x)
        return "Allgatherv", (source, as_words(out, cuts)), None

    def _bcast(self, x, root):
        return "Bcast", (as_words(x), root), None

    def _alltoall(self, x, out, sends, receives):
        return "Alltoallv", (as_words(x, sends), as_words(out, receives)), None

    def _scatter(self, x, out, cuts, root):
        source = as_words(x, cuts) if self.rank == root else None
        return "Scatterv", (source, as_words(out), root), None

    def _gather(self, x, out, cuts, root):
        target = as_words(out, cuts) if self.rank == root else None
        return "Gatherv", (as_words(x), target, root), None

    def _call(self, name, arguments, result):
        """Call the blocking form, which libraries have faster algorithms for, or start the nonblocking one."""
        if self._may_block:
            return _blocking(partial(getattr(self.comm, name), *arguments), result)()
        request = getattr(self.comm, f"I{name.lower()}")(*arguments)
        return Copied(request, *result) if result else request

    def _is_direct(self, x):
        return self._has_fixed_order or x.dtype in HALF_TYPES


class Copied:
    """A request whose result is copied to its place once it is there."""

    def __init__(self, request, source, target):
        self._request, self._source, self._target = request, source, target

    def Test(self):
        """Let it progress; tell whether the result is in its place."""
        if self._target is not None and self._request.Test():
            self._target[:] = self._source
            self._target = None
        return self._target is None


class Persistent:
    """A :class:`~mpillm.comm.transport.Startable` by a persistent request of the library."""

    def __init__(self, request, result, may_block):
        self._request, self._result, self._may_block = request, result, may_block

    def start(self):
        request = self._request
        request.Start()
        if not self._may_block or under_way:
            return Copied(request, *self._result) if self._result else request
        for _ in range(_POLLS):
            if request.Test():
                break
        else:
            request.Wait()
        if self._result:
            self._result[1][:] = self._result[0]
        return DONE

    def free(self):
        self._request.Free()


def _blocking(call, result):
    """Return what does a blocking call, and copies its result, if that is needed, to its place."""

    def blocking():
        call()
        if result:
            result[1][:] = result[0]
        return DONE

    return blocking

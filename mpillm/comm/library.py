"""The MPI library's own collectives, on flat host tensors.

A :class:`~mpillm.comm.transport.Transport`.
"""

import torch

from mpillm.comm.buffers import HALF_TYPES, as_array, as_words
from mpillm.comm.progress import finish
from mpillm.comm.sums import combine_tree
from mpillm.comm.transport import DONE
from mpillm.schedules.blocks import all_bounds


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

    def allreduce(self, x, out, op):
        if self._is_direct(x):
            cuts = all_bounds(len(x), self.size)
            own = out[slice(*cuts[self.rank])]
            self.reduce_scatter(x, own, cuts, op)
            return self.allgather(own, out, cuts)
        source = self._in_place if x is out or x.data_ptr() == out.data_ptr() else as_array(x)
        return self._call("Allreduce", source, as_array(out), self._ops[op])

    def reduce_scatter(self, x, out, cuts, op):
        sizes = [high - low for low, high in cuts]
        if self._is_direct(x):
            received = torch.empty(self.size * len(out), dtype=x.dtype)
            arrivals = [(rank * len(out), (rank + 1) * len(out)) for rank in range(self.size)]
            finish(self.alltoall(x, received, cuts, arrivals))
            out.copy_(combine_tree(list(received.view(self.size, len(out))), op))
        elif x.data_ptr() <= out.data_ptr() < x.data_ptr() + x.numel() * x.element_size():
            array = as_array(x)
            if any(0 < low < high - low for low, high in cuts):  # MPICH 5.0.2 aborts: its copy to the front overlaps
                part = torch.empty_like(out)
                finish(self._call("Reduce_scatter", array, as_array(part), sizes, self._ops[op]))
                out.copy_(part)
                return DONE
            finish(self._call("Reduce_scatter", self._in_place, array, sizes, self._ops[op]))
            if self.rank > 0:  # MPI leaves it at the beginning; numpy minds the overlap
                array[slice(*cuts[self.rank])] = array[:len(out)]
        else:
            return self._call("Reduce_scatter", as_array(x), as_array(out), sizes, self._ops[op])
        return DONE

    def allgather(self, x, out, cuts):
        is_in_place = out[slice(*cuts[self.rank])].data_ptr() == x.data_ptr()
        source = self._in_place if is_in_place else as_words(x)
        return self._call("Allgatherv", source, [as_words(out), _layout(cuts)])

    def bcast(self, x, root):
        return self._call("Bcast", as_words(x), root)

    def alltoall(self, x, out, sends, receives):
        return self._call("Alltoallv", [as_words(x), _layout(sends)], [as_words(out), _layout(receives)])

    def scatter(self, x, out, cuts, root):
        source = [as_words(x), _layout(cuts)] if self.rank == root else None
        return self._call("Scatterv", source, as_words(out), root)

    def gather(self, x, out, cuts, root):
        target = [as_words(out), _layout(cuts)] if self.rank == root else None
        return self._call("Gatherv", as_words(x), target, root)

    def _call(self, name, *arguments):
        """Call the blocking form, which libraries have faster algorithms for, or start the nonblocking one."""
        return getattr(self.comm, name if self._may_block else f"I{name.lower()}")(*arguments) or DONE

    def _is_direct(self, x):
        return self._has_fixed_order or x.dtype in HALF_TYPES


def _layout(cuts):
    """Return sizes and places of blocks."""
    return [high - low for low, high in cuts], [low for low, _ in cuts]

"""Collectives without messages on tensors that lie in a window: each rank reads and writes those of the others.

Sums are formed where they lie, each rank its own block, along the fixed tree of :mod:`mpillm.schedules.tree`, half types in
float32 rounded once; large blocks in pieces that fit a cache.
"""

import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.sums import combine_tree
from mpillm.comm.transport import DONE, Prepared
from mpillm.schedules.blocks import all_bounds

KEPT = 128  # calls whose views are kept
PIECE_BYTES = 1 << 18
WHOLE_BYTES = 1 << 20  # a block of up to here is not cut: code that is not in the cache costs more than memory does


class InWindow:
    """A :class:`~mpillm.comm.transport.Transport` whose operations block.

    What lies in a window must do so on all ranks, at the same place: the result of an allreduce or allgather, the input of
    the others.

    Parameters
    ----------
    node : Node
    """

    def __init__(self, node):
        self.node, self.rank, self.size, self._kept = node, node.rank, node.size, {}

    def bind(self, op, *arguments):
        """Return an operation with all views made. Local."""
        return Prepared(getattr(self, f"_{op}")(*arguments))

    def forget(self):
        """Let go of all views: a window goes. Local."""
        self._kept.clear()

    def _run(self, op, *arguments):
        """Do it now; where all lies in windows by the views of the last call like this, which take longer to make than a small
        operation. What lies elsewhere must not be held here."""
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        key = op, *((x.data_ptr(), len(x), x.dtype) for x in tensors), *arguments[len(tensors):]
        if key in self._kept:
            return self._kept[key]()
        call = getattr(self, f"_{op}")(*arguments)
        if all(map(self.node.holds, tensors)):
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = call
        return call()

    def allreduce(self, x, out, op):
        return self._run("allreduce", x, out, op)

    def reduce_scatter(self, x, out, cuts, op):
        return self._run("reduce_scatter", x, out, cuts, op)

    def allgather(self, x, out, cuts):
        return self._run("allgather", x, out, cuts)

    def bcast(self, x, root):
        return self._run("bcast", x, root)

    def alltoall(self, x, out, sends, receives):
        return self._run("alltoall", x, out, sends, receives)

    def _allreduce(self, x, out, op):
        low, high = all_bounds(len(out), self.size)[self.rank]
        blocks = _pieces([part[low:high] for part in self.node.views(out)])
        mine = [(parts, parts[self.rank], [part for i, part in enumerate(parts) if i != self.rank]) for parts in blocks]

        def combine():
            for parts, own, others in mine:
                combine_tree(parts, op, own)
                for other in others:
                    other[:] = own

        return self._between_barriers(combine, None if x.data_ptr() == out.data_ptr() else lambda: out.copy_(x))

    def _reduce_scatter(self, x, out, cuts, op):
        start, stop = cuts[self.rank]
        blocks = _pieces([*(part[start:stop] for part in self.node.views(x)), out])

        def combine():
            for *parts, own in blocks:
                combine_tree(parts, op, own)

        return self._between_barriers(combine)

    def _allgather(self, x, out, cuts):
        views, own = self.node.views(out), out[slice(*cuts[self.rank])]
        return self._between_barriers(
            _copies((out[slice(*cut)], views[rank][slice(*cut)]) for rank, cut in enumerate(cuts) if rank != self.rank),
            None if own.data_ptr() == x.data_ptr() else lambda: own.copy_(x))

    def _bcast(self, x, root):
        return self._between_barriers(_copies([] if self.rank == root else [(x, self.node.views(x)[root])]))

    def _alltoall(self, x, out, sends, receives):
        mine, views = slice(*sends[self.rank]), self.node.views(x)
        return self._between_barriers(_copies((out[slice(*cut)], views[rank][mine]) for rank, cut in enumerate(receives)))

    def _between_barriers(self, work, prepare=None):
        """Return what does ``work`` once all ranks are here, and ends when all have done theirs."""
        barrier = self.node.barrier

        def call():
            if prepare:
                prepare()
            barrier()
            work()
            barrier()
            return DONE

        return call


def _copies(pairs):
    """Return what copies the second of each pair to the first."""
    pairs = [blocks for pair in pairs for blocks in _pieces(pair)]

    def copy():
        for target, source in pairs:
            target[:] = source

    return copy


def _pieces(blocks):
    """Return blocks, equally long, as a list of what lies at one place of each: whole and as arrays, whose calls cost a
    microsecond less than a tensor's, or, if long, cut to fit a cache and as tensors, which have threads."""
    if blocks[0].nbytes > WHOLE_BYTES:
        return list(zip(*(block.split(PIECE_BYTES // block.element_size()) for block in blocks)))
    return [blocks if blocks[0].dtype in HALF_TYPES else [block.numpy() for block in blocks]]

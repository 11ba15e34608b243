"""Collectives without messages on tensors of a rank's own: piece by piece through memory that the ranks of a node share.

All but the first read and the last write of a piece stays in cache. Sums follow the fixed tree of
:mod:`mpillm.schedules.tree`, half types in float32 rounded once.
"""

import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.sums import combine_tree
from mpillm.comm.transport import DONE
from mpillm.schedules.blocks import all_bounds

SLOT_BYTES = 1 << 20
NUM_SLOTS = 8  # two are enough to be right; with more a slot has left the readers' caches when it is written again
STAGING_BYTES = NUM_SLOTS * SLOT_BYTES
AT_ONCE_BYTES = 1 << 18  # of all other ranks: up to here every rank combines everything, one meeting in place of two


class Staging:
    """A :class:`~mpillm.comm.transport.Transport` through slots; its operations block.

    Parameters
    ----------
    node : Node
    parts : list of Tensor
        The :data:`STAGING_BYTES` of every rank.
    """

    def __init__(self, node, parts):
        self.node, self.rank, self.size, self._parts = node, node.rank, node.size, parts
        self._peers = [rank for rank in range(node.size) if rank != node.rank]
        self.slot_bytes, self.at_once_bytes = SLOT_BYTES, AT_ONCE_BYTES // len(self._peers)
        self._slots, self._turn = {}, 0

    def free(self):
        """Let go of the memory. Local."""
        self._slots, self._parts = {}, []

    def allreduce(self, x, out, op):
        if x.nbytes > min(self.at_once_bytes, self.slot_bytes):
            return self._reduce(x, out, all_bounds(len(x), self.size), op, True)
        if x.dtype not in HALF_TYPES:
            x, out = _light(1, x, out)
        slots, size = self._next_slots(x.dtype, 1), len(x)
        slots[self.rank][0][:size] = x
        self.node.barrier()
        combine_tree([slot[0][:size] for slot in slots], op, out)
        return DONE

    def reduce_scatter(self, x, out, cuts, op):
        return self._reduce(x, out, cuts, op, False)

    def allgather(self, x, out, cuts):
        own = out[slice(*cuts[self.rank])]
        if own.data_ptr() != x.data_ptr():
            own.copy_(x)
        return self._publish(own, {rank: out[slice(*cuts[rank])] for rank in self._peers}, cuts)

    def bcast(self, x, root):
        is_root = self.rank == root
        return self._publish(x if is_root else x[:0], {} if is_root else {root: x}, [(0, len(x))])

    def gather(self, x, out, cuts, root):
        outs = {}
        if self.rank == root:
            outs = {rank: out[slice(*cut)] for rank, cut in enumerate(cuts)}
            outs.pop(root).copy_(x)
        return self._publish(x, outs, cuts)

    def alltoall(self, x, out, sends, receives):
        parts = {rank: x[slice(*cut)] for rank, cut in enumerate(sends)}
        outs = {rank: out[slice(*cut)] for rank, cut in enumerate(receives)}
        outs.pop(self.rank).copy_(parts.pop(self.rank))
        return self._exchange(parts, outs, sends, x.dtype)

    def scatter(self, x, out, cuts, root):
        if self.rank == root:
            parts = {rank: x[slice(*cut)] for rank, cut in enumerate(cuts)}
            out.copy_(parts.pop(root))
            return self._exchange(parts, {}, cuts, out.dtype)
        return self._exchange({}, {root: out}, cuts, out.dtype)

    def _publish(self, x, outs, cuts):
        """Show ``x`` to all ranks, none of them larger than the largest of ``cuts``; take that of some to ``outs``."""
        rounds = self._rounds(cuts, x.dtype, 1)
        x, *blocks = _light(rounds, x, *outs.values())
        outs = dict(zip(outs, blocks))
        for number in range(rounds):
            slots = self._next_slots(x.dtype, 1)
            _fill(slots[self.rank][0], x, number)
            self.node.barrier()
            for rank, out in outs.items():
                _drain(slots[rank][0], out, number)
        return DONE

    def _exchange(self, parts, outs, cuts, dtype):
        """Send ``parts`` to some ranks, take ``outs`` from some, none larger than the largest of ``cuts``."""
        rounds = self._rounds(cuts, dtype, self.size)
        like, *blocks = _light(rounds, torch.empty(0, dtype=dtype), *parts.values(), *outs.values())
        parts, outs = dict(zip(parts, blocks)), dict(zip(outs, blocks[len(parts):]))
        for number in range(rounds):
            slots = self._next_slots(like.dtype, self.size)
            for rank, part in parts.items():
                _fill(slots[self.rank][rank], part, number)
            self.node.barrier()
            for rank, out in outs.items():
                _drain(slots[rank][self.rank], out, number)
        return DONE

    def _reduce(self, x, out, cuts, op, is_gathered):
        """Combine blocks piece by piece; with ``is_gathered`` a round later every rank takes what the others combined.

        A slot has a part for every rank: what it is to combine, and the last result of the slot's own rank.
        """
        rounds, own = self._rounds(cuts, x.dtype, self.size), self.rank
        if x.dtype not in HALF_TYPES:
            x, out = _light(rounds, x, out)
        parts = [x[low:high] for low, high in cuts]
        outs = [out[low:high] for low, high in cuts] if is_gathered else [out] * self.size
        for number in range(rounds + is_gathered):
            slots = self._next_slots(x.dtype, self.size)
            mine = slots[own]
            if number < rounds:
                for rank in self._peers:
                    _fill(mine[rank], parts[rank], number)
            if is_gathered and number > 0:
                _fill(mine[own], outs[own], number - 1)
            self.node.barrier()
            if is_gathered and number > 0:
                for rank in self._peers:
                    _drain(slots[rank][rank], outs[rank], number - 1)
            step = len(mine[0])
            part = parts[own][number * step:(number + 1) * step]
            if len(part):
                pieces = [part if rank == own else slot[own][:len(part)] for rank, slot in enumerate(slots)]
                combine_tree(pieces, op, outs[own][number * step:(number + 1) * step])
        return DONE

    def _rounds(self, cuts, dtype, count):
        """Return in how many rounds these blocks go through a slot of ``count`` parts."""
        step = self._part_items(dtype, count)
        return max(-(-(high - low) // step) for low, high in cuts)

    def _part_items(self, dtype, count):
        """Return the items in one of ``count`` parts of a slot, each beginning on a multiple of 16."""
        return max(1, self.slot_bytes // dtype.itemsize // count // 16) * 16

    def _next_slots(self, dtype, count):
        """Return the slots of the coming round, by rank, as ``count`` equal parts each: arrays if the dtype is numpy's.

        They are used in turn: with one barrier a round, and two slots or more, what is written now was last read before
        the barrier of the round before.
        """
        self._turn = (self._turn + 1) % NUM_SLOTS
        key = dtype, count, self._turn
        if key not in self._slots:
            low, step = self._turn * SLOT_BYTES, self._part_items(dtype, count)
            staging = [part if isinstance(dtype, torch.dtype) else part.numpy() for part in self._parts]
            self._slots[key] = [list(part[low:low + SLOT_BYTES].view(dtype)[:count * step].reshape(count, step))
                                for part in staging]
        return self._slots[key]


def _light(rounds, *tensors):
    """Return what one round takes as arrays, of half types as integers: a call of theirs costs a microsecond less than
    a tensor's, but has no threads."""
    if rounds > 1:
        return tensors
    return [(x.view(torch.int16) if x.dtype in HALF_TYPES else x).numpy() for x in tensors]


def _fill(part, block, number):
    """Copy piece ``number`` of a block into a part of a slot."""
    piece = block[number * len(part):(number + 1) * len(part)]
    if len(piece):
        part[:len(piece)] = piece


def _drain(part, block, number):
    """Copy a part of a slot to piece ``number`` of a block."""
    piece = block[number * len(part):(number + 1) * len(part)]
    if len(piece):
        piece[:] = part[:len(piece)]

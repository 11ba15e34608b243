"""Runs collective schedules: persistent requests, messages in segments that are reduced while the next ones travel."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from mpillm.comm.buffers import HALF_TYPES, as_words
from mpillm.comm.progress import advance, finish, under_way
from mpillm.comm.sums import COMBINE

SEGMENT_BYTES = 1 << 20


class Executor:
    """One rank's part of a schedule, bound to memory; may be started any number of times.

    Collective over ``comm`` to make and to start, in the same order on all ranks; several that are under way at the
    same time may be waited for in any order.

    Parameters
    ----------
    schedule : CollectiveSchedule
    carries : tuple
        Of :func:`mpillm.schedules.check_collective.check_collective`: only a schedule that it accepted may run.
    comm : Comm
        For nothing but executors.
    sizes : sequence of int
        Items of every chunk.
    inputs, outputs : dict of int to Tensor
        Flat host memory of the chunks that this rank gives, and of those it must get. A chunk in both may be the same
        memory. Inputs that are no outputs are not changed.
    dtype : torch.dtype
    op : {"sum", "max"}
    tag : int
        Of its messages; executors under way at the same time need different ones.
    is_once : bool
        Whether it is started once only and releases its requests at the end.

    Notes
    -----
    Values of a half type that are as some rank gave them, or complete, travel as two bytes; sums are formed, and
    travel while they are partial, in float32.
    """

    def __init__(self, schedule, carries, comm, sizes, inputs, outputs, dtype, op="sum", tag=0, is_once=False):
        self._tag, self._is_once = tag, is_once
        self.comm, self.inputs, self.outputs, self.combine = comm, inputs, outputs, COMBINE[op]
        self._sizes, self._dtype = sizes, dtype
        own = schedule.rounds[comm.rank]
        changed = {c for steps in own for s in steps if s.kind in ("recv", "reduce") for c in s.chunks}
        is_wide = dtype in HALF_TYPES and op == "sum" and None in schedule.sources
        self._wide = torch.float32 if is_wide else dtype
        self._slots = {}
        for steps in own:
            for step in steps:
                for chunk in step.chunks:
                    if chunk not in self._slots:
                        self._slots[chunk] = self._slot(chunk, is_wide, chunk in changed)
        self._rounds = [self._bind(steps, kinds) for steps, kinds in zip(own, carries[comm.rank])]
        self._progress = None

    def start(self):
        """Begin, with what the inputs hold now. Collective. Not before what was started last has finished."""
        self._progress = self._run()
        under_way.append(self)
        self.Test()

    def Test(self):
        """Let it and all others under way progress; tell whether it is finished.

        Local. Named as a request's method, which it stands for.

        Returns
        -------
        bool
        """
        advance()
        return self._progress is None

    def wait(self):
        """Work until it is finished, leaving the core to others while there is nothing to do."""
        finish(self)

    def free(self):
        """Release the requests. Local; it must have finished."""
        for bound in self._rounds:
            for message in bound.sends + bound.receives:
                for request in message.requests:
                    request.Free()
        self._rounds = []

    def advance(self):
        """Go on until there is nothing to do but wait, or to the end. Local."""
        if next(self._progress, self) is not self:
            return
        self._progress = None
        under_way.remove(self)
        for chunk, out in self.outputs.items():
            if out.data_ptr() != self._slots[chunk].data_ptr():
                out.copy_(self._slots[chunk])
        if self._is_once:
            self.free()

    def _slot(self, chunk, is_wide, is_changed):
        """Return where a chunk is while the schedule runs: its output, its input if that is only sent, or scratch."""
        if not is_wide and chunk in self.outputs:
            return self.outputs[chunk]
        if not is_wide and chunk in self.inputs and not is_changed:
            return self.inputs[chunk]
        return torch.empty(self._sizes[chunk], dtype=self._wide)

    def _bind(self, steps, kinds):
        """Return the messages of a round with their memory and requests."""
        bound = _Round()
        for step, kind in zip(steps, kinds):
            slots = [self._slots[c] for c in step.chunks]
            if step.kind == "copy":
                bound.copies += [(slot, self.inputs[c]) for slot, c in zip(slots, step.chunks)
                                 if slot.data_ptr() != self.inputs[c].data_ptr()]
                continue
            wire_type = self._wide if kind == "partial" else self._dtype
            slots = _joined(slots)
            is_direct = len(slots) == 1 and slots[0].dtype == wire_type and step.kind != "reduce"
            wire = slots[0] if is_direct else torch.empty(sum(map(len, slots)), dtype=wire_type)
            pieces = list(wire.split(max(1, SEGMENT_BYTES // wire_type.itemsize))) if len(wire) else []
            make = self.comm.Send_init if step.kind == "send" else self.comm.Recv_init
            message = _Message(step.kind, set(step.chunks), slots, wire, pieces,
                               [make(as_words(piece), step.peer, self._tag) for piece in pieces])
            (bound.sends if step.kind == "send" else bound.receives).append(message)
        return bound

    def _run(self):
        """Go through the rounds; yields while there is nothing to do but wait."""
        for bound in self._rounds:
            for slot, source in bound.copies:
                slot.copy_(source)
            for message in bound.sends:
                message.pack()
            for message in bound.receives + bound.sends:
                for request in message.requests:
                    request.Start()
            for message in bound.receives:
                for send in bound.sends:  # what is being sent must not change before it has left
                    if send.chunks & message.chunks:
                        yield from _arrival(send.requests)
                if message.kind == "reduce" and len(message.slots) == 1:
                    yield from self._reduce_by_segments(message)
                else:
                    yield from _arrival(message.requests)
                    message.unpack(self.combine)
            for message in bound.sends:
                yield from _arrival(message.requests)

    def _reduce_by_segments(self, message):
        """Add each segment as soon as it is there."""
        start = 0
        for piece, request in zip(message.pieces, message.requests):
            yield from _arrival([request])
            target = message.slots[0][start:start + len(piece)]
            self.combine(target, piece.to(target.dtype), out=target)
            start += len(piece)


@dataclass
class _Message:
    """A message bound to memory: ``wire`` is what travels, the slots themselves or a buffer of its own."""

    kind: str
    chunks: set
    slots: list
    wire: torch.Tensor
    pieces: list
    requests: list

    def pack(self):
        """Put the values of the slots on the wire."""
        for slot, part in self._parts():
            part.copy_(slot)

    def unpack(self, combine):
        """Take what arrived into the slots."""
        for slot, part in self._parts():
            if self.kind == "reduce":
                combine(slot, part.to(slot.dtype), out=slot)
            else:
                slot.copy_(part)

    def _parts(self):
        if len(self.slots) == 1 and self.wire is self.slots[0]:
            return []
        return list(zip(self.slots, self.wire.split([len(slot) for slot in self.slots])))


@dataclass
class _Round:
    copies: list = field(default_factory=list)
    sends: list = field(default_factory=list)
    receives: list = field(default_factory=list)


def _arrival(requests):
    """Yield until all requests are done."""
    for request in requests:
        while not request.Test():
            yield


def _joined(slots):
    """Join neighbours in memory to one tensor, so that they travel without packing."""
    slots = [slot for slot in slots if len(slot)]
    starts = [0, *(i + 1 for i, (one, other) in enumerate(pairwise(slots)) if _end(one) != other.data_ptr()
                   or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()), len(slots)]
    return [slots[low].as_strided((sum(map(len, slots[low:high])),), (1,))
            for low, high in pairwise(starts) if high > low]


def _end(x):
    return x.data_ptr() + x.numel() * x.element_size()

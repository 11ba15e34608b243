"""Runs collective schedules: persistent requests, messages in segments that are reduced while the next ones travel."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from mpillm.comm.buffers import HALF_TYPES, as_words
from mpillm.comm.progress import advance, finish, under_way
from mpillm.comm.sums import COMBINE
from mpillm.schedules.blocks import align
from mpillm.schedules.collective import Step

SEGMENT_BYTES = 1 << 20
_LINE_BYTES = 64


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
        memory. Inputs that are no outputs are not changed, unless ``may_change_inputs``.
    dtype : torch.dtype
    op : {"sum", "max"}
    tag : int
        Of its messages; executors under way at the same time need different ones.
    is_once : bool
        Whether it is started once only and releases its requests at the end.
    may_change_inputs : bool
        Whether partial sums may be formed where the inputs lie, which saves as much memory.

    Attributes
    ----------
    scratch_bytes : int
        Of the memory that it holds besides inputs and outputs: what the checker's report says, in the type of the sums,
        and the inputs that change, where they may not.

    Notes
    -----
    Values of a half type that are as some rank gave them, or complete, travel as two bytes; sums are formed, and
    travel while they are partial, in float32.
    """

    def __init__(self, schedule, carries, comm, sizes, inputs, outputs, dtype, op="sum", tag=0, is_once=False,
                 may_change_inputs=False):
        self._tag, self._is_once = tag, is_once
        self.comm, self.inputs, self.outputs, self.combine = comm, inputs, outputs, COMBINE[op]
        self._dtype = dtype
        own = schedule.rounds[comm.rank]
        changed = {c for steps in own for s in steps if s.kind in ("recv", "reduce") for c in s.chunks}
        is_wide = dtype in HALF_TYPES and op == "sum" and None in schedule.sources
        self._wide = torch.float32 if is_wide else dtype
        self._slots, scratch = {}, []
        for chunk in sorted({c for steps in own for step in steps for c in step.chunks}):
            if not is_wide and chunk in outputs:
                self._slots[chunk] = outputs[chunk]
            elif not is_wide and chunk in inputs and (may_change_inputs or chunk not in changed):
                self._slots[chunk] = inputs[chunk]
            else:
                scratch.append(chunk)
        parts = torch.empty(sum(sizes[c] for c in scratch), dtype=self._wide).split([sizes[c] for c in scratch])
        self._slots.update(zip(scratch, parts))  # side by side, so that neighbours travel as they lie
        self._rounds = [self._plan(steps, kinds) for steps, kinds in zip(own, carries[comm.rank])]
        # One memory for the wires of all rounds, because a round's messages are gone when the next one begins.
        wires = torch.empty(max((bound.wire_bytes for bound in self._rounds), default=0), dtype=torch.uint8)
        for bound in self._rounds:
            self._bind(bound, wires)
        self.scratch_bytes = sum(part.nbytes for part in parts) + len(wires)
        self._progress = None

    def start(self):
        """Begin, with what the inputs hold now; return itself, the request. Collective. Not before what was started last
        has finished."""
        self._progress = self._run()
        under_way.append(self)
        self.Test()
        return self

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

    def _plan(self, steps, kinds):
        """Return the messages of a round, and which of them travel from the slots as they lie."""
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
            message = _Message(step, slots, wire_type, slots[0] if is_direct else None)
            (bound.sends if step.kind == "send" else bound.receives).append(message)
        return bound

    def _bind(self, bound, wires):
        """Give the messages of a round their memory and requests."""
        start = 0
        for message in bound.receives + bound.sends:
            if message.wire is None:
                message.wire = wires[start:start + message.n_bytes].view(message.wire_type)
                start += align(message.n_bytes, _LINE_BYTES)
            segment = max(1, SEGMENT_BYTES // message.wire_type.itemsize)
            message.pieces = list(message.wire.split(segment)) if len(message.wire) else []
            make = self.comm.Send_init if message.step.kind == "send" else self.comm.Recv_init
            message.requests = [make(as_words(piece), message.step.peer, self._tag) for piece in message.pieces]

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
                    if set(send.step.chunks) & set(message.step.chunks):
                        yield from _arrival(send.requests)
                if message.step.kind == "reduce" and len(message.slots) == 1:
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
    """A message of a step; ``wire`` is what travels: the one slot itself, or a part of the memory for wires."""

    step: Step
    slots: list
    wire_type: torch.dtype
    wire: torch.Tensor | None
    pieces: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    @property
    def n_bytes(self):
        """How much travels."""
        return sum(map(len, self.slots)) * self.wire_type.itemsize

    def pack(self):
        """Put the values of the slots on the wire."""
        for slot, part in self._parts():
            part.copy_(slot)

    def unpack(self, combine):
        """Take what arrived into the slots."""
        for slot, part in self._parts():
            if self.step.kind == "reduce":
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

    @property
    def wire_bytes(self):
        """The memory of its messages that do not travel as they lie."""
        return sum(align(message.n_bytes, _LINE_BYTES) for message in self.receives + self.sends if message.wire is None)


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

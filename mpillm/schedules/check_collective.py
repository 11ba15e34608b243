"""Proves a collective schedule before it runs: every contribution once, nothing read too early, no deadlock.

The schedule is *played* with rendezvous sends: a rank posts all messages of its round at once and goes on when all of
them have met their partner. A slot holds the set of ranks whose contribution is in it.
"""

from collections import Counter
from dataclasses import dataclass

from mpillm.errors import ScheduleError

KINDS = ("copy", "send", "recv", "reduce")


@dataclass(frozen=True)
class CollectiveReport:
    """What the checker found out.

    Attributes
    ----------
    num_rounds : int
        Of the longest chain of messages that wait for each other.
    shares_sent : dict of (int, int) to int
        Sum of the shares of the chunks sent, by source and target rank.
    num_messages : tuple of int
        That each rank sends.
    scratch : tuple of int
        Share of the whole that each rank needs besides what it gives and gets: for chunks that only pass through, and in
        one round for what arrives to be reduced and for messages whose chunks do not lie side by side.
    carries : tuple
        ``carries[rank][round][step]``: ``"input"`` as some rank gave it, ``"partial"`` sum or complete ``"result"``;
        ``None`` for a copy.
    """

    num_rounds: int
    shares_sent: dict
    num_messages: tuple
    scratch: tuple
    carries: tuple

    def sent(self, rank):
        """Return the share of the whole that ``rank`` sends."""
        return sum(share for (source, _), share in self.shares_sent.items() if source == rank)


def check_collective(schedule):
    """Prove that a collective schedule does what its sources and targets say and cannot deadlock.

    Local.

    Returns
    -------
    CollectiveReport

    Raises
    ------
    ScheduleError
        With rank, round and step of the fault, when

        - a step names a rank or chunk that is not there, or a rank itself, or copies what the rank does not give;
        - a slot is sent, or reduced into, before it holds something, or is sent and received, or received twice, in
          one round;
        - a contribution is counted twice, or lost by a receive on top of it;
        - two ranks disagree on the chunks of a message, or a message has no partner;
        - ranks wait for each other;
        - something is missing at the end.

    Notes
    -----
    Cost: linear in the number of steps times their chunks.
    """
    for rank, number, step in _steps(schedule):
        _check_step(schedule, rank, number, step)
    return _Play(schedule).run()


class _Play:
    """The state of a schedule as it is played. A message is known by source, target and its number between the two."""

    def __init__(self, schedule):
        p = schedule.num_ranks
        self.schedule, self.rounds, self.everyone = schedule, schedule.rounds, (1 << p) - 1
        self.slots = [{} for _ in range(p)]  # contributions, a bit a rank, by chunk
        self.at, self.ended = [0] * p, [0] * p  # the next round of every rank, and when the one before ended
        self.posted = [None] * p  # the messages of the round that a rank is in, by step
        self.sends, self.receives = {}, {}  # chunks, contributions and time of posting, by message
        self.numbers = Counter()
        self.scratch = [0] * p
        self.carries = [[[None] * len(steps) for steps in rounds] for rounds in self.rounds]

    def run(self):
        """Play to the end and report."""
        waiting = [rank for rank in range(self.schedule.num_ranks) if self.rounds[rank]]
        while waiting:
            moved = [rank for rank in waiting if self._advance(rank)]
            if not moved:
                self._refuse_deadlock(waiting)
            waiting = [rank for rank in waiting if self.at[rank] < len(self.rounds[rank])]
        self._check_targets()
        return self._report()

    def _advance(self, rank):
        """Post the round of a rank, or end it if all its messages have met; tell whether either was possible."""
        if self.posted[rank] is None:
            self._post(rank)
        elif all(m in self.sends and m in self.receives for m in self.posted[rank].values()):
            self._end(rank)
        else:
            return False
        return True

    def _post(self, rank):
        """Copy, and post all messages of a round with what the slots hold now."""
        steps, slots = self.rounds[rank][self.at[rank]], self.slots[rank]
        self.posted[rank] = {}
        for step in steps:
            if step.kind == "copy":
                for chunk in step.chunks:
                    if chunk in slots:
                        self._refuse(rank, step, f"copies chunk {chunk} on top of what its slot holds")
                    slots[chunk] = 1 << rank
        arriving, replaced, sent = Counter(), set(), {c for step in steps if step.kind == "send" for c in step.chunks}
        for index, step in enumerate(steps):
            if step.kind == "copy":
                continue
            pair = (rank, step.peer) if step.kind == "send" else (step.peer, rank)
            end = (*pair, step.kind == "send")
            message = (*pair, self.numbers[end])
            self.numbers[end] += 1
            self.posted[rank][index] = message
            if step.kind == "send":
                empty = [c for c in step.chunks if c not in slots]
                if empty:
                    self._refuse(rank, step, f"sends chunk {empty[0]}, of which it holds nothing yet")
                self.sends[message] = step.chunks, [slots[c] for c in step.chunks], self.ended[rank]
            else:
                self.receives[message] = step.chunks, step.kind, self.ended[rank]
                arriving.update(step.chunks)
                replaced.update(step.chunks if step.kind == "recv" else ())
                for chunk in step.chunks:
                    if chunk in replaced and (chunk in sent or arriving[chunk] > 1):
                        self._refuse(rank, step, f"chunk {chunk} is received in a round that sends or receives it too")
        wires = sum(self.schedule.shares[c] for s in steps if s.kind == "reduce" or not self._is_joint(rank, s)
                    for c in s.chunks)
        self.scratch[rank] = max(self.scratch[rank], wires)

    def _is_joint(self, rank, step):
        """Tell whether the chunks of a step lie side by side: one after the other, and all in the rank's own memory or none."""
        homes = {self._is_held(rank, c) for c in step.chunks}
        return step.kind == "copy" or len(homes) == 1 and step.chunks == tuple(range(step.chunks[0], step.chunks[-1] + 1))

    def _is_held(self, rank, chunk):
        """Tell whether a rank gives or gets a chunk; what it does not only passes through."""
        return bool({None, rank} & {self.schedule.sources[chunk], self.schedule.targets[chunk]})

    def _end(self, rank):
        """Let what has arrived into the slots."""
        slots, end = self.slots[rank], self.ended[rank]
        for index, message in self.posted[rank].items():
            step = self.rounds[rank][self.at[rank]][index]
            chunks, values, sent_at = self.sends[message]
            taken, _, taken_at = self.receives[message]
            end = max(end, 1 + max(sent_at, taken_at))
            if chunks != taken:
                self._refuse(rank, step, f"rank {message[0]} sends chunks {chunks}, rank {message[1]} expects {taken}")
            self.carries[rank][self.at[rank]][index] = self._carried(chunks, values)
            if step.kind == "send":
                continue
            for chunk, value in zip(chunks, values):
                held = slots.get(chunk, 0)
                if step.kind == "reduce" and not held:
                    self._refuse(rank, step, f"reduces into chunk {chunk}, of which it holds nothing yet")
                if step.kind == "reduce" and held & value:
                    self._refuse(rank, step, f"chunk {chunk}: counts that of ranks {_bits(held & value)} twice")
                if step.kind == "recv" and held & ~value:
                    self._refuse(rank, step, f"chunk {chunk}: loses that of ranks {_bits(held & ~value)}")
                slots[chunk] = held | value
        self.ended[rank], self.posted[rank] = end, None
        self.at[rank] += 1

    def _carried(self, chunks, values):
        """Tell what a message carries; one of several kinds counts as a partial sum."""
        kinds = set()
        for chunk, value in zip(chunks, values):
            is_input = value & (value - 1) == 0
            kinds.add("input" if is_input else "result" if value == self._complete(chunk) else "partial")
        return kinds.pop() if len(kinds) == 1 else "partial"

    def _complete(self, chunk):
        source = self.schedule.sources[chunk]
        return self.everyone if source is None else 1 << source

    def _check_targets(self):
        for chunk, target in enumerate(self.schedule.targets):
            for rank in range(self.schedule.num_ranks) if target is None else [target]:
                lacking = self._complete(chunk) & ~self.slots[rank].get(chunk, 0)
                if lacking:
                    raise ScheduleError(
                        f"schedule {_name(self.schedule)}: at the end chunk {chunk} on rank {rank} lacks the "
                        f"contribution of ranks {_bits(lacking)}"
                    )

    def _report(self):
        schedule, shares = self.schedule, Counter()
        for (source, target, _), (chunks, _, _) in self.sends.items():
            shares[source, target] += sum(schedule.shares[c] for c in chunks)
        for rank, slots in enumerate(self.slots):
            self.scratch[rank] += sum(schedule.shares[c] for c in slots if not self._is_held(rank, c))
        messages = Counter(source for source, _, _ in self.sends)
        return CollectiveReport(
            max(self.ended), dict(shares), tuple(messages[rank] for rank in range(schedule.num_ranks)),
            tuple(self.scratch), tuple(tuple(map(tuple, rounds)) for rounds in self.carries),
        )

    def _refuse(self, rank, step, fault):
        raise _refusal(self.schedule, rank, self.at[rank], step, fault)

    def _refuse_deadlock(self, waiting):
        """Name what every rank waits for."""
        lines = []
        for rank in waiting:
            for index, message in self.posted[rank].items():
                if message not in self.sends or message not in self.receives:
                    step = self.rounds[rank][self.at[rank]][index]
                    lines.append(f"rank {rank} round {self.at[rank]}: waits to {step.kind} chunks {step.chunks} "
                                 f"{'to' if step.kind == 'send' else 'from'} rank {step.peer}")
        raise ScheduleError(f"schedule {_name(self.schedule)}: deadlock, or a message without a partner:\n"
                            + "\n".join(lines[:20]))


def _check_step(schedule, rank, number, step):
    """Refuse a step that makes no sense by itself."""
    fault = None
    if step.kind not in KINDS:
        fault = f"is none of {', '.join(KINDS)}"
    elif not step.chunks or len(set(step.chunks)) < len(step.chunks):
        fault = "names no chunk, or one twice"
    elif not all(0 <= c < schedule.num_chunks for c in step.chunks):
        fault = f"names a chunk beyond the last, {schedule.num_chunks - 1}"
    elif step.kind == "copy" and any(schedule.sources[c] not in (None, rank) for c in step.chunks):
        fault = "copies a chunk that another rank gives"
    elif step.kind != "copy" and (step.peer == rank or not 0 <= (step.peer or 0) < schedule.num_ranks):
        fault = f"names a peer that is the rank itself or beyond the last, {schedule.num_ranks - 1}"
    if fault:
        raise _refusal(schedule, rank, number, step, fault)


def _refusal(schedule, rank, number, step, fault):
    peer = "" if step.peer is None else f" with rank {step.peer}"
    return ScheduleError(f"schedule {_name(schedule)}: rank {rank} round {number}: {step.kind} of chunks "
                         f"{step.chunks}{peer}: {fault}")


def _name(schedule):
    return f"{schedule.op} by {schedule.algorithm} over {schedule.num_ranks} ranks"


def _steps(schedule):
    return [(rank, number, step) for rank, rounds in enumerate(schedule.rounds)
            for number, steps in enumerate(rounds) for step in steps]


def _bits(mask):
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]

"""Pipeline schedules: what every pipeline rank computes, in which order.

An action is written ``2F0``: stage 2, forward, microbatch 0. ``F`` is the forward, ``B`` the full backward,
``I`` and ``W`` its input-gradient and weight-gradient halves. Stage ``s`` lives on rank ``s % num_ranks``. A
schedule is only data: :mod:`mpillm.schedules.check` proves it, the runner runs it, and one from a text file
takes the same road as the five made here:

=============== =========================================================================================
``gpipe``       all forwards, then all backwards (Huang et al. 2019)
``1f1b``        just enough forwards to fill the pipe, then forward and backward in turn (Fan et al. 2021)
``interleaved`` 1f1b over several stages a rank, for a shorter bubble (Narayanan et al. 2021)
``zb-h1``       weight halves fill most of the bubble, in the memory of 1f1b (Qi et al. 2024)
``zb-h2``       they fill all of it, in about twice that memory (Qi et al. 2024)
=============== =========================================================================================
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, count

from mpillm.errors import ConfigError, ScheduleError
from mpillm.schedules.blocks import counts

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2")
KINDS = ("F", "B", "I", "W")
ACTION_FORM = "an action is a stage, one of F B I W, and a microbatch, as in 2F0"


@dataclass(frozen=True)
class Action:
    """One piece of a rank's work; prints and parses as ``2F0``."""

    stage: int
    kind: str
    microbatch: int

    def __post_init__(self):
        if self.kind not in KINDS or self.stage < 0 or self.microbatch < 0:
            raise ScheduleError(f'action "{self}": {ACTION_FORM}')

    def __str__(self):
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text):
        """Read an action such as ``2F0``; anything else is a :class:`ScheduleError`."""
        match = re.fullmatch(r"(\d{1,9})([FBIW])(\d{1,9})", text)
        if not match:
            raise ScheduleError(f'action "{text[:80]}": {ACTION_FORM}')
        return cls(int(match[1]), match[2], int(match[3]))


@dataclass(frozen=True)
class PipelineSchedule:
    """The order of actions of every pipeline rank: ``actions[rank]`` is that rank's."""

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self):
        if not re.fullmatch(r"[^\s#]+", self.name):
            raise ScheduleError(f'schedule name "{self.name}": a name is one word without "#"')
        header = self.header()
        if min(self.num_ranks, self.num_stages, self.num_microbatches) < 1:
            raise ScheduleError(f"{header}: there must be at least one of each")
        if self.num_stages % self.num_ranks:
            raise ScheduleError(f"{header}: ranks must divide stages, each holds as many")
        if len(self.actions) != self.num_ranks:
            raise ScheduleError(f"{header}: actions are given for {len(self.actions)} ranks")

    def rank_of(self, stage):
        """Return the rank on which a stage lives."""
        return stage % self.num_ranks

    def header(self):
        """Return the first line of the text."""
        return (f"schedule={self.name} ranks={self.num_ranks} stages={self.num_stages} "
                f"microbatches={self.num_microbatches}")

    def to_text(self):
        """Return the schedule as text that :meth:`from_text` reads back equal."""
        rows = [f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.actions)]
        return "\n".join([self.header(), *rows, ""])

    __str__ = to_text

    @classmethod
    def from_text(cls, text):
        """Read a schedule from text: a header line, then one line of actions a rank; ``#`` starts a comment.

        Local. ::

            schedule=mine ranks=2 stages=2 microbatches=2   # any name without blanks
            rank 0: 0F0 0F1 0B0 0B1
            rank 1: 1F0 1B0 1F1 1B1

        Raises
        ------
        ScheduleError
            When the text is not of this form. Whether the order can run is another matter:
            :func:`mpillm.schedules.check.check`.
        """
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        lines = [(number, line) for number, line in enumerate(lines, 1) if line]
        first = lines[0][1] if lines else ""
        count = r"=(\d{1,9})"
        header = re.fullmatch(rf"schedule=(\S+)\s+ranks{count}\s+stages{count}\s+microbatches{count}", first)
        if not header:
            raise ScheduleError(
                f'it begins with "{first[:80]}", but needs a header first, such as '
                '"schedule=mine ranks=2 stages=2 microbatches=4"'
            )
        rows = [_parse_row(number, line, rank) for rank, (number, line) in enumerate(lines[1:])]
        return cls(header[1], *map(int, header.groups()[1:]), tuple(rows))


def _parse_row(number, line, rank):
    """Read the line of one rank."""
    label, _, row = line.partition(":")
    if label.split() != ["rank", str(rank)]:
        raise ScheduleError(f'line {number}: "{line[:80]}" should begin with "rank {rank}:"')
    try:
        return tuple(map(Action.parse, row.split()))
    except ScheduleError as error:
        raise ScheduleError(f"line {number}: {error}") from None


@lru_cache(maxsize=32, typed=True)
def make_schedule(name, num_ranks, num_microbatches, chunks=1):
    """Make one of the named schedules.

    Local.

    Parameters
    ----------
    name : str
        One of ``SCHEDULES``.
    num_ranks, num_microbatches, chunks : int
        Pipeline ranks, microbatches of a step, stages a rank; any sizes from 1, nothing need divide.

    Returns
    -------
    PipelineSchedule

    Raises
    ------
    ConfigError
        When the name is unknown, a size is not positive, or ``chunks`` is more than the schedule can have.

    Notes
    -----
    Let ``F``, ``I`` and ``W`` take one step, ``B`` two and messages none. From ``p = num_ranks`` microbatches
    on (``2p-1`` for zb-h2), the longest time that a rank idles between its first and its last action is
    ``3(p-1)`` steps for gpipe, 1f1b and interleaved, ``p-1`` for zb-h1 and none for zb-h2. A rank of 1f1b
    holds ``p - rank`` microbatches at most, one of zb-h1 ``p``, one of zb-h2 ``2p-1``.
    """
    _check_request(name, num_ranks, num_microbatches, chunks)
    if name.startswith("zb-"):
        actions = _zero_bubble(num_ranks, num_microbatches, is_deep=name == "zb-h2")
    elif name == "gpipe":
        actions = _alternating(chunks, [num_microbatches], [chunks * num_microbatches] * num_ranks)
    else:
        actions = _alternating(chunks, *groups(num_ranks, num_microbatches, chunks))
    return PipelineSchedule(name, num_ranks, num_ranks * chunks, num_microbatches, actions)


def groups(num_ranks, num_microbatches, chunks):
    """Return for 1f1b and interleaved how many microbatches go together, and how many forwards each rank warms up with.

    Local.
    """
    sizes = counts(num_microbatches, max(1, num_microbatches // num_ranks))[::-1]
    ahead = 1 if chunks == 1 else 2
    return sizes, [(chunks - 1) * sizes[0] + ahead * after for after in reversed(range(num_ranks))]


def _check_request(name, num_ranks, num_microbatches, chunks):
    """Refuse what no schedule can be made for."""
    if name not in SCHEDULES:
        raise ConfigError(f'schedule "{name}": unknown; the named ones are {", ".join(SCHEDULES)}')
    for what, size in (("ranks", num_ranks), ("microbatches", num_microbatches), ("chunks", chunks)):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f'schedule "{name}" with {what} = {size!r}: it must be a whole number from 1')
    if chunks > 1 and name not in ("gpipe", "interleaved"):
        raise ConfigError(
            f'schedule "{name}" with chunks = {chunks}: it is for one stage a rank; '
            'set chunks = 1, or take "interleaved" or "gpipe"'
        )


def _alternating(chunks, sizes, warmups):
    """Return each rank's order: ``warmups[rank]`` forwards, then forward and backward in turn, then the rest.

    Microbatches go in groups of ``sizes``: one group passes all chunks of a rank before the next group
    starts. A group smaller than the number of ranks would come to its next chunk before the last rank is done
    with it, and one larger than the first would need a longer warm-up: so groups are as equal as can be, a
    largest one first.
    """
    groups = [range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes))]
    rows = []
    for rank, warmup in enumerate(warmups):
        stages = range(rank, len(warmups) * chunks, len(warmups))
        forwards = [Action(s, "F", m) for group in groups for s in stages for m in group]
        backwards = [Action(s, "B", m) for group in groups for s in reversed(stages) for m in group]
        steady = max(0, len(forwards) - warmup)
        turns = chain.from_iterable(zip(forwards[warmup:], backwards))
        rows.append((*forwards[:warmup], *turns, *backwards[steady:]))
    return tuple(rows)


def _zero_bubble(num_ranks, num_microbatches, is_deep):
    """Return each rank's order for zb-h1, or zb-h2 if ``is_deep``."""
    rows = []
    for rank, kinds in enumerate(zero_bubble_kinds(num_ranks, num_microbatches, is_deep)):
        numbers = {kind: count() for kind in "FIW"}
        rows.append(tuple(Action(rank, kind, next(numbers[kind])) for kind in kinds))
    return tuple(rows)


@lru_cache(maxsize=4096)
def zero_bubble_kinds(num_ranks, num_microbatches, is_deep):
    """Return for each rank the kinds of its actions in zb-h1 or zb-h2, in order: a greedy rule on a clock of unit steps.

    In every step a rank runs its next forward if it may, else its next input half if it can, else a weight
    half that waits. Its forwards may be ahead of its input halves by as many as fill the way to the last
    stage (for zb-h2 there and back), and ahead of its weight halves by as many as the first rank's: the
    limits of the paper.
    """
    limits = [2 * left - 1 if is_deep else left for left in range(num_ranks, 0, -1)]
    done = [dict.fromkeys("FIW", 0) for _ in range(num_ranks)]
    rows = [[] for _ in range(num_ranks)]

    def choose(rank):
        f, i, w = done[rank].values()
        arrived = num_microbatches if rank == 0 else done[rank - 1]["F"]
        returned = f if rank == num_ranks - 1 else done[rank + 1]["I"]
        if f < arrived and f - i < limits[rank] and f - w < limits[0]:
            return "F"
        return "I" if i < min(f, returned) else "W" if w < i else None

    while any(kinds["W"] < num_microbatches for kinds in done):
        for rank, kind in enumerate([choose(rank) for rank in range(num_ranks)]):
            if kind:
                rows[rank].append(kind)
                done[rank][kind] += 1
    return tuple(map("".join, rows))

"""Collective schedules as data: rounds in which ranks copy, send, receive and reduce chunks.

A message vector is cut into *chunks*. A rank has at most one value of every chunk, its *slot*, empty at first:

- ``copy`` puts the rank's own input of a chunk into its slot;
- ``send`` sends the values of slots to a peer; ``recv`` takes what a peer sends as the new values;
- ``reduce`` adds what a peer sends to the values.

Within a round a rank first copies, then does all else at once: what it sends are the values from before what it
receives in the same round. A rank goes on to its next round when all messages of this one have been sent and received.
Messages between two ranks keep their order.

Every collective is told by two columns: where a chunk comes from and where it must arrive. ``None`` as a source means
that every rank contributes and the contributions are summed, ``None`` as a target that every rank gets the value:

===============  =========  =========
operation        sources    targets
===============  =========  =========
allreduce        None       None
reduce_scatter   None       its owner
allgather        its owner  None
bcast            the root   None
reduce           None       the root
alltoall         rank i     rank j
scatter          the root   rank j
gather           rank i     the root
===============  =========  =========

The generators are in :mod:`mpillm.schedules.generators`, the proof in :mod:`mpillm.schedules.check_collective`.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple

from pydantic import StrictInt

from mpillm.errors import ScheduleError
from mpillm.plain import KNOWN_KEYS, checked, load_json


class Step(NamedTuple):
    """What a rank does in a round: ``kind`` is ``"copy"`` (without a peer), ``"send"``, ``"recv"`` or ``"reduce"``."""

    kind: Literal["copy", "send", "recv", "reduce"]
    peer: StrictInt | None
    chunks: tuple[StrictInt, ...]


@dataclass(frozen=True)
class CollectiveSchedule:
    """Who sends and reduces which chunks in which round.

    Attributes
    ----------
    op, algorithm : str
    num_ranks : int
    sources, targets : tuple of (int or None)
        For every chunk: the rank that gives it, ``None`` for a sum over all; the rank that must have it at the end,
        ``None`` for all.
    shares : tuple of int
        Relative sizes of the chunks, in the order in which they lie in the whole.
    rounds : tuple of tuple of tuple of Step
        ``rounds[rank][round]``. Ranks may differ in their number of rounds.
    """

    __pydantic_config__ = KNOWN_KEYS
    op: str
    algorithm: str
    num_ranks: StrictInt
    sources: tuple[StrictInt | None, ...]
    targets: tuple[StrictInt | None, ...]
    shares: tuple[StrictInt, ...]
    rounds: tuple[tuple[tuple[Step, ...], ...], ...]

    @property
    def num_chunks(self):
        """How many chunks the whole is cut into."""
        return len(self.shares)

    def bounds(self, n):
        """Return ``(start, stop)`` of every chunk of ``n`` items; equal shares give the blocks of
        :mod:`mpillm.schedules.blocks`."""
        ends = list(accumulate(self.shares, initial=0))
        return [(low * n // ends[-1], high * n // ends[-1]) for low, high in zip(ends, ends[1:])]

    def to_dict(self):
        """Return the schedule as what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Read what :meth:`to_dict` gave. It is not checked otherwise.

        Raises
        ------
        ScheduleError
            If a part is missing or of another form.
        """
        return checked(cls, values, "collective schedule", "it needs rounds of steps [kind, peer, chunks]",
                       refusal=ScheduleError)

    @classmethod
    def load(cls, path):
        """Read a JSON file of what :meth:`to_dict` gave; raises as :meth:`from_dict` does."""
        return load_json(cls, path, "collective schedule", "give a file that mpillm bound --trees wrote", ScheduleError)


def traffic(schedule):
    """Return what every rank sends to whom, and adds from whom, in its rounds, as shares of the whole.

    Local. Two algorithms that for some number of ranks differ only in how they cut the message give the same.
    """
    def parts(steps):
        found = Counter()
        for kind, peer, chunks in steps:
            if kind in ("send", "reduce"):
                found[kind, peer] += Fraction(sum(schedule.shares[c] for c in chunks), sum(schedule.shares))
        return frozenset(found.items())

    return tuple(tuple(filter(None, map(parts, own))) for own in schedule.rounds)


def draw(schedule):
    """Draw a schedule as text: a row a rank, a column a round.

    Local. ``3>1`` is chunk 3 sent to rank 1, ``<`` what is received from a rank, ``+`` what is added, ``=`` what is
    copied.

    Returns
    -------
    str
    """
    signs = {"send": ">", "recv": "<", "reduce": "+"}
    cells = [[" ".join(",".join(map(str, chunks)) + ("=" if peer is None else f"{signs[kind]}{peer}")
                       for kind, peer, chunks in steps) for steps in own] for own in schedule.rounds]
    length = max(map(len, cells), default=0)
    columns = [[f"round {number}", *(own[number] if number < len(own) else "" for own in cells)]
               for number in range(length)]
    columns.insert(0, ["", *(f"rank {rank}" for rank in range(schedule.num_ranks))])
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in zip(*columns))

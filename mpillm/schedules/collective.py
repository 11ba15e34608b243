"""Collective schedules as data: rounds in which ranks copy, send, receive and reduce chunks; and their generators.

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

Read backwards in time a schedule is its adjoint (:func:`adjoint`): allgather becomes reduce_scatter, bcast reduce,
scatter gather. So one generator serves both.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Step(NamedTuple):
    """What a rank does in a round: ``kind`` is ``"copy"`` (without a peer), ``"send"``, ``"recv"`` or ``"reduce"``."""

    kind: str
    peer: int | None
    chunks: tuple[int, ...]


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

    op: str
    algorithm: str
    num_ranks: int
    sources: tuple
    targets: tuple
    shares: tuple
    rounds: tuple

    @property
    def num_chunks(self):
        """How many chunks the whole is cut into."""
        return len(self.shares)

    def bounds(self, n):
        """Return ``(start, stop)`` of every chunk of ``n`` items; equal shares give the blocks of
        :mod:`mpillm.schedules.blocks`."""
        ends = list(accumulate(self.shares, initial=0))
        return [(low * n // ends[-1], high * n // ends[-1]) for low, high in zip(ends, ends[1:])]

ALGORITHMS = {op: () for op in ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall", "scatter", "gather")}

"""Ranks that are slower at their own work than they were, or than others with the same work."""

import os
import warnings
from collections import Counter
from statistics import median, median_low

EVERY = 20  # steps
LEAST_S = 1.0  # of own work, that a comparison needs
SLOW = 1.5
OWN_WORK = ("data", "F", "B", "I", "W")
ALIKE = 0.1  # by how much the weights of ranks with the same work may differ in number


class Stragglers:
    """Compares how long the ranks are at their own work, and warns of those that hold up the others.

    Collective over the mesh to make, as is :meth:`end_step`.

    Parameters
    ----------
    engine : mpillm.train.engine.Engine

    Notes
    -----
    All ranks take equally long for a step, because each waits for the slowest; what tells them apart is the time in
    :data:`OWN_WORK`, without collectives. Cost: one allgather of a few numbers every :data:`EVERY` steps.
    """

    def __init__(self, engine):
        self._comm, self._recorder, self._steps = engine.mesh.world.comm, engine.mesh.recorder, 0
        weights = sum(p.numel() for stage in engine.stages for p in stage.module.parameters())
        place = engine.mesh.coord("pipeline"), sum(stop - start for start, stop in engine.microbatches)
        self._ranks = self._comm.allgather((place, weights, os.uname().nodename))
        self._past, self._suspects, self._named = [[] for _ in self._ranks], set(), set()

    def end_step(self):
        """Count a step; every so many, compare."""
        self._steps += 1
        if self._comm.size == 1 or self._steps % EVERY:
            return
        own = self._comm.allgather({kind: self._recorder.own_s[kind] for kind in OWN_WORK})
        totals = [sum(of_rank.values()) for of_rank in own]
        if median(totals) < LEAST_S:
            return
        per_step_s = [total / self._steps for total in totals]
        slow = slow_ranks(per_step_s, self._past, self._alike)
        for rank in sorted((slow.keys() & self._suspects) - self._named):  # slow twice in a row: not by chance
            self._warn(rank, slow[rank], per_step_s[rank], Counter(own[rank]).most_common(1)[0][0])
        self._named, self._suspects = slow.keys() & (self._suspects | self._named), set(slow)
        for past, now in zip(self._past, per_step_s):
            past.append(now)
        self._recorder.own_s.clear()
        self._steps = 0

    def _alike(self, one, other):
        """Tell whether two ranks have the same work."""
        (place, weights, _), (other_place, others, _) = self._ranks[one], self._ranks[other]
        return place == other_place and abs(weights - others) <= ALIKE * weights

    def _warn(self, rank, factor, own_s, kind):
        if self._comm.rank == 0:
            warnings.warn(f"rank {rank} on {self._ranks[rank][-1]} holds up the others: {own_s:.3g} s of own work a "
                          f"step, {factor:.1f} times what it or ranks with the same work took, most of it in {kind}",
                          stacklevel=4)


def slow_ranks(now, past, are_alike):
    """Return ``{rank: factor}`` of the ranks that take more than :data:`SLOW` times as long as they should.

    Local. A rank should take what it took in the median so far, or what ranks with the same work take now, whichever
    is less; where most ranks take longer, by the same factor.

    Parameters
    ----------
    now : list of float
        Time of each rank.
    past : list of list of float
        Of each rank, earlier times.
    are_alike : callable
        ``are_alike(rank, other)``: whether they have the same work.
    """
    ranks = range(len(now))
    expected = [min(median(past[rank] or [now[rank]]),
                    median_low(now[other] for other in ranks if are_alike(rank, other))) for rank in ranks]
    factors = [time / should for time, should in zip(now, expected)]
    usual = median_low(factors)
    return {rank: factor for rank, factor in enumerate(factors) if factor > SLOW * usual}

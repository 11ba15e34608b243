"""Dynamic program: collectives over the levels of a machine → the algorithm for each size."""

import math
from dataclasses import dataclass
from functools import lru_cache

from mpillm.plan import ANY, DecisionTable
from mpillm.planner.collective_costs import FORMULAS, time_s
from mpillm.schedules.algorithm import LIBRARY, TWO_LEVEL

SIZES_BYTES = tuple(1 << k for k in range(8, 31))
# What is done inside a group of the level below before and after the same at the level above, on what part of the
# bytes. An alltoall has no such form here.
INSIDE = {
    "allreduce": (("reduce_scatter",), True, ("allgather",)),
    "reduce_scatter": (("reduce_scatter",), True, ()),
    "allgather": ((), True, ("allgather",)),
    "bcast": ((), False, ("bcast",)),
}


@dataclass(frozen=True)
class Best:
    """The fastest way of a collective: an algorithm over all ranks, or ``two_level``."""

    time_s: float
    algorithm: str


class Hierarchy:
    """Collectives over levels of ``sizes`` groups each, from the inside out.

    Local.

    Parameters
    ----------
    sizes : sequence of int
        Groups of the level below that a group of each level has; their product is the number of ranks.
    levels : sequence of Level
        The link of each.
    """

    def __init__(self, sizes, levels):
        self.sizes, self.levels = tuple(sizes), tuple(levels)
        self.best = lru_cache(None)(self._best)

    def _best(self, op, n_bytes, low=0, high=None):
        """Return the :class:`Best` of ``op`` over the levels ``[low, high)``.

        Either one algorithm over all their ranks, at the pace of the outermost link; or the innermost level first, then
        the others on what is left, each rank of a group in its own lane.
        """
        high = len(self.sizes) if high is None else high
        ranks, link = math.prod(self.sizes[low:high]), self.levels[max(high, 1) - 1]
        if ranks == 1:
            return Best(0.0, LIBRARY)
        found = [Best(time_s(op, name, link, ranks, n_bytes), name) for name in FORMULAS[op]]
        if high - low > 1 and self.sizes[low] > 1 and op in INSIDE:
            before, is_split, after = INSIDE[op]
            part = n_bytes / self.sizes[low] if is_split else n_bytes
            parts = [self.best(other, n_bytes, low, low + 1) for other in before]
            parts += [self.best(op, part, low + 1, high)]
            parts += [self.best(other, n_bytes, low, low + 1) for other in after]
            found.append(Best(sum(one.time_s for one in parts), TWO_LEVEL))
        return min(found, key=lambda one: one.time_s)


def decide(machine, ranks):
    """Choose for each operation the best algorithm up to each size.

    Local.

    Parameters
    ----------
    machine : Machine
    ranks : int

    Returns
    -------
    DecisionTable
        The same rows for every axis and type.
    """
    sizes, levels, below = [], [], 1
    for level in machine.levels:
        size = math.ceil(min(ranks, level.size) / below)
        if size > 1:
            sizes.append(size)
            levels.append(level)
            below *= size
    hierarchy, rows = Hierarchy(sizes, levels or machine.levels[:1]), []
    for op in FORMULAS:
        names = [hierarchy.best(op, n_bytes).algorithm for n_bytes in SIZES_BYTES]
        for limit, name, following in zip(SIZES_BYTES, names, names[1:] + [None]):
            if following is None:
                rows.append((op, ANY, ANY, None, name))
            elif following != name:
                rows.append((op, ANY, ANY, limit, name))
    return DecisionTable(tuple(rows))

"""Measures the fastest algorithm for each collective and size: a group's decision table."""

import math
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch

from mpillm import plan
from mpillm.comm import collectives
from mpillm.comm.progress import finish
from mpillm.comm.shared import if_room
from mpillm.plan import ANY, DEFAULT_TABLE, IN_WINDOW, DecisionTable
from mpillm.schedules.algorithm import LIBRARY, TWO_LEVEL, WINDOW, Algorithm
from mpillm.schedules.blocks import all_bounds
from mpillm.schedules.collective import traffic
from mpillm.schedules.generators import ALGORITHMS, make_collective
from mpillm.schedules.repair import repair

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall")
SIZES_BYTES = tuple(1 << k for k in range(10, 27, 2))
_SLOW_S = 0.02  # over a slow network the largest messages would take minutes; whoever wins here goes on to win
_TIE = 0.95  # of the time of the simpler: less is clearly faster
_NEAR, _AGAIN = 1.5, 4  # what is nearer than this to the best is measured again, so many times as long
_FAR, _FAR_S = 4.0, 5e-4  # times the best and so much more: not tried at the next size; slow to start may be fast
_CLOSE = 1.5  # the two sizes between which a limit is looked up no further
_EVERY = 2  # of the sizes are measured in a window, where two algorithms are left and change once
_LINE_BYTES = 64


def measure_table(group, operations=OPERATIONS, sizes_bytes=SIZES_BYTES, dtype=torch.float32, budget_s=0.02):
    """Measure which algorithm is fastest for each operation and size, on tensors of a rank's own and, where the group has
    shared memory, on tensors in a window.

    Collective over ``group``; all ranks return the same table. About ``budget_s`` for every operation, place, size and
    algorithm, and more for those that come near the best. Of near-equals the first of :func:`candidates` is taken. An
    algorithm that took far longer than the best of a size is not tried at the next; where the winner changes
    between two sizes, it is looked up between them. Nothing is measured beyond a size that takes :data:`_SLOW_S`, or for
    which shared memory has no room. What another size or operation would do clearly faster on tensors of a rank's own
    (:func:`mpillm.schedules.repair.repair`) is measured so, and done so where that is true. The rows hold for every dtype,
    because bytes take the time; operations that are not measured keep the rows of :data:`mpillm.plan.DEFAULT_TABLE`.
    """
    with largest_window(group, sizes_bytes, dtype) as window:
        places = [None] if window is None else [None, window]
        contests = [_Contest(group, op, place, dtype, budget_s) for op in operations for place in places]
        for contest in contests:
            contest.measure(sizes_bytes)
        chosen = _repaired(group, {one.op: one for one in contests if one.window is None})
        rows = [row for one in contests for row in one.rows(chosen[one.op] if one.window is None else one.winners())]
    return DecisionTable((*rows, *(row for row in DEFAULT_TABLE.rows if row[0] not in operations)))


@contextmanager
def largest_window(group, sizes_bytes, dtype):
    """Give a tensor in a window of the group's shared memory, of the largest of some sizes for which that has room; None
    where it has room for none, or the group has no such memory. Collective."""
    window = None
    for size in sorted(sizes_bytes, reverse=True) if group.node else ():
        if window is None:
            window = if_room(lambda size=size: group.node.empty(max(group.size, size // dtype.itemsize), dtype).zero_())
    yield window
    if window is not None:
        group.node.release(window)


class _Contest:
    """The algorithms that could carry out an operation on tensors in a window, or on others where there is none."""

    def __init__(self, group, op, window, dtype, budget_s):
        self.group, self.op, self.window, self._dtype, self._budget_s = group, op, window, dtype, budget_s
        self._members = {name: group.with_table(only(name)) for name in candidates(op, group, window is not None)}
        self.measured = {}  # by size the winner and its time

    def measure(self, sizes_bytes):
        """Find the winner of each size, as far as they can be measured. Collective, as is everything that measures."""
        alive = list(self._members)
        for size in sizes_bytes if self.window is None else sizes_bytes[::_EVERY]:
            if self.window is not None and size > self.window.nbytes:
                break
            winner, alive, best_s = self.fastest(size, {name: self._members[name] for name in alive})
            self.measured[size] = winner, best_s
            if best_s > _SLOW_S:
                break

    def winners(self):
        """Return by size the algorithm that won. Local."""
        return {size: winner for size, (winner, _) in self.measured.items()}

    def fastest(self, n_bytes, members):
        """Return the fastest of some groups, by name, the first of near-equals; those not far behind; the best time."""
        x, out = self._tensors(max(self.group.size, n_bytes // self._dtype.itemsize))
        calls = {name: make_call(self.op, x, member, out) for name, member in members.items()}
        median_s = medians(time_calls(self.group.comm, calls, self._budget_s))
        near = {name: calls[name] for name, median in median_s.items() if median <= _NEAR * min(median_s.values())}
        if len(near) > 1:
            median_s |= medians(time_calls(self.group.comm, near, _AGAIN * self._budget_s, repeats=(9, 400)))
        best = min(median_s[name] for name in near)
        winner = next(name for name in near if _TIE * median_s[name] <= best)
        return winner, [name for name in members if median_s[name] <= _FAR * best + _FAR_S], best

    def against_plain(self, n_bytes, choice, member):
        """Return ``choice``, which ``member`` carries out, where it beats the winner of this size, else that."""
        winner, _ = self.measured[n_bytes]
        return self.fastest(n_bytes, {winner: self._members[winner], choice: member})[0]

    def rows(self, chosen):
        """Return the rows of a table: where the choice changes between two sizes, the limit is bisected in the logarithm of
        the size if both were measured; else it is half way."""
        rows, where, sizes_bytes = [], () if self.window is None else (IN_WINDOW,), list(chosen)
        for low, high in pairwise(sizes_bytes):
            below, above = chosen[low], chosen[high]
            if below == above:
                continue
            are_measured = not any(Algorithm.parse(choice).is_repaired for choice in (below, above))
            members = {name: self._members[name] for name in (below, above)} if are_measured else {}
            while are_measured and high > _CLOSE * low:
                middle = int(math.sqrt(low * high)) // _LINE_BYTES * _LINE_BYTES
                is_higher = self.fastest(middle, members)[0] == below
                low, high = (middle, high) if is_higher else (low, middle)
            rows.append((self.op, ANY, ANY, int(math.sqrt(low * high)), below, *where))
        return [*rows, (self.op, ANY, ANY, None, chosen[sizes_bytes[-1]], *where)]

    def _tensors(self, size):
        """Return what an operation takes, and what an alltoall gives."""
        # written, because pages that only were asked for are all one page of zeros
        x = torch.empty(size, dtype=self._dtype).fill_(0) if self.window is None else self.window[:size]
        return x, torch.zeros(size + self.group.size, dtype=self._dtype)


def _repaired(group, contests):
    """Return what to take for every operation and size on tensors of a rank's own: what :func:`repair` says, where it was
    measured to be faster, because what it goes by may have been measured too short."""
    chosen = repair({op: contest.measured for op, contest in contests.items()})
    trial = group.with_table(DecisionTable(tuple((op, ANY, ANY, size, choice) for op, sizes in chosen.items()
                                                 for size, choice in sizes.items())))
    return {op: {size: contests[op].against_plain(size, choice, trial) if Algorithm.parse(choice).is_repaired else choice
                 for size, choice in sizes.items()} for op, sizes in chosen.items()}


def medians(times):
    """Return the median of every function that :func:`time_calls` measured. Local."""
    return {name: float(np.median(own)) for name, own in times.items()}


def time_calls(comm, calls, budget_s=0.2, repeats=(5, 200)):
    """Time several functions in turn, again and again, in another order each time: who comes first finds cold caches.

    Collective over ``comm``, as every function may be.

    Parameters
    ----------
    calls : dict of str to callable
    budget_s : float
        About how long each function may be measured.
    repeats : (int, int)
        The least and most times that each is called.

    Returns
    -------
    dict of str to ndarray of float64
        Seconds of every call, of the slowest rank.
    """
    for call in calls.values():  # the first time makes windows, requests and pages
        call()
    slowest = max(_once(comm, call) for call in calls.values())
    count = comm.bcast(int(np.clip(budget_s / max(slowest, 1e-9), *repeats)))
    order, times = np.random.default_rng(0), np.empty((len(calls), count))  # the same on all ranks
    for turn in range(count):
        for i in order.permutation(len(calls)):
            times[i, turn] = _once(comm, list(calls.values())[i])
    return dict(zip(calls, np.max(comm.allgather(times), 0)))


def make_call(op, x, group, out=None):
    """Return a function that carries out ``op`` on flat ``x``, where it lies if the operation allows that.

    Local. ``out``, a little larger than ``x``, is needed for alltoall, which has no form in place.
    """
    if op == "allreduce":
        return lambda: collectives.allreduce(x, group, out=x)
    if op == "reduce_scatter":
        return lambda: collectives.reduce_scatter_blocks(x, group)
    if op == "allgather":
        return lambda: collectives.allgather_blocks(x, group)

    def transport():
        return group.transport(op, x.dtype, x.nbytes, in_window=group.holds(x))

    if op == "bcast":
        return lambda: finish(transport().bcast(x, 0))
    cuts = all_bounds(len(x), group.size)
    mine = cuts[group.rank][1] - cuts[group.rank][0]
    arrivals = tuple((rank * mine, (rank + 1) * mine) for rank in range(group.size))
    return lambda: finish(transport().alltoall(x, out[:arrivals[-1][1]], cuts, arrivals))


def only(algorithm):
    """Return the table that takes ``algorithm`` for all operations that have it."""
    return DecisionTable(tuple((op, ANY, ANY, None, algorithm) for op in plan.OPERATIONS
                               if algorithm in (LIBRARY, WINDOW, *ALGORITHMS[op])))


def candidates(op, group, in_window=False):
    """Return the algorithms that ``group`` could take for ``op``, simple ones first; of those that come to the same
    for its number of ranks only one.

    On a tensor in a window these are the library, in place there, and the window: a schedule has the library's messages
    and Python beside.
    """
    if in_window:
        return [LIBRARY, WINDOW]
    nodes = group.schedules.nodes
    shared = [] if group.node is None else [WINDOW]
    names = [name for name in ALGORITHMS[op] if name != TWO_LEVEL or len(set(nodes)) > 1]
    kinds = {name: traffic(make_collective(op, name, group.size, nodes=nodes)) for name in names}
    return [LIBRARY, *shared, *(name for i, name in enumerate(names)
                                if kinds[name] not in [kinds[other] for other in names[:i]])]


def _once(comm, call):
    comm.Barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

"""Measures the fastest algorithm for each collective and size: a group's decision table."""

import math
import time
from itertools import pairwise

import numpy as np
import torch

from mpillm import plan
from mpillm.comm import collectives
from mpillm.comm.progress import finish
from mpillm.plan import ANY, DEFAULT_TABLE, DecisionTable
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
_BISECTIONS = 2
_LINE_BYTES = 64


def measure_table(group, operations=OPERATIONS, sizes_bytes=SIZES_BYTES, dtype=torch.float32, budget_s=0.02):
    """Measure which algorithm is fastest for each operation and size on tensors of a rank's own.

    Collective over ``group``; all ranks return the same table. About ``budget_s`` for every operation, size and
    algorithm, and more for those that come near the best. Of near-equals the first of :func:`candidates` is taken. An
    algorithm that took far longer than the best of a size is not tried at the next; where the winner changes
    between two sizes, it is looked up between them. Nothing is measured beyond a size that takes :data:`_SLOW_S`. What
    another size or operation does clearly faster is done by that (:func:`mpillm.schedules.repair.repair`). The rows
    hold for every dtype, because bytes take the time; operations that are not measured keep the rows of
    :data:`mpillm.plan.DEFAULT_TABLE`.
    """
    measured, deciders = {}, {}
    for op in operations:
        members = {name: group.with_table(only(name)) for name in candidates(op, group)}

        def fastest(n_bytes, names, op=op, members=members):
            return _fastest(group, op, n_bytes, {name: members[name] for name in names}, dtype, budget_s)

        alive, measured[op], deciders[op] = list(members), {}, fastest
        for size in sizes_bytes:
            winner, alive, best_s = fastest(size, alive)
            measured[op][size] = winner, best_s
            if best_s > _SLOW_S:
                break
    chosen = repair(measured)
    others = tuple(row for row in DEFAULT_TABLE.rows if row[0] not in operations)
    return DecisionTable(tuple(row for op in operations for row in _limits(op, chosen[op], deciders[op])) + others)


def _fastest(group, op, n_bytes, members, dtype, budget_s):
    """Return the fastest of some algorithms, the first of near-equals; those not far behind; and the best time."""
    x = torch.empty(max(group.size, n_bytes // dtype.itemsize), dtype=dtype).fill_(0)
    out = torch.zeros(len(x) + group.size, dtype=dtype)
    calls = {name: make_call(op, x, member, out) for name, member in members.items()}
    median_s = medians(time_calls(group.comm, calls, budget_s))
    near = {name: calls[name] for name, median in median_s.items() if median <= _NEAR * min(median_s.values())}
    if len(near) > 1:
        median_s |= medians(time_calls(group.comm, near, _AGAIN * budget_s, repeats=(9, 400)))
    best = min(median_s[name] for name in near)
    winner = next(name for name in near if _TIE * median_s[name] <= best)
    return winner, [name for name in members if median_s[name] <= _FAR * best + _FAR_S], best


def medians(times):
    """Return the median of every function that :func:`time_calls` measured. Local."""
    return {name: float(np.median(own)) for name, own in times.items()}


def _limits(op, chosen, fastest):
    """Return the rows of a table: where the choice changes between two sizes, the limit is bisected in the logarithm of
    the size if both were measured; else it is half way."""
    rows, sizes_bytes = [], list(chosen)
    for low, high in pairwise(sizes_bytes):
        below, above = chosen[low], chosen[high]
        if below == above:
            continue
        are_measured = not any(Algorithm.parse(choice).is_repaired for choice in (below, above))
        for _ in range(_BISECTIONS if are_measured else 0):
            middle = int(math.sqrt(low * high)) // _LINE_BYTES * _LINE_BYTES
            is_higher = fastest(middle, (below, above))[0] == below
            low, high = (middle, high) if is_higher else (low, middle)
        rows.append((op, ANY, ANY, int(math.sqrt(low * high)), below))
    return [*rows, (op, ANY, ANY, None, chosen[sizes_bytes[-1]])]


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
    cuts = all_bounds(len(x), group.size)
    n_bytes = x.numel() * x.element_size()
    if op == "allreduce":
        return lambda: collectives.allreduce(x, group, out=x)
    if op == "reduce_scatter":
        return lambda: collectives.reduce_scatter_blocks(x, group)
    if op == "allgather":
        return lambda: collectives.allgather_blocks(x, group)
    if op == "bcast":
        return lambda: finish(group.transport(op, x.dtype, n_bytes).bcast(x, 0))
    mine = cuts[group.rank][1] - cuts[group.rank][0]
    arrivals = [(rank * mine, (rank + 1) * mine) for rank in range(group.size)]
    return lambda: finish(group.transport(op, x.dtype, n_bytes).alltoall(x, out[:arrivals[-1][1]], cuts, arrivals))


def only(algorithm):
    """Return the table that takes ``algorithm`` for all operations that have it."""
    return DecisionTable(tuple((op, ANY, ANY, None, algorithm) for op in plan.OPERATIONS
                               if algorithm in (LIBRARY, WINDOW, *ALGORITHMS[op])))


def candidates(op, group):
    """Return the algorithms that ``group`` could take for ``op``, simple ones first; of those that come to the same
    for its number of ranks only one."""
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

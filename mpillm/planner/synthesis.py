"""Makes a pipeline schedule for given times of forward, input and weight halves, within a memory limit."""

from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import accumulate, product

import numpy as np

from mpillm.errors import ConfigError
from mpillm.planner.timeline import play
from mpillm.schedules.pipeline import Action, PipelineSchedule, make_schedule

PATIENCE = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried shares of a weight half that a rank may idle instead of running it
TEXTBOOK = ("1f1b", "zb-h1", "zb-h2")


def synthesise(num_ranks, num_microbatches, forward_s, input_s, weight_s, message_s=0.0, memory_limit=None,
               weight_memory=1.0, link_s=0.0):
    """Return the fastest pipeline schedule found, one stage a rank, and how it plays.

    Local. Candidates are the textbook's that fit the memory, and list schedules: a clock runs over all ranks, and a
    rank that is free takes what has come and is the most urgent. Each answers two questions differently: whether a
    forward or an input half goes first, and how long a rank should rather wait for a message than start a weight half
    (Qi et al. 2024 ask the same). All are played with the times given, the shortest wins.

    Parameters
    ----------
    num_ranks, num_microbatches : int
    forward_s, input_s, weight_s, message_s, link_s : float or sequence of float
        As for :func:`mpillm.planner.timeline.play`.
    memory_limit : int, optional
        The most microbatches a rank may hold whose forward has run and whose weight half has not ended; left out,
        twice the ranks.
    weight_memory : float
        What share of a microbatch's memory its weight half still needs once its input half has run. 1 counts whole
        microbatches; published zero-bubble schedules count less (``32 / (34 + 5 heads seq / hidden)`` for a GPT layer).

    Returns
    -------
    Timeline
        Its ``schedule`` is named ``auto``.

    Raises
    ------
    ConfigError
        If the limit is below one.

    Notes
    -----
    Cost: a dozen plays, each of ``3 * num_ranks * num_microbatches`` actions. A heuristic, never worse than the
    textbook's. With whole microbatches counted and equal ranks no schedule beats
    ``M (F+I+W) + (P-1)(F+I+2C) - (K-1) W``: when the last rank ends its last input half, at most ``K`` of its weight
    halves are left, and the message still has the way to the first rank before it. The list schedules reach it.
    """
    limit = 2 * num_ranks if memory_limit is None else memory_limit
    if limit < 1:
        raise ConfigError(f"memory limit {limit}: a rank holds at least the one microbatch it works on; give 1 or more")
    times = [np.broadcast_to(t, num_ranks).tolist() for t in (forward_s, input_s, weight_s)]
    between = np.broadcast_to(message_s, max(1, num_ranks - 1)).tolist()
    found = [make_schedule(name, num_ranks, num_microbatches) for name in TEXTBOOK]
    found += [_list_schedule(num_microbatches, times, between, link_s, limit, weight_memory, *knobs)
              for knobs in product(PATIENCE, (True, False))]
    played = [play(schedule, *times, between, link_s) for schedule in found]
    fitting = [t for t in played if memory_max(t.schedule, weight_memory) <= limit + 1e-9]
    best = min(fitting, key=lambda t: (t.makespan_s, t.total_s))
    return replace(best, schedule=replace(best.schedule, name="auto"))


def memory_max(schedule, weight_memory):
    """Return the most memory that a rank holds, as :func:`synthesise` counts it.

    Local.

    Parameters
    ----------
    schedule : PipelineSchedule
    weight_memory : float
        What a microbatch whose input half has run still holds, as a share of a whole one.

    Returns
    -------
    float
        In microbatches.
    """
    change = {"F": 1, "I": weight_memory - 1, "W": -weight_memory, "B": -1}
    return max(max(accumulate(change[action.kind] for action in row)) for row in schedule.actions)


def _list_schedule(num_microbatches, times, between, link_s, limit, weight_memory, patience, input_first):
    """Return the schedule that comes about when every free rank takes the most urgent action that has come."""
    ranks = len(times[0])
    ahead = _depths(times, between, limit)
    rows = [[] for _ in range(ranks)]
    done = [dict.fromkeys("FIW", 0) for _ in range(ranks)]
    come = [{"F": [], "I": []} for _ in range(ranks)]  # when each next message is there
    come[0]["F"] = [0.0] * num_microbatches
    link_free = {}
    idle, events = set(), [(0.0, rank) for rank in range(ranks)]
    heapify(events)

    def choose(rank, now):
        """Return a kind, or None to wait, and when the next message comes that is on its way."""
        f, i, w = done[rank].values()
        is_full = f - i + weight_memory * (i - w) + 1 > limit + 1e-9
        may_forward = f < num_microbatches and not is_full and f - i < ahead[rank]
        arrivals = {"I": come[rank]["I"][i] if i < len(come[rank]["I"]) else None,
                    "F": come[rank]["F"][f] if may_forward and f < len(come[rank]["F"]) else None}
        first, second = "IF" if input_first or f - i >= ahead[rank] - 1 else "FI"
        for kind in (first, second):
            if arrivals[kind] is not None and arrivals[kind] <= now:
                return kind, None
        next_s = min((at for at in arrivals.values() if at is not None), default=None)
        if w < i and (is_full and f < num_microbatches or next_s is None or next_s - now >= patience * times[2][rank]):
            return "W", None
        return None, next_s

    while events:
        now, rank = heappop(events)
        idle.discard(rank)
        kind, next_s = choose(rank, now)
        if kind is None:
            if next_s is None:
                idle.add(rank)
            else:
                heappush(events, (next_s, rank))
            continue
        end = now + times["FIW".index(kind)][rank]
        rows[rank].append(Action(rank, kind, done[rank][kind]))
        done[rank][kind] += 1
        heappush(events, (end, rank))
        if kind == "F" and rank == ranks - 1:
            come[rank]["I"].append(end)
        to = rank + {"F": 1, "I": -1, "W": ranks}[kind]
        if 0 <= to < ranks:
            leaves = max(end, link_free.get((rank, to), 0.0))
            link_free[rank, to] = leaves + link_s
            come[to][kind].append(leaves + between[min(rank, to)])
            if to in idle:
                heappush(events, (now, to))
                idle.discard(to)
    return PipelineSchedule("list", ranks, ranks, num_microbatches, tuple(map(tuple, rows)))


def _depths(times, between, limit):
    """Return how many forwards each rank may be ahead of its input halves: as fill the way to the end and back."""
    forward, input_, _ = times
    depths = []
    for rank in range(len(forward)):
        way = sum(forward[rank:]) + sum(input_[rank + 1:]) + 2 * sum(between[rank:len(forward) - 1])
        depths.append(min(limit, max(1, -int(-way // max(forward[rank], 1e-12)) + 1)))
    return depths

"""Plays a step on one clock: who computes, sends and reduces when, the bubble, the path that decides how long it takes.

Between ranks there are messages; beside its actions a rank has buckets of gradients, which are reduced over the data
axis. These take part of its processor and, where both go over the same network, of its link.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from mpillm.errors import ScheduleError
from mpillm.schedules.check import HELD
from mpillm.schedules.pipeline import Action


class BucketTimes(NamedTuple):
    """Gradients of a stage that are reduced together as soon as they are complete.

    ``left_s`` is what the stage's last action has still to compute then, ``time_s`` what the reduction takes where the
    link is its own, ``busy_s`` what it takes of the processor meanwhile, at most all of it.
    """

    n_bytes: float
    left_s: float
    time_s: float
    busy_s: float


@dataclass
class Transfer:
    """A bucket under way: its stage, its number there, when; and what share of the processor it takes."""

    stage: int
    number: int
    start_s: float
    end_s: float
    share: float

    def __str__(self):
        return f"bucket {self.number} of stage {self.stage}"


class PathPart(NamedTuple):
    """A part of the path that decides how long a step takes: an :class:`Action` or a :class:`Transfer` of a rank."""

    rank: int
    what: object
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """When every action of a schedule starts and ends, and every bucket of gradients beside them.

    Attributes
    ----------
    schedule : PipelineSchedule
    starts_s, ends_s : tuple of ndarray
        For every rank, in the order of its actions.
    transfers : tuple of list of Transfer
        For every rank, in their order.
    """

    schedule: object
    starts_s: tuple
    ends_s: tuple
    transfers: tuple

    @cached_property
    def in_flight_max(self):
        """For every rank the most (stage, microbatch) pairs whose forward has run and whose ``B`` or ``W`` has not."""
        return tuple(int(np.cumsum([HELD[action.kind] for action in row]).max()) for row in self.schedule.actions)

    @property
    def spans_s(self):
        """For every rank the time from its first start to its last end."""
        return np.array([ends[-1] - starts[0] for starts, ends in zip(self.starts_s, self.ends_s)])

    @property
    def busy_s(self):
        """For every rank the time it computes."""
        return np.array([(ends - starts).sum() for starts, ends in zip(self.starts_s, self.ends_s)])

    @property
    def makespan_s(self):
        """The longest time of a rank from its first start to its last end."""
        return float(self.spans_s.max())

    @property
    def total_s(self):
        """The time from the first start of any rank to the last end of any action."""
        return float(max(ends[-1] for ends in self.ends_s))

    @property
    def reduced_s(self):
        """The time from the first start of any rank until the last bucket of any has arrived as well."""
        return max([self.total_s, *(transfers[-1].end_s for transfers in self.transfers if transfers)])

    @property
    def bubble_fraction(self):
        """What share of its span the rank of the longest span idles (Qi et al. 2024)."""
        rank = int(self.spans_s.argmax())
        return max(0.0, float(1 - self.busy_s[rank] / self.spans_s[rank]))

    @property
    def idle_s(self):
        """For every rank the time of :attr:`total_s` in which it computes nothing."""
        return self.total_s - self.busy_s

    def critical_path(self):
        """Return what decides :attr:`reduced_s`, first to last: a list of :class:`PathPart`.

        Local. Each starts when the one before it has ended, on the same rank, or its message has come; a transfer
        when its gradients are complete, and what was on the link before has left it.
        """
        rank = int(np.argmax([ends[-1] for ends in self.ends_s]))
        last, transfers = len(self.ends_s[rank]) - 1, []
        if self.reduced_s > self.total_s:
            rank = int(np.argmax([transfers[-1].end_s if transfers else 0.0 for transfers in self.transfers]))
            transfers = self.transfers[rank]
            first = len(transfers) - 1
            while first > 0 and transfers[first - 1].end_s >= transfers[first].start_s:
                first -= 1
            last = _completing(self.schedule.actions[rank])[transfers[first].stage]
            transfers = transfers[first:]
        path = self._path_to(rank, last)
        if transfers:  # they start before the action ends
            path[-1] = path[-1]._replace(end_s=min(path[-1].end_s, transfers[0].start_s))
        return path + [PathPart(rank, transfer, transfer.start_s, transfer.end_s) for transfer in transfers]

    @property
    def critical_s(self):
        """The seconds of :meth:`critical_path` in which ranks compute, messages and buckets are under way."""
        computing_s = transfers_s = 0.0
        for step in self.critical_path():
            is_transfer = isinstance(step.what, Transfer)
            computing_s += 0.0 if is_transfer else step.end_s - step.start_s
            transfers_s += step.end_s - step.start_s if is_transfer else 0.0
        return computing_s, max(0.0, self.reduced_s - computing_s - transfers_s), transfers_s

    def _path_to(self, rank, i):
        """Return the steps that decide when action ``i`` of a rank ends, first to last."""
        rows, num_stages = self.schedule.actions, self.schedule.num_stages
        places = {action: (rank, i) for rank, row in enumerate(rows) for i, action in enumerate(row)}
        path = []
        while True:
            path.append(PathPart(rank, rows[rank][i], float(self.starts_s[rank][i]), float(self.ends_s[rank][i])))
            source = _source(rows[rank][i], num_stages, places)
            follows_own = i > 0 and self.ends_s[rank][i - 1] >= self.starts_s[rank][i]
            if not follows_own and source is not None:
                rank, i = places[source]
            elif i > 0:
                i -= 1
            else:
                return path[::-1]


def play(schedule, forward_s, input_s, weight_s, message_s=0.0, link_s=0.0, buckets=(), shares_link=False):
    """Play a schedule: every action as soon as its rank is free and what it needs has come.

    Local. Cost: one look at every action, and beside those at the end of a rank's at its buckets.

    Parameters
    ----------
    schedule : PipelineSchedule
    forward_s, input_s, weight_s : float or sequence of float
        Seconds of ``F``, ``I`` and ``W`` of a stage and microbatch; a sequence gives one for every stage. ``B`` takes
        the sum of the last two.
    message_s : float or sequence of float
        Seconds from the end of an action until another rank has its result; a sequence gives one for every boundary
        between a stage and the next.
    link_s : float
        How many of these a message keeps the link between two ranks to itself: another the same way starts after them.
    buckets : sequence of sequence of BucketTimes, optional
        Of every stage, in the order of its backward. A rank's follow each other. While one is under way, the rank
        computes with what it leaves of the processor.
    shares_link : bool
        Whether buckets and messages leave a rank the same way. A message that finds a bucket under way gets half of
        it, as does the bucket; a bucket that finds a message waits for it.

    Returns
    -------
    Timeline

    Raises
    ------
    ScheduleError
        If ranks wait for each other for ever.
    """
    stages, ranks, rows = schedule.num_stages, schedule.num_ranks, schedule.actions
    forward, input_, weight = (np.broadcast_to(t, stages).tolist() for t in (forward_s, input_s, weight_s))
    if ranks == 1:
        message_s = link_s = 0.0
    boundary = np.broadcast_to(message_s, max(1, stages - 1)).tolist()
    durations = {"F": forward, "I": input_, "W": weight, "B": [a + b for a, b in zip(input_, weight)]}
    starts, ends = [[] for _ in rows], [[] for _ in rows]
    beside = [_Beside(row, buckets) for row in rows]
    free, arrived, link_free = [0.0] * ranks, {}, [{} for _ in rows]
    waiting, ready = {}, list(range(ranks))
    while ready:
        rank = ready.pop()
        own_starts, own_ends, now = starts[rank], ends[rank], free[rank]
        own_links, reducing = link_free[rank], beside[rank]
        for i, action in enumerate(rows[rank][len(own_ends):], len(own_ends)):
            stage, kind, microbatch = action.stage, action.kind, action.microbatch
            needs_other = stage > 0 if kind == "F" else kind != "W" and stage < stages - 1
            if needs_other:
                come = arrived.get((stage, kind == "F", microbatch))
                if come is None:
                    waiting[stage, kind == "F", microbatch] = rank
                    break
                now = max(now, come)
            own_starts.append(now)
            if i < reducing.begins:
                now += durations[kind][stage]
            else:
                now = reducing.compute(now, durations[kind][stage], i, stage, own_links if shares_link else {})
            own_ends.append(now)
            to = stage + 1 if kind == "F" else stage - 1
            if kind != "W" and 0 <= to < stages:
                key, link = (to, kind == "F", microbatch), to % ranks
                leaves = max(now, own_links.get(link, 0.0))
                if shares_link and i >= reducing.begins:
                    leaves = reducing.send(leaves, link_s)
                own_links[link] = leaves + link_s
                arrived[key] = leaves + boundary[min(stage, to)]
                if key in waiting:
                    ready.append(waiting.pop(key))
        free[rank] = now
    stuck = [rank for rank, row in enumerate(rows) if len(ends[rank]) < len(row)]
    if stuck:
        raise ScheduleError(f"schedule {schedule.name}: ranks {stuck} would wait for ever: see mpillm.schedules.check")
    return Timeline(schedule, tuple(map(np.array, starts)), tuple(map(np.array, ends)),
                    tuple(rank.transfers for rank in beside))


def unhindered_s(schedule, forward_s, input_s, weight_s):
    """Return for every stage when its gradients are complete if no rank ever waits.

    Local. Arguments as for :func:`play`, times for every stage.
    """
    kinds, found = {"F": (forward_s,), "I": (input_s,), "W": (weight_s,), "B": (input_s, weight_s)}, {}
    for row in schedule.actions:
        ends = list(accumulate(sum(times[action.stage] for times in kinds[action.kind]) for action in row))
        found |= {stage: ends[i] for stage, i in _completing(row).items()}
    return [found[stage] for stage in range(schedule.num_stages)]


class _Beside:
    """What a rank reduces beside its actions: one bucket after the other, from action ``begins`` of its row on."""

    def __init__(self, row, buckets):
        self.transfers, self._buckets, self._free_s = [], buckets, 0.0
        self._completing = _completing(row) if buckets else {}
        self.begins = min(self._completing.values(), default=len(row))

    def compute(self, now, work_s, i, stage, links):
        """Return when action ``i`` of the row ends that begins now; begin the buckets that it completes once all
        messages, of which ``links`` says when they are free, have left."""
        if self._completing.get(stage) == i:
            for number, bucket in enumerate(self._buckets[stage]):
                now, work_s = self._pass(now, max(0.0, work_s - bucket.left_s)), min(work_s, bucket.left_s)
                start_s = max(now, self._free_s, *links.values())
                self._free_s = start_s + bucket.time_s
                share = min(1.0, bucket.busy_s / bucket.time_s) if bucket.time_s else 0.0
                self.transfers.append(Transfer(stage, number, start_s, self._free_s, share))
        return self._pass(now, work_s)

    def send(self, now, link_s):
        """Return when a message would have left that leaves now, were the link its own: while a transfer is under way
        both get half of it."""
        both_s = min(link_s, max(0.0, self._free_s - now))
        for transfer in self.transfers:
            transfer.start_s += min(both_s, max(0.0, transfer.start_s - now))
            transfer.end_s += min(both_s, max(0.0, transfer.end_s - now))
        self._free_s += both_s
        return now + both_s

    def _pass(self, now, work_s):
        """Return when so much work is done that begins now."""
        for transfer in self.transfers:
            if transfer.end_s <= now:
                continue
            before_s = min(work_s, max(0.0, transfer.start_s - now))
            now, work_s = now + before_s, work_s - before_s
            if work_s <= (transfer.end_s - now) * (1 - transfer.share):
                return now + (work_s / (1 - transfer.share) if work_s else 0.0)
            now, work_s = transfer.end_s, work_s - (transfer.end_s - now) * (1 - transfer.share)
        return now + work_s


def _completing(row):
    """Return for every stage of a rank's row the place of the action that completes its gradients."""
    return {action.stage: i for i, action in enumerate(row) if action.kind in "BW"}


def _source(action, num_stages, places):
    """Return the action of another stage that this one waits for, or ``None``."""
    if action.kind == "F":
        return Action(action.stage - 1, "F", action.microbatch) if action.stage else None
    if action.kind == "W" or action.stage == num_stages - 1:
        return None
    sources = (Action(action.stage + 1, kind, action.microbatch) for kind in "BI")
    return next(source for source in sources if source in places)

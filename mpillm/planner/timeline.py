"""Plays a pipeline schedule on a clock: who computes when, the bubble, and the path that decides how long it takes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpillm.errors import ScheduleError
from mpillm.schedules.check import HELD
from mpillm.schedules.pipeline import Action


@dataclass(frozen=True)
class Timeline:
    """When every action of a schedule starts and ends.

    Attributes
    ----------
    schedule : PipelineSchedule
    starts_s, ends_s : tuple of ndarray
        For every rank, in the order of its actions.
    """

    schedule: object
    starts_s: tuple
    ends_s: tuple

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
        """The time from the first start of any rank to the last end of any."""
        return float(max(ends[-1] for ends in self.ends_s) - min(starts[0] for starts in self.starts_s))

    @property
    def bubble_fraction(self):
        """What share of its span the rank of the longest span idles (Qi et al. 2024)."""
        rank = int(self.spans_s.argmax())
        return float(1 - self.busy_s[rank] / self.spans_s[rank])

    @property
    def idle_s(self):
        """For every rank the time of :attr:`total_s` in which it computes nothing."""
        return self.total_s - self.busy_s

    def critical_path(self):
        """Return the actions, first to last, without which the end could come earlier: a list of (rank, Action).

        Local. Each starts when the one before it has ended, on the same rank, or its message has come.
        """
        rows, num_stages = self.schedule.actions, self.schedule.num_stages
        places = {action: (rank, i) for rank, row in enumerate(rows) for i, action in enumerate(row)}
        rank = int(np.argmax([ends[-1] for ends in self.ends_s]))
        i, path = len(rows[rank]) - 1, []
        while True:
            path.append((rank, rows[rank][i]))
            source = _source(rows[rank][i], num_stages, places)
            follows_own = i > 0 and self.ends_s[rank][i - 1] >= self.starts_s[rank][i]
            if not follows_own and source is not None:
                rank, i = places[source]
            elif i > 0:
                i -= 1
            else:
                return path[::-1]


def play(schedule, forward_s, input_s, weight_s, message_s=0.0, link_s=0.0):
    """Play a schedule: every action as soon as its rank is free and what it needs has come.

    Local. Cost: one look at every action.

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
    boundary = np.broadcast_to(message_s, max(1, stages - 1)).tolist() if ranks > 1 else [0.0] * stages
    durations = {"F": forward, "I": input_, "W": weight, "B": [a + b for a, b in zip(input_, weight)]}
    starts, ends = [[] for _ in rows], [[] for _ in rows]
    free, arrived, link_free = [0.0] * ranks, {}, {}
    waiting, ready = {}, list(range(ranks))
    while ready:
        rank = ready.pop()
        row, own_starts, own_ends, now = rows[rank], starts[rank], ends[rank], free[rank]
        for action in row[len(own_ends):]:
            stage, kind, microbatch = action.stage, action.kind, action.microbatch
            needs_other = stage > 0 if kind == "F" else kind != "W" and stage < stages - 1
            if needs_other:
                come = arrived.get((stage, kind == "F", microbatch))
                if come is None:
                    waiting[stage, kind == "F", microbatch] = rank
                    break
                now = max(now, come)
            own_starts.append(now)
            now += durations[kind][stage]
            own_ends.append(now)
            to = stage + 1 if kind == "F" else stage - 1
            if kind != "W" and 0 <= to < stages:
                key, link = (to, kind == "F", microbatch), (rank, to % ranks)
                leaves = max(now, link_free.get(link, 0.0))
                link_free[link] = leaves + link_s
                arrived[key] = leaves + boundary[min(stage, to)]
                if key in waiting:
                    ready.append(waiting.pop(key))
        free[rank] = now
    stuck = [rank for rank, row in enumerate(rows) if len(ends[rank]) < len(row)]
    if stuck:
        raise ScheduleError(f"schedule {schedule.name}: ranks {stuck} would wait for ever: see mpillm.schedules.check")
    return Timeline(schedule, tuple(map(np.array, starts)), tuple(map(np.array, ends)))


def _source(action, num_stages, places):
    """Return the action of another stage that this one waits for, or ``None``."""
    if action.kind == "F":
        return Action(action.stage - 1, "F", action.microbatch) if action.stage else None
    if action.kind == "W" or action.stage == num_stages - 1:
        return None
    sources = (Action(action.stage + 1, kind, action.microbatch) for kind in "BI")
    return next(source for source in sources if source in places)

"""Plays a collective schedule on a machine: when each rank is done, and what every link carries."""

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush

from mpillm.schedules.check_collective import check_collective


@dataclass(frozen=True)
class PlayedCollective:
    """A collective on a clock.

    Attributes
    ----------
    ends_s : tuple of float
        When each rank is done.
    bytes_per_link : dict of (int, int) to int
        By source and target rank.
    """

    ends_s: tuple
    bytes_per_link: dict

    @property
    def total_s(self):
        """When the last rank is done."""
        return max(self.ends_s)


def play_collective(schedule, machine, n_bytes):
    """Play a collective schedule: a message starts as soon as both ranks are in its round.

    Local. A message takes the latency and the rate of the innermost level that holds both ranks, which follow each
    other level by level (Hockney 1994). The messages of a round that leave a rank share its way out, those that come
    share its way in: each takes as long as the longer of all that leaves its source and all that comes to its target.
    What is added when it arrives takes the level's ``gamma_s_per_byte`` longer.

    Parameters
    ----------
    schedule : CollectiveSchedule
        Checked before it is played.
    machine : Machine
    n_bytes : int
        Of the whole vector.

    Returns
    -------
    PlayedCollective

    Raises
    ------
    ScheduleError
        If the schedule does not do what it says.
    """
    check_collective(schedule)
    return _Play(schedule, machine, n_bytes).run()


class _Play:
    """The clock of every rank. A message is known by source, target and its number between the two."""

    def __init__(self, schedule, machine, n_bytes):
        ranks = schedule.num_ranks
        self.schedule, self.machine = schedule, machine
        self.sizes = [high - low for low, high in schedule.bounds(n_bytes)]
        self.now, self.out_s, self.in_s = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
        self.posted = [()] * ranks
        self.offers, self.arrivals, self.waiting = {}, {}, {}
        self.numbers, self.carried = Counter(), Counter()
        self.ready = [(0.0, rank) for rank in range(ranks)]

    def run(self):
        """Play to the end."""
        steps = [iter(rounds) for rounds in self.schedule.rounds]
        while self.ready:
            _, rank = heappop(self.ready)
            while self._has_met(rank):
                self.now[rank] = max([self.now[rank], *(self.arrivals[message] for message in self.posted[rank])])
                following = next(steps[rank], None)
                if following is None:
                    break
                self._post(rank, following)
        return PlayedCollective(tuple(self.now), dict(self.carried))

    def _has_met(self, rank):
        """Tell whether all messages of a rank's round have met their partner; if not, have it called by the next."""
        unmet = next((message for message in self.posted[rank] if message not in self.arrivals), None)
        if unmet is not None:
            self.waiting[unmet] = rank
        return unmet is None

    def _post(self, rank, steps):
        """Post the messages of a rank's next round."""
        self.posted[rank], self.out_s[rank], self.in_s[rank] = [], 0.0, 0.0
        for step in steps:
            if step.kind == "copy":
                continue
            is_send = step.kind == "send"
            pair = (rank, step.peer) if is_send else (step.peer, rank)
            self.posted[rank].append((*pair, self.numbers[pair, is_send]))
            self.numbers[pair, is_send] += 1
            n_bytes = sum(self.sizes[chunk] for chunk in step.chunks)
            level = self.machine.level_between(*pair)
            busy_s = level.message_s(n_bytes) - level.alpha_s
            busy_s += n_bytes * level.gamma_s_per_byte if step.kind == "reduce" else 0.0
            if is_send:
                self.out_s[rank] += busy_s
                self.carried[pair] += n_bytes
            else:
                self.in_s[rank] += busy_s
        for message in self.posted[rank]:
            if message not in self.offers:
                self.offers[message] = self.now[rank]
                continue
            source, target, _ = message
            start = max(self.offers[message], self.now[rank])
            self.arrivals[message] = (start + max(self.out_s[source], self.in_s[target])
                                      + self.machine.level_between(source, target).alpha_s)
            if message in self.waiting:
                other = self.waiting.pop(message)
                heappush(self.ready, (self.now[other], other))

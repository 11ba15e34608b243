"""Work dealt out among replicas as they have room: a counter that is read and raised from one side, the longest first.

Nobody waits for a manager: whoever has room takes the next number.
"""

import numpy as np

from mpillm.errors import MpillmError

NEXT = 0  # the counter that a dealer raises


class Counters:
    """Whole numbers, 0 at first, that every rank reads and raises while the others do something else.

    Collective over ``comm`` when made and when left; in between local.

    Parameters
    ----------
    comm : Comm
    count : int
    """

    def __init__(self, comm, count):
        self._values, self._window = np.zeros(count, np.int64), None
        if comm.size > 1:
            from mpi4py import MPI

            self._window = MPI.Win.Allocate(8 * count if comm.rank == 0 else 0, 8, comm=comm)
            if comm.rank == 0:
                np.frombuffer(self._window.tomemory(), np.int64)[:] = 0
            comm.Barrier()
            self._window.Lock_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._window is not None and (error[0] is None or issubclass(error[0], MpillmError)):  # which all ranks raise
            self._window.Unlock_all()
            self._window.Free()

    def add(self, index, amount):
        """Raise a counter; return what it was before."""
        if self._window is None:
            self._values[index] += amount
            return int(self._values[index]) - amount
        from mpi4py import MPI

        found = np.zeros(1, np.int64)
        self._window.Fetch_and_op(np.full(1, amount, np.int64), found, 0, index, MPI.SUM)
        self._window.Flush(0)
        return int(found[0])

    def read(self, index):
        """Return what a counter is."""
        return self.add(index, 0)


class Dealer:
    """Deals out the numbers of requests. Local.

    Parameters
    ----------
    counters : Counters
        Of all ranks; the first is raised.
    replicas : int
    costs : sequence of float
        Of every request, the same on every rank.
    batch : int
        Requests at most that a replica has at a time.
    """

    def __init__(self, counters, replicas, costs, batch):
        self._order = dealing_order(costs, replicas, batch)
        self._share = share_of(len(costs), replicas, batch)
        self._counters, self._dealt = counters, 0

    @property
    def is_done(self):
        """Whether all are dealt out."""
        return self._dealt >= len(self._order)

    def take(self, busy):
        """Return the number of a request for a replica that has ``busy`` of them, or None if it has enough for now."""
        if self.is_done or busy >= self._share:
            return None
        self._dealt = 1 + self._counters.add(NEXT, 1)
        return None if self._dealt > len(self._order) else self._order[self._dealt - 1]


def share_of(count, replicas, batch):
    """Return how many requests a replica has at a time: no more than its part, though it come first. Local."""
    return min(batch, -(-count // replicas))


def dealing_order(costs, replicas, batch):
    """Return the numbers of requests in the order in which they are dealt out, the dearest first.

    Local. A replica takes several at a time, so those that it takes together come from far apart: of each round of as many as
    all replicas have room for, every one gets its share of dear and of cheap ones.
    """
    order, share = sorted(range(len(costs)), key=lambda i: -costs[i]), share_of(len(costs), replicas, batch)
    rounds = [order[start:start + share * replicas] for start in range(0, len(order), max(1, share * replicas))]
    return [i for each in rounds for first in range(replicas) for i in each[first::replicas]]

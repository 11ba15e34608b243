"""Work dealt out among replicas as they have room: a counter that is read and raised from one side, the longest first.

Nobody waits for a manager. Whoever has room takes the next number; towards the end in smaller portions, so that all end at one
time.
"""

import numpy as np

from mpillm.errors import MpillmError

LEAST = 8  # requests that a replica has at a time, if there are so many


class Dealer:
    """Deals out the numbers of requests. Collective over the mesh when made and freed; :meth:`take` is local.

    Parameters
    ----------
    mesh : Mesh
    costs : sequence of float
        Of every request; the dearest go first.
    batch : int
        Requests at most that a replica has at a time.
    """

    def __init__(self, mesh, costs, batch):
        self._order = sorted(range(len(costs)), key=lambda i: -costs[i])
        self._replicas, self._batch, self._dealt, self._window = mesh.size("data"), batch, 0, None
        if self._replicas > 1:
            from mpi4py import MPI

            comm = mesh.world.comm
            self._window = MPI.Win.Allocate(8 if comm.rank == 0 else 0, 8, comm=comm)
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

    @property
    def is_done(self):
        """Whether all are dealt out."""
        return self._dealt >= len(self._order)

    def take(self, busy):
        """Return the number of a request for a replica that has ``busy`` of them, or None if it has enough for now."""
        left = len(self._order) - self._dealt
        if self.is_done or busy >= min(self._batch, max(LEAST, left // (2 * self._replicas))):
            return None
        self._dealt = 1 + self._read_and_raise()
        return None if self._dealt > len(self._order) else self._order[self._dealt - 1]

    def _read_and_raise(self):
        if self._window is None:
            return self._dealt
        from mpi4py import MPI

        found = np.zeros(1, np.int64)
        self._window.Fetch_and_op(np.ones(1, np.int64), found, 0, 0, MPI.SUM)
        self._window.Flush(0)
        return int(found[0])

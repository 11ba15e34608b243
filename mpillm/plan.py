"""What a run obeys: so far, which implementation each collective takes."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from mpillm.errors import ConfigError

ANY = "*"
LIBRARY, WINDOW, TWO_LEVEL = "mpi", "window", "two_level"


@dataclass(frozen=True)
class DecisionTable:
    """Which algorithm a collective takes: that of the first row, by size, that the message fits into.

    Attributes
    ----------
    rows : tuple of (op, axis, dtype, up_to_bytes, algorithm)
        ``axis`` and ``dtype`` may be ``"*"``; rows that name the dtype go before those that name the axis, these before
        the others. ``up_to_bytes`` of the whole vector, ``None`` without a limit. ``algorithm`` is ``"mpi"`` (the MPI
        library's own), ``"window"`` (node-shared memory) or one of :data:`mpillm.schedules.generators.ALGORITHMS`;
        ``"two_level"`` takes shared memory inside nodes where it can.
    """

    rows: tuple

    def choose(self, op, axis, dtype, n_bytes):
        """Return the algorithm for a message; ``"mpi"`` where no row fits. Local."""
        for key in ((op, axis, dtype), (op, ANY, dtype), (op, axis, ANY), (op, ANY, ANY)):
            if key in self._limits:
                limits, algorithms = self._limits[key]
                return algorithms[bisect_left(limits, n_bytes)]
        return LIBRARY

    @cached_property
    def _limits(self):
        found = {}
        for op, axis, dtype, limit, algorithm in self.rows:
            limits, algorithms = found.setdefault((op, axis, dtype), ([], []))
            limits.append(float("inf") if limit is None else limit)
            algorithms.append(algorithm)
        for limits, algorithms in found.values():
            if limits != sorted(limits):
                raise ConfigError(f"decision table: limits {limits} of one operation are not in ascending order")
            if limits[-1] != float("inf"):
                limits.append(float("inf"))
                algorithms.append(LIBRARY)
        return found

    def to_dict(self):
        """Return the table as what JSON can hold."""
        return {"rows": [list(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, found):
        """Read what :meth:`to_dict` wrote."""
        return cls(tuple(tuple(row) for row in found["rows"]))


# Without a measured one: small messages by the library, others through shared memory where ranks share a node. The
# limit is where shared memory began to win for two ranks under MPICH 5.0.2.
OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall", "scatter", "gather")
DEFAULT_TABLE = DecisionTable(tuple(
    row for op in OPERATIONS for row in ((op, ANY, ANY, 1 << 18, LIBRARY), (op, ANY, ANY, None, WINDOW))
))

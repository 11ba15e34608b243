"""Counts what each rank sends: calls and bytes by axis and operation."""

from collections import Counter


class Recorder:
    """What this rank sent since :meth:`reset`, by ``(axis, operation)``.

    ``bytes`` counts what an operation must send at least, per rank: allreduce ``2 (p-1)/p n``, reduce_scatter and
    alltoall ``n`` less the own block, allgather ``(p-1)`` times the own block, a message its length, bcast ``n`` on the
    root.
    """

    def __init__(self):
        self.calls, self.bytes = Counter(), Counter()

    def add(self, axis, operation, n_bytes):
        """Count one call."""
        key = axis, operation
        self.calls[key] += 1
        self.bytes[key] += n_bytes

    def reset(self):
        """Start counting anew."""
        self.calls.clear()
        self.bytes.clear()

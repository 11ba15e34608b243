"""Counts what each rank sends: calls and bytes by axis and operation."""

from collections import Counter, deque


class Recorder:
    """What this rank sent since :meth:`reset`, by ``(axis, operation)``, and its last calls.

    ``bytes`` counts what an operation must send at least, per rank: allreduce ``2 (p-1)/p n``, reduce_scatter and
    alltoall ``n`` less the own block, allgather ``(p-1)`` times the own block, a message its length, bcast ``n`` on the
    root.
    """

    def __init__(self, keep=64):
        self.calls, self.bytes = Counter(), Counter()
        self.last = deque(maxlen=keep)

    def add(self, axis, operation, n_bytes):
        """Count one call."""
        self.calls[axis, operation] += 1
        self.bytes[axis, operation] += n_bytes
        self.last.append((axis, operation, n_bytes))

    def reset(self):
        """Start counting anew."""
        self.calls.clear()
        self.bytes.clear()

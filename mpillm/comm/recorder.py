"""What each rank did: bytes by axis and operation, the last calls, and checked mode."""

import sys
import time
from collections import Counter, deque
from pathlib import Path

from mpillm.errors import CollectiveError

KEPT = 512  # of the last calls
BETWEEN, RESTING = "between", "resting"  # outside of spans: within a step, and after it
_CALL, _SPAN = ("axis", "call", "number", "bytes"), ("kind", "name", "step")
_PACKAGE = str(Path(__file__).parent)


class Recorder:
    """What this rank sent since :meth:`reset`, by ``(axis, operation)``, and its last calls.

    ``sent_bytes`` counts what an operation must send at least, per rank: allreduce ``2 (p-1)/p n``, reduce_scatter and
    alltoall ``n`` less the own block, allgather ``(p-1)`` times the own block, a message its length, bcast ``n`` on the
    root.

    Attributes
    ----------
    kind : str
        Of the span that the rank is in, or :data:`BETWEEN` or :data:`RESTING`.
    ended : set of str
        Kinds of spans that came to their end.
    collective_s : float
        Time spent in blocking collectives.
    own_s : Counter
        By kind, time in spans that lie in no other, without :attr:`collective_s`: a rank's own work.
    step : int
    """

    def __init__(self):
        self._fresh, self._last = [], deque(maxlen=KEPT)
        self._calls, self._bytes, self._numbers, self._num_taken = Counter(), Counter(), Counter(), 0
        self.ended, self.step = set(), 0
        self.kind, self._open, self._outside = RESTING, [], RESTING
        self.collective_s, self.own_s = 0.0, Counter()

    def add(self, call):
        """Note a call, ``(axis, operation, n_bytes)``, which is counted later, because small messages would feel it."""
        fresh = self._fresh
        fresh.append((time.time(), call))
        if len(fresh) > KEPT:
            self._take_in()

    @property
    def beats(self):
        """How much was noted; grows as long as the rank makes progress."""
        return self._num_taken + len(self._fresh)

    @property
    def calls(self):
        """How often each was called: a Counter."""
        self._take_in()
        return Counter(self._calls)

    @property
    def sent_bytes(self):
        """What each sent, in bytes: a Counter."""
        self._take_in()
        return Counter(self._bytes)

    @property
    def last(self):
        """The last calls and spans, as dicts: ``at`` in seconds since 1970, and either ``axis call number bytes``, or ``kind
        name step`` of a span that began."""
        self._take_in()
        return [{"at": at, **dict(zip(names, values))} for at, names, values in self._last]

    def begin(self, kind, name):
        """Note that a span begins."""
        self._open.append((kind, time.perf_counter() - self.collective_s))
        self.kind = kind
        self.add((kind, name, self.step, _SPAN))

    def end(self, kind):
        """Note that a span has ended."""
        _, began_s = self._open.pop()
        if self._open:
            self.kind = self._open[-1][0]
        else:
            self.own_s[kind] += time.perf_counter() - self.collective_s - began_s
            self.kind = self._outside
        self.ended.add(kind)
        self._num_taken += 1

    def begin_step(self, number):
        """Note that a step begins: bytes are counted anew, and until its end the rank is watched outside of spans too."""
        self.reset()
        self.step, self.kind, self._outside = number, BETWEEN, BETWEEN
        self._num_taken += 1

    def end_step(self):
        """Note that what comes now is the caller's own work, which may take any time."""
        self.kind = self._outside = RESTING
        self._num_taken += 1

    def reset(self):
        """Start counting bytes anew."""
        self._take_in()
        self._calls.clear()
        self._bytes.clear()

    def _take_in(self):
        """Count what was noted, and keep the last of it."""
        fresh, self._fresh = self._fresh, []
        self._num_taken += len(fresh)
        for at, note in fresh:
            if note[-1] is _SPAN:
                self._last.append((at, _SPAN, note))
                continue
            axis, operation, n_bytes = note
            self._calls[axis, operation] += 1
            self._bytes[axis, operation] += n_bytes
            self._numbers[axis] += operation != "send"
            self._last.append((at, _CALL, (axis, operation, self._numbers[axis], n_bytes)))


class Checker:
    """Compares what the ranks of a group are about to do, before they do it.

    Collective over ``comm`` to make and to use. Operations that MPI would let meet, or hang in, meet here first: a
    mismatch is an error on every rank that names both calls.

    Parameters
    ----------
    comm : Comm
        Cloned; nothing else talks on the clone.
    axis : str
    """

    def __init__(self, comm, axis):
        self._comm, self._axis, self._number = comm.Clone(), axis, 0

    def check(self, operation, step, dtype=None, shape=(), root=None):
        """Raise on all ranks unless all call the same operation in the same step with the same dtype, shape and root.

        A rank that leaves out a call meets the others' next one; if that is alike it is found out when it comes to the
        next step, or to the end, before them.
        """
        self._number += 1
        calls = self._comm.allgather(((operation, step, str(dtype), tuple(shape), root), call_site()))
        other = next((rank for rank, (call, _) in enumerate(calls) if call != calls[0][0]), None)
        if other is not None:
            raise CollectiveError(f"checked collectives: call {self._number} of axis {self._axis} differs: "
                                  f"{_describe(0, *calls[0])}; {_describe(other, *calls[other])}")

    def free(self):
        """Release the communicator."""
        self._comm.Free()


def call_site():
    """Return file, line and function of the caller outside this package. Local."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _describe(rank, call, where):
    operation, step, dtype, shape, root = call
    what = "" if operation == "free" else f" of {dtype} {list(shape)}"
    to = "" if root is None else f" root {root}"
    return f"rank {rank} calls {operation}{what}{to} in step {step} at {where}"

"""Collectives bound to a tensor: made once, started again and again, as MPI's persistent ones."""

import time
from copy import copy

from mpillm.comm import collectives
from mpillm.comm.scheduled import BoundSchedule, Scheduled

KEPT_BYTES = 4 << 20  # of the largest tensor that schedules stay bound to: with larger ones it is no gain
_STARTS = {
    "allreduce": lambda x, group, may_block: collectives.iallreduce(x, group, out=x, may_block=may_block),
    "reduce_scatter": collectives.ireduce_scatter_blocks,
    "allgather": collectives.iallgather_blocks,
}


class Bound:
    """A collective on flat ``x`` where it lies; :meth:`mpillm.comm.group.Group.bind` makes it.

    Schedules keep their requests and scratch memory from the first start on, for tensors of up to :data:`KEPT_BYTES`;
    the MPI library and shared memory have nothing to keep.
    """

    def __init__(self, group, op, x):
        self._x, self._call, self._schedules, self._pending = x, _STARTS[op], {}, None
        self._choose = group.transport
        self._group = copy(group)  # which the operation sees, with schedules that stay bound
        self._group.transport = self._transport

    def start(self, may_block=False):
        """Begin, with what the tensor holds now; it must not be touched before :meth:`wait`.

        Collective over the group, in the same order as all its operations.

        Parameters
        ----------
        may_block : bool
            Whether it may take an algorithm that makes no progress by itself, such as shared memory.

        Returns
        -------
        Bound
            Itself.
        """
        self._pending = self._call(self._x, self._group, may_block)
        return self

    def is_started(self):
        """Tell whether it was started and not yet waited for. Local."""
        return self._pending is not None

    def test(self):
        """Let it progress; tell whether it has finished. Local."""
        return self._pending.test()

    def wait(self):
        """Block until it has finished; return what the operation returns. Local."""
        pending, self._pending = self._pending, None
        return pending.wait()

    def run(self):
        """Carry it out by the fastest algorithm, which may block, and return as :meth:`wait`. Collective."""
        start = time.perf_counter()
        result = self.start(may_block=True).wait()
        self._group.recorder.collective_s += time.perf_counter() - start
        return result

    def free(self):
        """Release what is kept, and let go of the tensor; it must have finished and is not to be started again. Local."""
        for schedule in self._schedules.values():
            schedule.free()
        self._schedules, self._x, self._group = {}, None, None

    def _transport(self, op, dtype, n_bytes, may_block=True):
        transport = self._choose(op, dtype, n_bytes, may_block)
        if not isinstance(transport, Scheduled) or n_bytes > KEPT_BYTES or self._x.is_cuda:
            return transport
        key = op, transport.algorithm
        if key not in self._schedules:
            self._schedules[key] = BoundSchedule(transport.schedules, transport.algorithm)
        return self._schedules[key]

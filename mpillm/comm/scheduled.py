"""Collectives by schedules, and the schedules that a group has under way."""

from functools import lru_cache, partial
from itertools import accumulate, groupby, pairwise
from operator import itemgetter

import torch

from mpillm.comm.buffers import is_within
from mpillm.comm.executor import Executor
from mpillm.comm.transport import KEPT_BYTES, Prepared
from mpillm.schedules.check_collective import check_collective
from mpillm.schedules.generators import make_collective

_NUM_TAGS = 1 << 14  # of executors that run once; those that are kept have as many more


class Schedules:
    """Runs schedules over the ranks of ``comm``, on a clone of it. Collective over ``comm`` to make and to free.

    Parameters
    ----------
    comm : Comm

    Attributes
    ----------
    nodes : tuple of int
        The node of every rank.
    """

    def __init__(self, comm):
        self.comm, self.num_started, self.num_kept, self._transports = comm.Clone(), 0, 0, {}
        self.nodes = nodes_of(self.comm)

    def transport(self, algorithm):
        """Return what carries out collectives by ``algorithm``.

        Local.

        Parameters
        ----------
        algorithm : str
            Of :data:`mpillm.schedules.generators.ALGORITHMS`.

        Returns
        -------
        Scheduled
        """
        if algorithm not in self._transports:
            self._transports[algorithm] = Scheduled(self, algorithm)
        return self._transports[algorithm]

    def make(self, schedule, carries, sizes, inputs, outputs, dtype, op, is_once=True, may_change_inputs=False):
        """Make ready what runs a schedule.

        Collective over the ranks.

        Parameters
        ----------
        schedule, carries, sizes, inputs, outputs, dtype, op, is_once, may_change_inputs
            As of :class:`Executor`.

        Returns
        -------
        Executor
        """
        self.num_started, self.num_kept = self.num_started + is_once, self.num_kept + (not is_once)
        tag = self.num_started % _NUM_TAGS if is_once else _NUM_TAGS + self.num_kept % _NUM_TAGS
        return Executor(schedule, carries, self.comm, sizes, inputs, outputs, dtype, op, tag, is_once, may_change_inputs)

    def free(self):
        """Release the communicator."""
        self.comm.Free()


def nodes_of(comm):
    """Return the node of every rank, named by the least rank on it.

    Collective over ``comm``.

    Returns
    -------
    tuple of int
    """
    if comm.size == 1:
        return (0,)
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.bcast(comm.rank)
    node.Free()
    return tuple(comm.allgather(first))


class Scheduled:
    """A :class:`~mpillm.comm.transport.Transport` by one algorithm; its requests are :class:`Executor` s.

    Parameters
    ----------
    schedules : Schedules
    algorithm : str
    is_bound : bool
        Whether operations return executors that were not started, to be started again and again.
    """

    def __init__(self, schedules, algorithm, is_bound=False):
        self.schedules, self.algorithm, self._is_bound = schedules, algorithm, is_bound
        self.rank, self.size = schedules.comm.rank, schedules.comm.size

    def bind(self, op, *arguments):
        """Return the executor of an operation on these arguments; for large ones, where keeping it is no gain, none."""
        if max(x.nbytes for x in arguments if isinstance(x, torch.Tensor)) > KEPT_BYTES:
            return Prepared(partial(getattr(self, op), *arguments))
        return getattr(Scheduled(self.schedules, self.algorithm, is_bound=True), op)(*arguments)

    def allreduce(self, x, out, op):
        schedule, carries = self._schedule("allreduce")
        cuts = schedule.bounds(len(x))
        return self._start(schedule, carries, cuts, _views(x, cuts), _views(out, cuts), x.dtype, op)

    def reduce_scatter(self, x, out, cuts, op):
        schedule, carries = self._schedule("reduce_scatter")
        cuts = _divided(cuts, schedule.targets, schedule.shares)
        low = min((start for (start, _), rank in zip(cuts, schedule.targets) if rank == self.rank))
        own = {c: out[start - low:stop - low] for c, (start, stop) in enumerate(cuts)
               if schedule.targets[c] == self.rank}
        return self._start(schedule, carries, cuts, _views(x, cuts), own, x.dtype, op, may_change_inputs=is_within(out, x))

    def allgather(self, x, out, cuts):
        schedule, carries = self._schedule("allgather")
        cuts = _divided(cuts, schedule.sources, schedule.shares)
        low = min((start for (start, _), rank in zip(cuts, schedule.sources) if rank == self.rank))
        own = {c: x[start - low:stop - low] for c, (start, stop) in enumerate(cuts)
               if schedule.sources[c] == self.rank}
        return self._start(schedule, carries, cuts, own, _views(out, cuts), x.dtype)

    def bcast(self, x, root):
        schedule, carries = self._schedule("bcast", root)
        cuts = schedule.bounds(len(x))
        views = _views(x, cuts)
        return self._start(schedule, carries, cuts, views if self.rank == root else {}, views, x.dtype)

    def alltoall(self, x, out, sends, receives):
        schedule, carries = self._schedule("alltoall")
        p, rank = self.size, self.rank
        give = {rank * p + other: x[slice(*cut)] for other, cut in enumerate(sends)}
        get = {other * p + rank: out[slice(*cut)] for other, cut in enumerate(receives)}
        return self._start(schedule, carries, list(sends) * p, give, get, x.dtype)

    def scatter(self, x, out, cuts, root):
        schedule, carries = self._schedule("scatter", root)
        give = _views(x, cuts) if self.rank == root else {}
        return self._start(schedule, carries, cuts, give, {self.rank: out}, out.dtype)

    def gather(self, x, out, cuts, root):
        schedule, carries = self._schedule("gather", root)
        get = _views(out, cuts) if self.rank == root else {}
        return self._start(schedule, carries, cuts, {self.rank: x}, get, x.dtype)

    def _schedule(self, op, root=0):
        return checked(op, self.algorithm, self.size, root, self.schedules.nodes)

    def _start(self, schedule, carries, cuts, inputs, outputs, dtype, op="sum", **options):
        sizes = [high - low for low, high in cuts]
        executor = self.schedules.make(schedule, carries, sizes, inputs, outputs, dtype, op, not self._is_bound, **options)
        return executor if self._is_bound else executor.start()


@lru_cache(maxsize=256)
def checked(op, algorithm, num_ranks, root, nodes):
    """Return a schedule, checked once, before it first runs, and what its messages carry.

    Local.

    Returns
    -------
    (CollectiveSchedule, tuple)
        The second is :attr:`~mpillm.schedules.check_collective.CollectiveReport.carries`.
    """
    schedule = make_collective(op, algorithm, num_ranks, root, nodes)
    return schedule, check_collective(schedule).carries


def _views(x, cuts):
    return {c: x[low:high] for c, (low, high) in enumerate(cuts)}


def _divided(cuts, owners, shares):
    """Return the cuts of chunks, which every rank owns one after the other: its block, divided by their shares."""
    return [(cuts[rank][0] + start * (cuts[rank][1] - cuts[rank][0]) // whole,
             cuts[rank][0] + stop * (cuts[rank][1] - cuts[rank][0]) // whole)
            for rank, start, stop, whole in _parts(owners, shares)]


@lru_cache(maxsize=256)
def _parts(owners, shares):
    """Return for every chunk its owner, where it starts and stops in the owner's block, and how long that is."""
    parts = []
    for rank, own in groupby(zip(owners, shares), itemgetter(0)):
        ends = list(accumulate((share for _, share in own), initial=0))
        parts += [(rank, start, stop, ends[-1]) for start, stop in pairwise(ends)]
    return parts

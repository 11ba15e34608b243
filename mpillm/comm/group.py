"""A communicator as mpillm uses it: cloned, named, with an order of sums, a decision table and a recorder."""

from bisect import bisect_left
from copy import copy
from functools import cached_property, partial

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.handover import Handover
from mpillm.comm.levels import Levels, make_levels
from mpillm.comm.library import Library
from mpillm.comm.recorder import Checker, Recorder
from mpillm.comm.repaired import repaired
from mpillm.comm.scheduled import Schedules
from mpillm.comm.shared import make_node
from mpillm.comm.single import SingleComm
from mpillm.plan import DEFAULT_TABLE
from mpillm.schedules.algorithm import LIBRARY, TWO_LEVEL, WINDOW, Algorithm

_keyval = None


class Group:
    """The ranks a collective runs over.

    Parameters
    ----------
    comm : Comm
        An mpi4py communicator that belongs to mpillm (a clone), or the one-rank stand-in.
    name : str
        The mesh axis, for records and messages.
    order : {"any", "tree"}
        Order of sums: that of the algorithm in use (repeatable for one rank count), or the fixed binary tree of
        :mod:`mpillm.schedules.tree`.
    recorder : Recorder, optional
        Where calls are counted.
    table : DecisionTable, optional
        Which algorithm each collective takes.
    is_checked : bool
        Compare what the ranks call before they do it (:class:`~mpillm.comm.recorder.Checker`).
    """

    def __init__(self, comm, name="world", order="any", recorder=None, table=DEFAULT_TABLE, is_checked=False):
        self.comm, self.name, self.order, self.table = comm, name, order, table
        self.recorder = Recorder() if recorder is None else recorder
        self.rank, self.size = comm.rank, comm.size
        self._checker = Checker(comm, name) if is_checked and comm.size > 1 else None
        self._libraries, self._choices = (Library(self, False), Library(self, True)), {}
        self.handover = None

    @cached_property
    def node(self):
        """The shared memory of these ranks, or None where they do not share a node. Collective on first use."""
        return make_node(self.comm)

    @cached_property
    def schedules(self):
        """What runs schedules over these ranks. Collective on first use."""
        return Schedules(self.comm)

    @cached_property
    def levels(self):
        """The nodes of these ranks and the lanes between them, or None where they do not form equal ones.

        Collective on first use.
        """
        return make_levels(self.comm, self.schedules.nodes)

    @property
    def memory(self):
        """The shared memory of those of these ranks that are on one node, if all of them or levels have it, or None.

        Collective on first use.
        """
        return self.node or (self.levels and self.levels.node)

    def open_handover(self, slot_bytes, num_slots):
        """Let messages of up to ``slot_bytes`` between ranks of one node be handed over in memory. Collective."""
        self.handover = Handover(self.comm, slot_bytes, num_slots)

    def with_table(self, table):
        """Return the same ranks under another decision table; communicators and memory are shared. Collective."""
        shared = {name: getattr(self, name) for name in ("node", "schedules", "levels")}  # made now, for both
        other = copy(self)
        other.__dict__.update(shared, table=table, _choices={})
        return other

    def transport(self, op, dtype, n_bytes, may_block=True, in_window=False):
        """Return the :class:`~mpillm.comm.transport.Transport` of ``op`` on ``n_bytes`` of ``dtype`` in all, which lie in
        a window or not.

        Collective on first use of a row of the table, which makes it. Shared memory makes no progress by itself, so
        nonblocking calls never take it, nor the library for sums of half types, of which it has only the messages. Sums
        in the fixed order alone always block.
        """
        key = op, dtype, may_block, in_window
        if key not in self._choices:  # kept, because small messages would feel the search
            limits, algorithms = self.table.choices(op, self.name, str(dtype).removeprefix("torch."), in_window)
            self._choices[key] = limits, list(algorithms)
        limits, made = self._choices[key]
        row = bisect_left(limits, n_bytes)
        if isinstance(made[row], Algorithm):
            made[row] = self._make_transport(made[row], op, dtype, may_block, in_window)
        return made[row]

    def _make_transport(self, algorithm, op, dtype, may_block, in_window):
        """Return what carries out ``op`` by the algorithm of a row, or what stands in for it here."""
        library, is_half_sum = self._libraries[may_block], dtype in HALF_TYPES and op in ("allreduce", "reduce_scatter")
        is_in_memory = may_block and algorithm.name in (WINDOW, TWO_LEVEL)
        if in_window and may_block and (is_in_memory or self.order == "tree" or is_half_sum):
            return self.node.in_window  # for these sums the library would exchange what is to be added
        if is_in_memory and self.node:
            return self.node.staging
        if self.order == "tree":
            return library
        if algorithm.name == LIBRARY:
            return library if may_block or not is_half_sum else self.schedules.transport("direct")
        if algorithm.is_repaired:
            return repaired(self, algorithm, op, dtype) if may_block else library
        if is_in_memory and op in Levels.operations and not is_half_sum and self.levels:  # these are rounded once
            return self.levels
        return library if algorithm.name == WINDOW else self.schedules.transport(algorithm.name)

    def holds(self, x):
        """Tell whether ``x`` lies in a window of these ranks. Local."""
        node = self.__dict__.get("node")  # made when the first window was
        return node is not None and node.holds(x)

    def bind(self, op, x, out=None, root=0):
        """Bind a collective to tensors, to be started again and again where they lie.

        Local; the same on all ranks.

        Parameters
        ----------
        op : {"allreduce", "reduce_scatter", "allgather", "bcast", "alltoall"}
            Sums are sums. Blocks are those of :mod:`mpillm.schedules.blocks`.
        x : Tensor
            Flat; of equal length and dtype on all ranks. Allgather takes the whole of which every rank fills its block,
            or with ``out`` the block.
        out : Tensor, optional
            Flat, for the result: as long as ``x`` for allreduce, this rank's block for reduce_scatter, the whole for
            allgather, all ranks' blocks for alltoall, which needs it. Without it the result lies in ``x``, of
            reduce_scatter in this rank's block, and the other blocks are destroyed.
        root : int
            Of bcast.

        Returns
        -------
        Bound

        Raises
        ------
        ConfigError, ShapeError
            On this rank, before any message, if ``op`` is another, or ``out`` does not fit.

        Notes
        -----
        A start costs some microseconds beside the message. Tensors on a GPU are staged anew each time, and bound in place
        only.
        """
        from mpillm.comm.bound import Bound  # which stands on the collectives, as they stand on groups

        return Bound(self, op, x, out, root)

    def enter(self, operation, n_bytes, x, shape=None, root=None, op=None):
        """Note a call of ``operation`` on ``x`` that sends ``n_bytes`` from this rank; in checked mode compare it with the
        others': dtype, shape, root and what a reduction computes must be the same on all."""
        self.recorder.add((self.name, operation, n_bytes))
        if self._checker:
            self._checker.check(f"{operation} {op}" if op else operation, self.recorder.step, x.dtype,
                                x.shape if shape is None else shape, root)

    def entrance(self, operation, n_bytes, x, **noted):
        """Return a function that does what :meth:`enter` does with these, the shortest way. Local."""
        if self._checker:
            return partial(self.enter, operation, n_bytes, x, **noted)
        return partial(self.recorder.add, (self.name, operation, n_bytes))

    @property
    def is_freed(self):
        """Whether :meth:`free` was called, on this group or on one that shares its communicator."""
        return not self.comm

    def free(self):
        """Release the shared memory and the communicator; once is enough. Collective."""
        if self.is_freed:
            return
        if self._checker:
            self._checker.check("free", self.recorder.step)
        for made in (self.__dict__.get(name) for name in ("handover", "levels", "node", "schedules")):
            if made is not None:
                made.free()
        if self._checker:
            self._checker.free()
        self.comm.Free()


def as_group(comm):
    """Return ``comm`` as a :class:`Group`: itself if it is one, else one over a clone that is kept with ``comm``.

    Collective over ``comm`` the first time a communicator is seen, and again once its group was freed.
    """
    if isinstance(comm, Group):
        return comm
    if comm.size == 1:
        return Group(SingleComm())
    key = _attribute_key()
    group = comm.Get_attr(key)
    if group is None or group.is_freed:
        group = Group(comm.Clone())
        comm.Set_attr(key, group)
    return group


def _attribute_key():
    """Create, once, the key under which a communicator keeps its group; freeing the communicator frees the group."""
    global _keyval
    if _keyval is None:
        from mpi4py import MPI

        _keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, group: group.free())
    return _keyval

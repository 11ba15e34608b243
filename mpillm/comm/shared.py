"""Memory that the ranks of a node share, and how they meet in it.

A :class:`Node` belongs to a group whose ranks are all on one node. Tensors made by :meth:`Node.empty` lie in a window
that every rank has mapped, and collectives work where they lie (:mod:`mpillm.comm.windows`). Other tensors go piece by
piece through a small window of the node's (:mod:`mpillm.comm.staging`).

Ranks meet by counters in a window, one cache line a rank, and wait with ``sched_yield``: ranks may outnumber cores.

The manners of windows, each of which cost somebody a wrong result: segments start on pages of their own
(``alloc_shared_noncontig``); counters are fenced with ``Win.Sync`` inside ``Lock_all``; all ranks together look up the
room in ``/dev/shm`` first and have the system set the memory aside, because allocation succeeds where touching it dies.
"""

import ctypes
import errno
import mmap
import os

import torch

from mpillm.comm import limits
from mpillm.comm.progress import advance
from mpillm.comm.staging import STAGING_BYTES, Staging
from mpillm.comm.windows import InWindow
from mpillm.errors import LaunchError

SHARED_MEMORY = "/dev/shm"
SWITCH = "MPILLM_SHARED_WINDOWS"  # set to 0, everything goes by messages
TURNS_ALONE = 200  # of waiting, before every further one lets MPI work: that costs what a short wait takes
_LINE_BYTES = 64
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: since Linux 5.14 an error in place of a signal where there is no memory


def make_node(comm):
    """Return the :class:`Node` of ``comm``, or None if its ranks do not all share one with room for it, or windows are
    switched off.

    Collective over ``comm``.
    """
    if comm.size == 1 or "0" in comm.allgather(os.environ.get(SWITCH)):
        return None
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    is_whole = node.size == comm.size
    node.Free()
    return if_room(lambda: Node(comm)) if all(comm.allgather(is_whole)) else None


def if_room(make):
    """Return what ``make`` makes in shared memory, or None if there is no room: other groups may be taking it."""
    try:
        return make()
    except LaunchError:
        return None


class Node:
    """The memory that the ranks of ``comm`` share. Collective over ``comm``, as are all methods unless they say not.

    Attributes
    ----------
    staging, in_window : Transport
        What carries out collectives, on tensors of a rank's own and on those in a window.
    """

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self._windows, self._together = [], {}
        window, parts = self._allocate([STAGING_BYTES + _LINE_BYTES] * comm.size)
        self.fence = window.Sync  # between memory and what tells of it
        self.staging, self.in_window = Staging(self, [part[:STAGING_BYTES] for part in parts]), InWindow(self)
        counters = [part[STAGING_BYTES:] for part in parts]
        counters[self.rank].zero_()
        comm.Barrier()
        self._others = [memoryview(part.numpy()).cast("q") for part in counters]
        self._own = self._others.pop(self.rank)

    def empty(self, size, dtype, is_set_aside=True):
        """Return an uninitialised flat tensor in a window.

        The ranks' tensors of one call belong together: the collectives reduce views at the same place of them where
        they lie. With ``is_set_aside`` False what is never used costs nothing, and :func:`set_aside` goes before use.

        Raises
        ------
        LaunchError
            On all ranks, if the shared memory of the node has no room for it.
        """
        window, parts = self._allocate([size * dtype.itemsize] * self.size, is_set_aside)
        parts = [part.view(dtype) for part in parts]
        self._together[_storage(parts[self.rank])] = window, parts
        return parts[self.rank]

    def one_copy(self, size, dtype):
        """Return one uninitialised flat tensor that all ranks share; who writes what and when is theirs to agree.

        Raises
        ------
        LaunchError
            As :meth:`empty`.
        """
        _, parts = self._allocate([size * dtype.itemsize] + [0] * (self.size - 1))
        return parts[0].view(dtype)

    def release(self, x):
        """Give back the window of ``x``, which :meth:`empty` made and which must not be used again."""
        window, _ = self._together.pop(_storage(x))
        self.in_window.forget()
        self._windows.remove(window)
        self.barrier()
        _free(window)

    def transport(self, x):
        """Return what carries out collectives on ``x``. Local."""
        return self.in_window if self.holds(x) else self.staging

    def holds(self, x):
        """Tell whether ``x`` lies in a window, as it was asked for. Local."""
        found = self._together.get(_storage(x)) if self._together else None
        return found is not None and found[1][0].dtype == x.dtype

    def views(self, x):
        """Return what belongs together with ``x``, which lies in a window, by rank. Local."""
        _, parts = self._together[_storage(x)]
        start = x.storage_offset()
        return [part[start:start + len(x)] for part in parts]

    def barrier(self):
        """Wait until every rank is here and what it wrote before can be seen; messages of this rank go on meanwhile."""
        own, leave = self._own, os.sched_yield
        self.fence()
        own[0] = count = own[0] + 1
        for other in self._others:
            turns = 0
            while other[0] < count:
                leave()
                turns += 1
                if turns > TURNS_ALONE:  # who is late may be waiting for what this rank has begun
                    self.comm.Iprobe()
                    advance()
        self.fence()

    def free(self):
        """Release the windows: what lies in them must not be used again."""
        self.staging.free()
        self.in_window.forget()
        self._together, self._others, self._own = {}, [], None
        self.comm.Barrier()
        for window in self._windows:
            _free(window)

    def _allocate(self, sizes, is_set_aside=True):
        """Return a new window of ``sizes[rank]`` bytes on every rank, and all ranks' memory in it as bytes."""
        from mpi4py import MPI

        if min(self.comm.allgather(_room_bytes())) < sum(sizes):
            raise self._no_room(sizes)
        info = MPI.Info.Create()
        info.Set("alloc_shared_noncontig", "true")
        window = MPI.Win.Allocate_shared(sizes[self.rank], 1, info, self.comm)
        info.Free()
        window.Lock_all(MPI.MODE_NOCHECK)
        parts = [_memory(window, rank, size) for rank, size in enumerate(sizes)]
        if not all(self.comm.allgather(not is_set_aside or set_aside(parts[self.rank]))):
            del parts
            _free(window)
            raise self._no_room(sizes)  # others took the room meanwhile
        self._windows.append(window)
        return window, parts

    def _no_room(self, sizes):
        return LaunchError(
            f"a window of {self.size} ranks needs {sum(sizes) / 2**20:.0f} MiB of {SHARED_MEMORY}, where "
            f"{_room_bytes() / 2**20:.0f} MiB are free: make {SHARED_MEMORY} larger (in a container: --shm-size), "
            f"or set {SWITCH}=0 to use messages"
        )


def _free(window):
    window.Unlock_all()
    window.Free()


def _memory(window, rank, size):
    """Return the memory of a rank in a window; MPI may not know where an empty one is."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(window.Shared_query(rank)[0], dtype=torch.uint8, count=size)


def set_aside(memory):
    """Have the system set memory aside; tell whether it could. Systems that know no such call are believed."""
    if not len(memory):
        return True
    start = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = memory.data_ptr() + len(memory) - start
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _POPULATE_WRITE)
    return not failed or ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS)


def _room_bytes():
    """Return the free bytes of this node's shared memory, of which this job may have no more than memory."""
    return limits.shared_memory_bytes(SHARED_MEMORY, limits.memory_bounds())


def _storage(x):
    return x.untyped_storage().data_ptr()

"""Memory that the ranks of a node share: collectives without messages.

A :class:`Node` belongs to a group whose ranks are all on one node. Tensors made by :meth:`Node.empty` lie in a window
that every rank has mapped: they are reduced where they lie, each rank its own block, in pieces that fit a cache. Other
tensors go piece by piece through a small staging window, so that all but their first read and last write stays in
cache. Sums follow the fixed tree of :mod:`mpillm.schedules.tree`, half types in float32 rounded once.

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
from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.progress import advance
from mpillm.comm.sums import combine_tree
from mpillm.comm.transport import DONE
from mpillm.errors import LaunchError
from mpillm.schedules.blocks import all_bounds

SHARED_MEMORY = "/dev/shm"
SWITCH = "MPILLM_SHARED_WINDOWS"  # set to 0, everything goes by messages
SLOT_BYTES = 1 << 20
NUM_SLOTS = 8  # two are enough to be right; with more a slot has left the readers' caches when it is written again
PIECE_BYTES = 1 << 18
WHOLE_BYTES = 1 << 20  # a block of up to here is not cut: code that is not in the cache costs more than memory does
AT_ONCE_BYTES = 1 << 18  # of all other ranks: up to here every rank combines everything, one meeting in place of two
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

    A :class:`~mpillm.comm.transport.Transport`, whose operations block. What lies in a window must do so on all ranks, at
    the same place.
    """

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self._peers = [rank for rank in range(comm.size) if rank != comm.rank]
        self.slot_bytes, self.at_once_bytes = SLOT_BYTES, AT_ONCE_BYTES // len(self._peers)
        self._windows, self._together, self._slots, self._turn = [], {}, {}, 0
        staging_bytes = NUM_SLOTS * SLOT_BYTES
        window, parts = self._allocate([staging_bytes + _LINE_BYTES] * comm.size)
        self.fence = window.Sync  # between memory and what tells of it
        self._staging, counters = [part[:staging_bytes] for part in parts], [part[staging_bytes:] for part in parts]
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
        self._windows.remove(window)
        self.barrier()
        _free(window)

    def views(self, x):
        """Return what belongs together with ``x``, by rank, or None if ``x`` does not lie in a window. Local."""
        _, parts = self._together.get(_storage(x), (None, None)) if self._together else (None, None)
        if parts is None or parts[0].dtype != x.dtype:
            return None
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
        self._together, self._slots, self._staging, self._others, self._own = {}, {}, [], [], None
        self.comm.Barrier()
        for window in self._windows:
            _free(window)

    def allreduce(self, x, out, op):
        together = self.views(out)
        if together is None and x.nbytes <= min(self.at_once_bytes, self.slot_bytes):
            if x.dtype not in HALF_TYPES:
                x, out = _light(1, x, out)
            slots, size = self._next_slots(x.dtype, 1), len(x)
            slots[self.rank][0][:size] = x
            self.barrier()
            combine_tree([slot[0][:size] for slot in slots], op, out)
        elif together is None:
            self._staged_reduce(x, out, all_bounds(len(x), self.size), op, True)
        else:
            if x.data_ptr() != out.data_ptr():
                out.copy_(x)
            self.barrier()
            low, high = all_bounds(len(out), self.size)[self.rank]
            for pieces in _pieces([part[low:high] for part in together]):
                own = combine_tree(pieces, op, pieces[self.rank])
                for piece in pieces:
                    if piece is not own:
                        piece.copy_(own)
            self.barrier()
        return DONE

    def reduce_scatter(self, x, out, cuts, op):
        together, (start, stop) = self.views(x), cuts[self.rank]
        if together is None:
            self._staged_reduce(x, out, cuts, op, False)
        else:
            self.barrier()
            for *pieces, piece in _pieces([*(part[start:stop] for part in together), out]):
                combine_tree(pieces, op, piece)
            self.barrier()
        return DONE

    def allgather(self, x, out, cuts):
        together, own = self.views(out), out[slice(*cuts[self.rank])]
        if own.data_ptr() != x.data_ptr():
            own.copy_(x)
        if together is None:
            self._publish(own, {rank: out[slice(*cuts[rank])] for rank in self._peers}, cuts)
        else:
            self.barrier()
            for rank in self._peers:
                out[slice(*cuts[rank])] = together[rank][slice(*cuts[rank])]
            self.barrier()
        return DONE

    def bcast(self, x, root):
        is_root = self.rank == root
        self._publish(x if is_root else x[:0], {} if is_root else {root: x}, [(0, len(x))])
        return DONE

    def gather(self, x, out, cuts, root):
        outs = {}
        if self.rank == root:
            outs = {rank: out[slice(*cut)] for rank, cut in enumerate(cuts)}
            outs.pop(root).copy_(x)
        self._publish(x, outs, cuts)
        return DONE

    def alltoall(self, x, out, sends, receives):
        parts = {rank: x[slice(*cut)] for rank, cut in enumerate(sends)}
        outs = {rank: out[slice(*cut)] for rank, cut in enumerate(receives)}
        outs.pop(self.rank).copy_(parts.pop(self.rank))
        self._exchange(parts, outs, sends, x.dtype)
        return DONE

    def scatter(self, x, out, cuts, root):
        if self.rank == root:
            parts = {rank: x[slice(*cut)] for rank, cut in enumerate(cuts)}
            out.copy_(parts.pop(root))
            self._exchange(parts, {}, cuts, out.dtype)
        else:
            self._exchange({}, {root: out}, cuts, out.dtype)
        return DONE

    def _publish(self, x, outs, cuts):
        """Show ``x`` to all ranks, none of them larger than the largest of ``cuts``; take that of some to ``outs``."""
        rounds = self._rounds(cuts, x.dtype, 1)
        x, *blocks = _light(rounds, x, *outs.values())
        outs = dict(zip(outs, blocks))
        for number in range(rounds):
            slots = self._next_slots(x.dtype, 1)
            _fill(slots[self.rank][0], x, number)
            self.barrier()
            for rank, out in outs.items():
                _drain(slots[rank][0], out, number)

    def _exchange(self, parts, outs, cuts, dtype):
        """Send ``parts`` to some ranks, take ``outs`` from some, none larger than the largest of ``cuts``."""
        rounds = self._rounds(cuts, dtype, self.size)
        like, *blocks = _light(rounds, torch.empty(0, dtype=dtype), *parts.values(), *outs.values())
        parts, outs = dict(zip(parts, blocks)), dict(zip(outs, blocks[len(parts):]))
        for number in range(rounds):
            slots = self._next_slots(like.dtype, self.size)
            for rank, part in parts.items():
                _fill(slots[self.rank][rank], part, number)
            self.barrier()
            for rank, out in outs.items():
                _drain(slots[rank][self.rank], out, number)

    def _staged_reduce(self, x, out, cuts, op, is_gathered):
        """Combine blocks piece by piece; with ``is_gathered`` a round later every rank takes what the others combined.

        A slot has a part for every rank: what it is to combine, and the last result of the slot's own rank.
        """
        rounds, own = self._rounds(cuts, x.dtype, self.size), self.rank
        if x.dtype not in HALF_TYPES:
            x, out = _light(rounds, x, out)
        parts = [x[low:high] for low, high in cuts]
        outs = [out[low:high] for low, high in cuts] if is_gathered else [out] * self.size
        for number in range(rounds + is_gathered):
            slots = self._next_slots(x.dtype, self.size)
            mine = slots[own]
            if number < rounds:
                for rank in self._peers:
                    _fill(mine[rank], parts[rank], number)
            if is_gathered and number > 0:
                _fill(mine[own], outs[own], number - 1)
            self.barrier()
            if is_gathered and number > 0:
                for rank in self._peers:
                    _drain(slots[rank][rank], outs[rank], number - 1)
            step = len(mine[0])
            part = parts[own][number * step:(number + 1) * step]
            if len(part):
                pieces = [part if rank == own else slot[own][:len(part)] for rank, slot in enumerate(slots)]
                combine_tree(pieces, op, outs[own][number * step:(number + 1) * step])

    def _rounds(self, cuts, dtype, count):
        """Return in how many rounds these blocks go through a slot of ``count`` parts."""
        step = self._part_items(dtype, count)
        return max(-(-(high - low) // step) for low, high in cuts)

    def _part_items(self, dtype, count):
        """Return the items in one of ``count`` parts of a slot, each beginning on a multiple of 16."""
        return max(1, self.slot_bytes // dtype.itemsize // count // 16) * 16

    def _next_slots(self, dtype, count):
        """Return the slots of the coming round, by rank, as ``count`` equal parts each: arrays if the dtype is numpy's.

        They are used in turn: with one barrier a round, and two slots or more, what is written now was last read before
        the barrier of the round before.
        """
        self._turn = (self._turn + 1) % NUM_SLOTS
        key = dtype, count, self._turn
        if key not in self._slots:
            low, step = self._turn * SLOT_BYTES, self._part_items(dtype, count)
            staging = [part if isinstance(dtype, torch.dtype) else part.numpy() for part in self._staging]
            self._slots[key] = [list(part[low:low + SLOT_BYTES].view(dtype)[:count * step].reshape(count, step))
                                for part in staging]
        return self._slots[key]

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


def _pieces(blocks):
    """Cut long blocks, equally long, into pieces that fit a cache; return those at one place together."""
    if blocks[0].nbytes <= WHOLE_BYTES:
        return [blocks]
    return zip(*(block.split(PIECE_BYTES // block.element_size()) for block in blocks))


def _light(rounds, *tensors):
    """Return what one round takes as arrays, of half types as integers: a call of theirs costs a microsecond less than
    a tensor's, but has no threads."""
    if rounds > 1:
        return tensors
    return [(x.view(torch.int16) if x.dtype in HALF_TYPES else x).numpy() for x in tensors]


def _fill(part, block, number):
    """Copy piece ``number`` of a block into a part of a slot."""
    piece = block[number * len(part):(number + 1) * len(part)]
    if len(piece):
        part[:len(piece)] = piece


def _drain(part, block, number):
    """Copy a part of a slot to piece ``number`` of a block."""
    piece = block[number * len(part):(number + 1) * len(part)]
    if len(piece):
        piece[:] = part[:len(piece)]


def _storage(x):
    return x.untyped_storage().data_ptr()

"""Memory that the ranks of a node share: collectives without messages.

A :class:`Node` belongs to a group whose ranks are all on one node. Tensors made by :meth:`Node.empty` lie in a window
that every rank has mapped: they are reduced where they lie, each rank its own block, in pieces that fit a cache. Other
tensors go piece by piece through a small staging window, so that all but their first read and last write stays in
cache. Sums follow the fixed tree of :mod:`mpillm.schedules.tree`, half types in float32 rounded once.

Ranks meet by counters in a window, one cache line a rank, and wait with ``sched_yield``: ranks may outnumber cores.

The manners of windows, each of which cost somebody a wrong result: segments start on pages of their own
(``alloc_shared_noncontig``); counters are fenced with ``Win.Sync`` inside ``Lock_all``; all ranks together look up the
room in ``/dev/shm`` first, because allocation succeeds where touching the memory dies.
"""

import os

import torch

from mpillm.comm.sums import combine_tree
from mpillm.errors import LaunchError
from mpillm.schedules.blocks import all_bounds

SHARED_MEMORY = "/dev/shm"
SWITCH = "MPILLM_SHARED_WINDOWS"  # set to 0, everything goes by messages
SLOT_BYTES = 1 << 20
NUM_SLOTS = 8  # two are enough to be right; with more a slot has left the readers' caches when it is written again
PIECE_BYTES = 1 << 18
AT_ONCE_BYTES = 1 << 14  # up to here every rank combines everything: one meeting in place of two
TURNS_ALONE = 200  # of waiting, before every further one lets MPI work: that costs what a short wait takes
_LINE_BYTES = 64


def make_node(comm):
    """Return the :class:`Node` of ``comm``, or None if its ranks do not all share one or windows are switched off.

    Collective over ``comm``.
    """
    if comm.size == 1 or "0" in comm.allgather(os.environ.get(SWITCH)):
        return None
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    is_whole, has_room = node.size == comm.size, _room_bytes() > NUM_SLOTS * SLOT_BYTES * comm.size
    node.Free()
    return Node(comm) if all(comm.allgather(is_whole and has_room)) else None


class Node:
    """The memory that the ranks of ``comm`` share. Collective over ``comm``, as are all methods unless they say not.

    In collectives ``x`` and ``out`` are flat host tensors and ``cuts`` the ``(start, stop)`` of every rank's block.
    What lies in a window must do so on all ranks, at the same place.
    """

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.slot_bytes, self.at_once_bytes = SLOT_BYTES, AT_ONCE_BYTES
        self._windows, self._together, self._slots, self._turn = [], {}, {}, 0
        window, counters = self._allocate([_LINE_BYTES] * comm.size)
        self.fence = window.Sync  # between memory and what tells of it
        counters[self.rank].zero_()
        comm.Barrier()
        self._others = [memoryview(part.numpy()).cast("q") for part in counters]
        self._own = self._others.pop(self.rank)
        _, self._staging = self._allocate([NUM_SLOTS * SLOT_BYTES] * comm.size)

    def has_room(self, n_bytes):
        """Tell whether the node's shared memory has room for so many bytes more."""
        return min(self.comm.allgather(_room_bytes())) >= n_bytes

    def empty(self, size, dtype):
        """Return an uninitialised flat tensor in a window.

        The ranks' tensors of one call belong together: the collectives reduce views at the same place of them where
        they lie.

        Raises
        ------
        LaunchError
            On all ranks, if the shared memory of the node has no room for it.
        """
        window, parts = self._allocate([size * dtype.itemsize] * self.size)
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
        if _storage(x) not in self._together:
            return None
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
                if turns > TURNS_ALONE:  # who is late may be waiting for what this rank has begun to send
                    self.comm.Iprobe()
        self.fence()

    def free(self):
        """Release the windows: what lies in them must not be used again."""
        self._together, self._slots, self._staging, self._others, self._own = {}, {}, [], [], None
        self.comm.Barrier()
        for window in self._windows:
            _free(window)

    def allreduce(self, x, out, op):
        """Combine ``x`` of all ranks into ``out`` of every rank; ``out`` may be ``x``."""
        together = self.views(out)
        if together is None and x.numel() * x.element_size() <= min(self.at_once_bytes, self.slot_bytes):
            slots = self._next_slots(x.dtype, 1)
            slots[self.rank][0][:len(x)] = x
            self.barrier()
            combine_tree([slot[0][:len(x)] for slot in slots], op, out)
        elif together is None:
            self._staged_reduce(x, out, all_bounds(len(x), self.size), op, True)
        else:
            if x.data_ptr() != out.data_ptr():
                out.copy_(x)
            self.barrier()
            for low, high in _pieces(*all_bounds(len(out), self.size)[self.rank], out):
                pieces = [part[low:high] for part in together]
                own = combine_tree(pieces, op, pieces[self.rank])
                for piece in pieces:
                    if piece is not own:
                        piece.copy_(own)
            self.barrier()

    def reduce_scatter(self, x, out, cuts, op):
        """Combine ``x`` of all ranks, each rank its block, into ``out``, which may be that block of ``x``."""
        together, (start, stop) = self.views(x), cuts[self.rank]
        if together is None:
            self._staged_reduce(x, out, cuts, op, False)
        else:
            self.barrier()
            for low, high in _pieces(start, stop, x):
                combine_tree([part[low:high] for part in together], op, out[low - start:high - start])
            self.barrier()

    def allgather(self, x, out, cuts):
        """Give every rank the blocks ``x`` of all in ``out``; ``x`` may be the own block of ``out``."""
        together, own = self.views(out), out[slice(*cuts[self.rank])]
        if own.data_ptr() != x.data_ptr():
            own.copy_(x)
        others = [rank for rank in range(self.size) if rank != self.rank]
        if together is None:
            self._publish(own, {rank: out[slice(*cuts[rank])] for rank in others}, cuts)
        else:
            self.barrier()
            for rank in others:
                out[slice(*cuts[rank])] = together[rank][slice(*cuts[rank])]
            self.barrier()

    def bcast(self, x, root):
        """Give every rank the ``x`` of ``root``."""
        is_root = self.rank == root
        self._publish(x if is_root else x[:0], {} if is_root else {root: x}, [(0, len(x))])

    def gather(self, x, out, cuts, root):
        """Give the root the blocks ``x`` of all."""
        outs = {}
        if self.rank == root:
            outs = {rank: out[slice(*cut)] for rank, cut in enumerate(cuts)}
            outs.pop(root).copy_(x)
        self._publish(x, outs, cuts)

    def alltoall(self, x, out, sends, receives):
        """Give every rank its block ``sends[rank]`` of ``x``; take what comes from it into ``receives[rank]``.

        The sizes of blocks sent are the same on all ranks.
        """
        parts = {rank: x[slice(*cut)] for rank, cut in enumerate(sends)}
        outs = {rank: out[slice(*cut)] for rank, cut in enumerate(receives)}
        outs.pop(self.rank).copy_(parts.pop(self.rank))
        self._exchange(parts, outs, sends, x.dtype)

    def scatter(self, x, out, cuts, root):
        """Give every rank its block of the root's ``x``."""
        if self.rank == root:
            parts = {rank: x[slice(*cut)] for rank, cut in enumerate(cuts)}
            out.copy_(parts.pop(root))
            self._exchange(parts, {}, cuts, out.dtype)
        else:
            self._exchange({}, {root: out}, cuts, out.dtype)

    def _publish(self, x, outs, cuts):
        """Show ``x`` to all ranks, none of them larger than the largest of ``cuts``; take that of some to ``outs``."""
        for number in range(self._rounds(cuts, x.dtype, 1)):
            slots = self._next_slots(x.dtype, 1)
            _fill(slots[self.rank][0], x, number)
            self.barrier()
            for rank, out in outs.items():
                _drain(slots[rank][0], out, number)

    def _exchange(self, parts, outs, cuts, dtype):
        """Send ``parts`` to some ranks, take ``outs`` from some, none larger than the largest of ``cuts``."""
        for number in range(self._rounds(cuts, dtype, self.size)):
            slots = self._next_slots(dtype, self.size)
            for rank, part in parts.items():
                _fill(slots[self.rank][rank], part, number)
            self.barrier()
            for rank, out in outs.items():
                _drain(slots[rank][self.rank], out, number)

    def _staged_reduce(self, x, out, cuts, op, is_gathered):
        """Combine blocks piece by piece; with ``is_gathered`` a round later every rank takes what the others combined.

        A slot has a part for every rank: what it is to combine, and the last result of the slot's own rank.
        """
        parts = [x[low:high] for low, high in cuts]
        outs = [out[low:high] for low, high in cuts] if is_gathered else [out] * self.size
        others = [rank for rank in range(self.size) if rank != self.rank]
        for number in range(self._rounds(cuts, x.dtype, self.size) + is_gathered):
            slots = self._next_slots(x.dtype, self.size)
            mine = slots[self.rank]
            for rank in others:
                _fill(mine[rank], parts[rank], number)
            if is_gathered and number > 0:
                _fill(mine[self.rank], outs[self.rank], number - 1)
            self.barrier()
            if is_gathered and number > 0:
                for rank in others:
                    _drain(slots[rank][rank], outs[rank], number - 1)
            step = len(mine[0])
            own = parts[self.rank][number * step:(number + 1) * step]
            if len(own):
                pieces = [own if rank == self.rank else slot[self.rank][:len(own)] for rank, slot in enumerate(slots)]
                combine_tree(pieces, op, outs[self.rank][number * step:(number + 1) * step])

    def _rounds(self, cuts, dtype, count):
        """Return in how many rounds these blocks go through a slot of ``count`` parts."""
        step = self._part_items(dtype, count)
        return max(-(-(high - low) // step) for low, high in cuts)

    def _part_items(self, dtype, count):
        """Return the items in one of ``count`` parts of a slot, each beginning on a multiple of 16."""
        return max(1, self.slot_bytes // dtype.itemsize // count // 16) * 16

    def _next_slots(self, dtype, count):
        """Return the slots of the coming round, by rank, as ``count`` equal parts each.

        They are used in turn: with one barrier a round, and two slots or more, what is written now was last read before
        the barrier of the round before.
        """
        self._turn = (self._turn + 1) % NUM_SLOTS
        key = dtype, count, self._turn
        if key not in self._slots:
            low, step = self._turn * SLOT_BYTES, self._part_items(dtype, count)
            self._slots[key] = [part[low:low + SLOT_BYTES].view(dtype)[:count * step].split(step)
                                for part in self._staging]
        return self._slots[key]

    def _allocate(self, sizes):
        """Return a new window of ``sizes[rank]`` bytes on every rank, and all ranks' memory in it as bytes."""
        from mpi4py import MPI

        if not self.has_room(sum(sizes)):
            raise LaunchError(
                f"a window of {self.size} ranks needs {sum(sizes) / 2**20:.0f} MiB of {SHARED_MEMORY}, where "
                f"{_room_bytes() / 2**20:.0f} MiB are free: make {SHARED_MEMORY} larger (in a container: --shm-size), "
                f"or set {SWITCH}=0 to use messages"
            )
        info = MPI.Info.Create()
        info.Set("alloc_shared_noncontig", "true")
        window = MPI.Win.Allocate_shared(sizes[self.rank], 1, info, self.comm)
        info.Free()
        window.Lock_all(MPI.MODE_NOCHECK)
        self._windows.append(window)
        return window, [_memory(window, rank, size) for rank, size in enumerate(sizes)]


def _free(window):
    window.Unlock_all()
    window.Free()


def _memory(window, rank, size):
    """Return the memory of a rank in a window; MPI may not know where an empty one is."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(window.Shared_query(rank)[0], dtype=torch.uint8, count=size)


def _room_bytes():
    """Return the free bytes of this node's shared memory."""
    free = os.statvfs(SHARED_MEMORY)
    return free.f_bavail * free.f_frsize


def _pieces(start, stop, like):
    """Cut a range of items into pieces that fit a cache."""
    step = PIECE_BYTES // like.element_size()
    return [(low, min(low + step, stop)) for low in range(start, stop, step)]


def _fill(part, block, number):
    """Copy piece ``number`` of a block into a part of a slot."""
    piece = block[number * len(part):(number + 1) * len(part)]
    if len(piece):
        part[:len(piece)] = piece


def _drain(part, block, number):
    """Copy a part of a slot to piece ``number`` of a block."""
    piece = block[number * len(part):(number + 1) * len(part)]
    if len(piece):
        piece.copy_(part[:len(piece)])


def _storage(x):
    return x.untyped_storage().data_ptr()

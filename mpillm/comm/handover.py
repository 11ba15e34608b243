"""Messages between ranks of one node, handed over in memory: written once by the sender, read where they lie.

Every rank has slots in a window of its node. To send is to write into a free slot and to tell the receiver its number
in an MPI message of eight bytes, so that MPI matches tags, and nothing waits for the sender to enter MPI again. Where
no slot is free the number says so and the tensor follows as a message: memory is bounded and nobody waits for a slot.

The receiver's tensor is the slot itself. It is free again when the last reference to that memory is gone, autograd's
own included: written earlier it would give a wrong gradient without a word.
"""

import math
import weakref
from collections import deque

import numpy as np
import torch

from mpillm.comm.buffers import as_words, flat, host_empty
from mpillm.comm.progress import finish
from mpillm.comm.shared import if_room, make_node, set_aside
from mpillm.schedules.blocks import align

LEAST_BYTES = 1 << 20  # of a message that gains by it, measured between two ranks under MPICH 5.0.2
_LINE_BYTES = 64


class Handover:
    """Slots of the ranks of ``comm`` for messages of up to ``slot_bytes``. Collective over ``comm`` to make and free.

    Parameters
    ----------
    comm : Comm
    slot_bytes, num_slots : int
        Of every rank. Slots that are never used cost nothing: the lowest free one is taken.
    """

    def __init__(self, comm, slot_bytes, num_slots):
        from mpi4py import MPI

        self.comm, self.slot_bytes = comm, align(slot_bytes, _LINE_BYTES)
        self._inside = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._node, self._neighbours, self._left = make_node(self._inside), {}, deque()
        self._numbers = np.arange(-1, num_slots)  # what is sent: it must not change before it has left
        self._num_ready = 0  # slots that have memory; the lowest free one is taken, so that these are the first
        made = if_room(lambda: self._allocate(num_slots)) if self._node else None
        if made is None:
            return
        slots, flags = made
        flags.zero_()
        parts = [(memory.numpy(), memoryview(taken.numpy())) for memory, taken in
                 zip(self._node.views(slots), self._node.views(flags))]
        self._memory, self._taken = parts[self._inside.rank]
        self._neighbours = dict(zip(self._inside.allgather(comm.rank), parts))
        self._node.barrier()

    def carries(self, rank, n_bytes):
        """Tell whether a message of this size to or from ``rank`` goes this way. Local, the same on both ranks."""
        return LEAST_BYTES <= n_bytes <= self.slot_bytes and rank in self._neighbours

    def isend(self, x, to, tag):
        """Hand over contiguous ``x``; return a request: until it is done ``x`` must not change."""
        self._give_back()
        slot = next((i for i, taken in enumerate(self._taken) if not taken), -1)
        if slot == self._num_ready and not self._make_ready(slot):
            slot = -1
        if slot >= 0:
            self._taken[slot] = 1
            self._node.fence()
            place = torch.frombuffer(self._memory, dtype=x.dtype, count=x.numel(), offset=slot * self.slot_bytes)
            place.copy_(flat(x))
            self._node.fence()
        told = self.comm.Isend(self._numbers[slot + 1:slot + 2], to, tag)
        return told if slot >= 0 else _Both(told, self.comm.Isend(as_words(x), to, tag))

    def irecv(self, shape, like, source, tag):
        """Return a request, and what gives the tensor once that is done."""
        self._give_back()
        slot = np.empty(1, self._numbers.dtype)
        return self.comm.Irecv(slot, source, tag), lambda: self._take(int(slot[0]), shape, like, source, tag)

    def free(self):
        """Release the memory: what was received must not be used again."""
        self._neighbours, self._left = {}, deque()
        if self._node is not None:
            self._memory = self._taken = None
            self._node.free()
        self._inside.Free()

    def _allocate(self, num_slots):
        """Return this rank's slots, and the flags that tell which are taken."""
        slots = self._node.empty(num_slots * self.slot_bytes, torch.uint8, is_set_aside=False)
        return slots, self._node.empty(num_slots, torch.int64)

    def _make_ready(self, slot):
        """Set a slot's memory aside before it is used for the first time; tell whether there was room."""
        low = slot * self.slot_bytes
        is_ready = set_aside(torch.from_numpy(self._memory[low:low + self.slot_bytes]))
        self._num_ready += is_ready
        return is_ready

    def _take(self, slot, shape, like, source, tag):
        """Return the tensor in a slot of ``source``, or the one that follows as a message."""
        if slot < 0:
            out = host_empty(shape, like)
            finish(self.comm.Irecv(as_words(out), source, tag))
            return out
        self._node.fence()
        memory, taken = self._neighbours[source]
        low = slot * self.slot_bytes
        lease = memory[low:low + math.prod(shape) * like.element_size()]  # lives as long as a tensor refers to it
        weakref.finalize(lease, self._left.append, (taken, slot)).atexit = False
        return torch.frombuffer(lease, dtype=like.dtype).view(shape)

    def _give_back(self):
        """Let senders have the slots that nothing refers to any more; here, because MPI belongs to the main thread."""
        if self._left:
            self._node.fence()
        while self._left:
            taken, slot = self._left.popleft()
            taken[slot] = 0


class _Both:
    """Two requests as one."""

    def __init__(self, *requests):
        self._requests = requests

    def Test(self):
        """Tell whether both are done."""
        return all([request.Test() for request in self._requests])

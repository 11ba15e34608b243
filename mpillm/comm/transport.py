"""What carries out collectives: one protocol, behind which stand the MPI library, shared memory, schedules, and what is
made of these."""

from functools import partial
from typing import Protocol


class Request(Protocol):
    """An operation under way."""

    def Test(self):
        """Let it go on; tell whether it is finished."""


KEPT_BYTES = 4 << 20  # of the largest vector for which memory is kept from start to start: with larger ones it is no gain


class _Done:
    def Test(self):
        return True


DONE = _Done()  # the request of an operation that has blocked until it was finished


class Startable(Protocol):
    """An operation bound to its tensors, to be started again and again."""

    def start(self):
        """Begin, with what the tensors hold now; return a :class:`Request`. Collective. Not before it has finished."""

    def free(self):
        """Release what is kept. Local."""


class Prepared:
    """A :class:`Startable` by a function that does it all, and for which nothing else is kept."""

    def __init__(self, call):
        self.start = call

    def free(self):
        self.start = None


def bind(transport, op, *arguments):
    """Return the :class:`Startable` of an operation on these arguments, with what the transport can keep for it.

    Collective: the same on all ranks.
    """
    keep = getattr(transport, "bind", None)
    return keep(op, *arguments) if keep else Prepared(partial(getattr(transport, op), *arguments))


class Transport(Protocol):
    """Collectives of a group on flat host tensors.

    Every operation is collective, and returns the :class:`Request` of an operation that may be under way: until it is done
    inputs must not change. ``cuts`` are the ``(start, stop)`` of every rank's block. One transport may lack operations
    that a group never asks it for. One that can keep something for an operation that is called again and again on the
    same tensors has ``bind(op, *arguments)``, which returns a :class:`Startable`.
    """

    def allreduce(self, x, out, op):
        """Combine ``x`` of all ranks into ``out`` of every rank; ``out`` may be ``x``."""

    def reduce_scatter(self, x, out, cuts, op):
        """Combine ``x`` of all ranks, each rank its block, into ``out``, which may be that block of ``x``: then the other
        blocks of ``x`` may be destroyed."""

    def allgather(self, x, out, cuts):
        """Give every rank the blocks ``x`` of all in ``out``; ``x`` may be the own block of ``out``."""

    def bcast(self, x, root):
        """Give every rank the ``x`` of ``root``."""

    def alltoall(self, x, out, sends, receives):
        """Give every rank its block ``sends[rank]`` of ``x``; take what comes from it into ``receives[rank]``.

        The sizes of blocks sent are the same on all ranks.
        """

    def scatter(self, x, out, cuts, root):
        """Give every rank its block of the root's ``x``."""

    def gather(self, x, out, cuts, root):
        """Give the root the blocks ``x`` of all."""

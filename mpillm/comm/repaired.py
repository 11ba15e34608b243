"""Collectives as a repaired table wants them: by two others, as if longer, or in pieces; see
:mod:`mpillm.schedules.repair`."""

from mpillm.comm.progress import finish
from mpillm.schedules.blocks import all_bounds
from mpillm.schedules.repair import COMPOSED, PADDED, as_if


def repaired(group, algorithm, op, x, n_bytes):
    """Return what carries out ``op`` on tensors like ``x``, ``n_bytes`` in all, by a repaired choice."""
    if algorithm == COMPOSED:
        return Composed(*(group.transport(half, x, n_bytes, True) for half in ("reduce_scatter", "allgather")), group)
    kind, other_bytes = as_if(algorithm)
    kind = Padded if kind == PADDED else Pieces
    return kind(group.transport(op, x, other_bytes, True), max(1, other_bytes // x.element_size()))


class Composed:
    """An allreduce as a reduce-scatter and an allgather."""

    def __init__(self, scatterer, gatherer, group):
        self.scatterer, self.gatherer, self.group = scatterer, gatherer, group

    def allreduce(self, x, out, op):
        """Combine ``x`` of all ranks into ``out`` of every rank; ``out`` may be ``x``."""
        cuts = all_bounds(len(x), self.group.size)
        own = out[slice(*cuts[self.group.rank])]
        finish(self.scatterer.reduce_scatter(x, own, cuts, op))
        return self.gatherer.allgather(own, out, cuts)


class Padded:
    """Collectives on vectors of ``items``, of which the message is the beginning."""

    def __init__(self, transport, items):
        self.transport, self.items = transport, items

    def allreduce(self, x, out, op):
        """Combine ``x`` of all ranks into ``out`` of every rank; ``out`` may be ``x``."""
        longer = self._longer(x)
        finish(self.transport.allreduce(longer, longer, op))
        out.copy_(longer[:len(x)])

    def bcast(self, x, root):
        """Give every rank the ``x`` of ``root``."""
        longer = self._longer(x)
        finish(self.transport.bcast(longer, root))
        x.copy_(longer[:len(x)])

    def _longer(self, x):
        longer = x.new_zeros(max(self.items, len(x)))
        longer[:len(x)] = x
        return longer


class Pieces:
    """Collectives on equal pieces of at most ``items``, one after the other."""

    def __init__(self, transport, items):
        self.transport, self.items = transport, items

    def allreduce(self, x, out, op):
        """Combine ``x`` of all ranks into ``out`` of every rank; ``out`` may be ``x``."""
        for low, high in self._cuts(x):
            finish(self.transport.allreduce(x[low:high], out[low:high], op))

    def bcast(self, x, root):
        """Give every rank the ``x`` of ``root``."""
        for low, high in self._cuts(x):
            finish(self.transport.bcast(x[low:high], root))

    def _cuts(self, x):
        return all_bounds(len(x), -(-len(x) // self.items)) if len(x) else []

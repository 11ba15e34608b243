"""Transports that a repaired table wants: an operation by two others, as if longer, or in pieces; see
:mod:`mpillm.schedules.repair`."""

from mpillm.comm.progress import finish
from mpillm.comm.transport import DONE
from mpillm.schedules.algorithm import COMPOSED, PADDED
from mpillm.schedules.blocks import all_bounds


def repaired(group, algorithm, op, dtype):
    """Return the transport of ``op`` by a repaired :class:`~mpillm.schedules.algorithm.Algorithm`."""
    if algorithm.name == COMPOSED:
        return Composed(group)
    kind = Padded if algorithm.name == PADDED else Pieces
    return kind(group.transport(op, dtype, algorithm.n_bytes), max(1, algorithm.n_bytes // dtype.itemsize))


class Composed:
    """An allreduce as a reduce-scatter and an allgather, each as the table says for its size."""

    def __init__(self, group):
        self.group = group

    def allreduce(self, x, out, op):
        cuts = all_bounds(len(x), self.group.size)
        own = out[slice(*cuts[self.group.rank])]
        scatterer, gatherer = (self.group.transport(half, x.dtype, x.nbytes) for half in ("reduce_scatter", "allgather"))
        finish(scatterer.reduce_scatter(x, own, cuts, op))
        return gatherer.allgather(own, out, cuts)


class Padded:
    """Collectives on vectors of ``items``, of which the message is the beginning."""

    def __init__(self, transport, items):
        self.transport, self.items = transport, items

    def allreduce(self, x, out, op):
        longer = self._longer(x)
        finish(self.transport.allreduce(longer, longer, op))
        out.copy_(longer[:len(x)])
        return DONE

    def bcast(self, x, root):
        longer = self._longer(x)
        finish(self.transport.bcast(longer, root))
        x.copy_(longer[:len(x)])
        return DONE

    def _longer(self, x):
        longer = x.new_zeros(max(self.items, len(x)))
        longer[:len(x)] = x
        return longer


class Pieces:
    """Collectives on equal pieces of at most ``items``, one after the other."""

    def __init__(self, transport, items):
        self.transport, self.items = transport, items

    def allreduce(self, x, out, op):
        for low, high in self._cuts(x):
            finish(self.transport.allreduce(x[low:high], out[low:high], op))
        return DONE

    def bcast(self, x, root):
        for low, high in self._cuts(x):
            finish(self.transport.bcast(x[low:high], root))
        return DONE

    def _cuts(self, x):
        return all_bounds(len(x), -(-len(x) // self.items)) if len(x) else []

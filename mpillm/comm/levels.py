"""Collectives over several nodes: inside a node through its memory, between nodes by schedules, in parallel lanes."""

from itertools import accumulate, pairwise

import torch

from mpillm.comm.scheduled import Schedules
from mpillm.comm.shared import make_node
from mpillm.comm.transport import DONE
from mpillm.schedules.blocks import all_bounds


class Levels:
    """Nodes of equally many ranks, in any order over the ranks. A lane is one rank of every node: the i-th of each.

    A :class:`~mpillm.comm.transport.Transport`; collective over ``comm`` to make and to use. ``node`` is the shared
    memory of this node's ranks: what lies in a window of it is combined there. Sums are formed inside the nodes and then
    between them; of half types each is rounded.
    """

    operations = ("allreduce", "reduce_scatter", "allgather")  # of a transport

    def __init__(self, comm, nodes):
        inside = comm.Split(nodes[comm.rank], comm.rank)
        self.node, self._inside = make_node(inside), inside
        self._lane = comm.Split(inside.rank, nodes[comm.rank])
        self._schedules = Schedules(self._lane)
        self._between = self._schedules.transport("ring")
        self._ranks = [[rank for rank, node in enumerate(nodes) if node == name] for name in sorted(set(nodes))]

    def allreduce(self, x, out, op):
        """Each lane reduces its block, round the nodes by a ring."""
        cuts = all_bounds(len(x), self.node.size)
        block = out[slice(*cuts[self.node.rank])]
        self.node.transport(x).reduce_scatter(x, block, cuts, op)
        self._between.allreduce(block, block, op).wait()
        return self.node.transport(out).allgather(block, out, cuts)

    def reduce_scatter(self, x, out, cuts, op):
        """Inside a node a rank combines the blocks of its lane, which then reduces them to each rank's own."""
        nodes = self._cuts(cuts)
        sizes = [high - low for low, high in (inside[self.node.rank] for inside in nodes)]
        lane, ends = torch.empty(sum(sizes), dtype=x.dtype), list(pairwise(accumulate(sizes, initial=0)))
        for inside, end in zip(nodes, ends):
            self.node.transport(x).reduce_scatter(x, lane[slice(*end)], inside, op)
        return self._between.reduce_scatter(lane, out, ends, op)

    def allgather(self, x, out, cuts):
        nodes = self._cuts(cuts)
        self._between.allgather(x, out, [inside[self.node.rank] for inside in nodes]).wait()
        for inside in nodes:
            self.node.transport(out).allgather(out[slice(*inside[self.node.rank])], out, inside)
        return DONE

    def free(self):
        """Release memory and communicators."""
        self._schedules.free()
        if self.node is not None:
            self.node.free()
        self._lane.Free()
        self._inside.Free()

    def _cuts(self, cuts):
        """Return the cuts of every node's ranks, in the order in which they stand on it."""
        return [tuple(cuts[rank] for rank in ranks) for ranks in self._ranks]


def make_levels(comm, nodes):
    """Return the :class:`Levels` of ``comm``, or None if it has one node, uneven ones, or nodes without windows.

    Collective over ``comm``.
    """
    sizes = {nodes.count(node) for node in nodes}
    if len(set(nodes)) < 2 or len(sizes) > 1 or sizes == {1}:
        return None
    levels = Levels(comm, nodes)
    if all(comm.allgather(levels.node is not None)):
        return levels
    levels.free()
    return None

"""Collectives over several nodes: inside a node through its memory, between nodes by schedules, in parallel lanes."""

from mpillm.comm.scheduled import Schedules
from mpillm.comm.shared import make_node
from mpillm.schedules.blocks import all_bounds


class Levels:
    """Nodes of equally many ranks. A lane is one rank of every node: the i-th of each.

    Collective over ``comm`` to make and to use.
    """

    def __init__(self, comm, nodes):
        inside = comm.Split(nodes[comm.rank], comm.rank)
        self.node, self._inside = make_node(inside), inside
        self._lane = comm.Split(inside.rank, comm.rank)
        self._schedules = Schedules(self._lane)

    def allreduce(self, x, out, op):
        """Combine ``x`` of all ranks into ``out`` of every rank: each lane its block, round the nodes by a ring."""
        cuts = all_bounds(len(x), self.node.size)
        block = out[slice(*cuts[self.node.rank])]
        self.node.reduce_scatter(x, block, cuts, op)
        self._schedules.transport("ring").allreduce(block, block, op).wait()
        self.node.allgather(block, out, cuts)

    def free(self):
        """Release memory and communicators."""
        self._schedules.free()
        self.node.free()
        self._lane.Free()
        self._inside.Free()


def make_levels(comm, nodes):
    """Return the :class:`Levels` of ``comm``, or None if it has one node, uneven ones, or nodes without windows.

    Collective over ``comm``.
    """
    sizes = {nodes.count(node) for node in nodes}
    if len(set(nodes)) < 2 or len(sizes) > 1 or sizes == {1}:
        return None
    levels = Levels(comm, nodes)
    return levels if all(comm.allgather(levels.node is not None)) else None

"""The mesh: ranks arranged along named axes."""

import math

from mpillm.comm.group import Group
from mpillm.comm.recorder import Recorder
from mpillm.config import AXES
from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE


class Mesh:
    """Arrange the ranks of ``comm`` along the axes data, pipeline and tensor.

    Collective over ``comm``. The mesh works on a clone; ``free()`` it, or use it in a ``with`` block.

    Parameters
    ----------
    comm : Comm
        An mpi4py communicator or the one-rank stand-in.
    data, pipeline, tensor : int
        Degrees; their product is ``comm.size``.
    order : sequence of str
        The axes from slowest to fastest varying over ranks.
    sums : {"any", "tree"}
        Order of sums in collectives over the axes (see :class:`~mpillm.comm.group.Group`).
    table : DecisionTable, optional
        Which algorithm each collective takes.
    is_checked : bool
        Compare what the ranks call before they do it.

    Raises
    ------
    ConfigError
        On all ranks, before any message, if the degrees or the order are wrong.

    Examples
    --------
    ``Mesh(comm, data=2, tensor=2)`` on four ranks::

        rank            0  1  2  3
        coord("data")   0  0  1  1
        coord("tensor") 0  1  0  1
    """

    def __init__(self, comm, data=1, pipeline=1, tensor=1, order=AXES, sums="any", table=DEFAULT_TABLE,
                 is_checked=False):
        self._sizes = {"data": data, "pipeline": pipeline, "tensor": tensor}
        if sorted(order) != sorted(AXES):
            raise ConfigError(f"mesh order = {order!r}: must name each of {', '.join(AXES)} once")
        if min(self._sizes.values()) < 1 or math.prod(self._sizes.values()) != comm.size:
            raise ConfigError(
                f"mesh data={data} x pipeline={pipeline} x tensor={tensor} needs {data * pipeline * tensor} ranks, "
                f"this communicator has {comm.size}: change the degrees, each at least 1, or the number of ranks"
            )
        self.recorder = Recorder()
        self.world = Group(comm.Clone(), "world", sums, self.recorder, table, is_checked)
        self._coords, self._groups = {}, {}
        rest = self.world.rank
        for axis in reversed(order):
            rest, self._coords[axis] = divmod(rest, self._sizes[axis])
        for axis in AXES:
            others = [self._coords[name] for name in AXES if name != axis]
            sizes = [self._sizes[name] for name in AXES if name != axis]
            part = self.world.comm.Split(others[0] * sizes[1] + others[1], self._coords[axis])
            self._groups[axis] = Group(part, axis, sums, self.recorder, table, is_checked)

    def size(self, axis):
        """Return the degree of ``axis``."""
        return self._sizes[axis]

    def coord(self, axis):
        """Return this rank's position along ``axis``."""
        return self._coords[axis]

    def group(self, axis):
        """Return the ranks that share all coordinates with this one but that along ``axis``."""
        return self._groups[axis]

    def free(self):
        """Release the communicators. Collective over the mesh."""
        for group in (*self._groups.values(), self.world):
            group.free()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self.free()

    def __str__(self):
        degrees = " x ".join(f"{axis}={size}" for axis, size in self._sizes.items())
        place = " ".join(f"{axis}={self._coords[axis]}" for axis in AXES)
        return f"mesh {degrees}, rank {self.world.rank}/{self.world.size} {place}"

"""The mesh: ranks arranged along named axes."""

import math

from mpillm.comm.group import Group
from mpillm.comm.recorder import Recorder
from mpillm.config import AXES
from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE


class Mesh:
    """Arrange the ranks of ``comm`` along named axes.

    Collective over ``comm``. The mesh works on a clone; ``free()`` it, or use it in a ``with`` block.

    Parameters
    ----------
    comm : Comm
        An mpi4py communicator or the one-rank stand-in.
    order : sequence of str, optional
        The axes from slowest to fastest varying over ranks; by default data, pipeline, tensor, then others as given.
    sums : {"any", "tree"}
        Order of sums in collectives over the axes (see :class:`~mpillm.comm.group.Group`).
    table : DecisionTable, optional
        Which algorithm each collective takes.
    is_checked : bool
        Compare what the ranks call before they do it.
    **degrees : int
        Of every axis; the product is ``comm.size``. Those of data, pipeline and tensor are 1 unless given, any others
        are axes beside them.

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

    def __init__(self, comm, order=None, sums="any", table=DEFAULT_TABLE, is_checked=False, **degrees):
        self._sizes = dict.fromkeys(AXES, 1) | degrees
        self.axes = tuple(self._sizes if order is None else order)
        if sorted(self.axes) != sorted(self._sizes):
            raise ConfigError(f"mesh order = {order!r}: must name each of {', '.join(self._sizes)} once")
        needed = math.prod(self._sizes.values())
        if min(self._sizes.values()) < 1 or needed != comm.size:
            raise ConfigError(
                f"mesh {self._degrees()} needs {needed} ranks, this communicator has {comm.size}: change the degrees, "
                "each at least 1, or the number of ranks"
            )
        self.recorder = Recorder()
        self._options = sums, self.recorder, table, is_checked
        self.world = Group(comm.Clone(), "world", *self._options)
        self._coords, rest = {}, self.world.rank
        for axis in reversed(self.axes):
            rest, self._coords[axis] = divmod(rest, self._sizes[axis])
        self._groups = {self.axes: self.world} if len(self.axes) > 1 else {}
        for axis in self._sizes:
            self.group(axis)

    def size(self, axis):
        """Return the degree of ``axis``. Local."""
        return self._sizes[axis]

    def coord(self, axis):
        """Return this rank's position along ``axis``. Local."""
        return self._coords[axis]

    def group(self, *axes):
        """Return the ranks that share all coordinates with this one but those along ``axes``.

        Local for one axis; for several collective over the mesh the first time, and kept. Ranks stand in the order that
        they have in the world, whatever the order of ``axes``.
        """
        key = tuple(axis for axis in self.axes if axis in axes)
        if not axes or len(key) != len(axes):
            raise ConfigError(f"mesh group {axes}: must name axes of {', '.join(self.axes)}, each once")
        if key not in self._groups:
            color = 0
            for axis in self.axes:
                if axis not in key:
                    color = color * self._sizes[axis] + self._coords[axis]
            part = self.world.comm.Split(color, self.world.rank)
            self._groups[key] = Group(part, "+".join(key), *self._options)
        return self._groups[key]

    def free(self):
        """Release the communicators; once is enough. Collective over the mesh."""
        for group in (*self._groups.values(), self.world):
            group.free()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self.free()

    def __str__(self):
        place = " ".join(f"{axis}={self._coords[axis]}" for axis in self._sizes)
        return f"mesh {self._degrees()}, rank {self.world.rank}/{self.world.size} {place}"

    def _degrees(self):
        return " x ".join(f"{axis}={size}" for axis, size in self._sizes.items())

"""A communicator as mpillm uses it: cloned, named, with an order of sums and a recorder."""

from mpillm.comm.recorder import Recorder

_keyval = None


class Group:
    """The ranks a collective runs over.

    Parameters
    ----------
    comm : Comm
        An mpi4py communicator that belongs to mpillm (a clone), or the one-rank stand-in.
    name : str
        The mesh axis, for records and messages.
    order : {"any", "tree"}
        Order of sums: whatever the MPI library does (repeatable for one library and rank count), or the fixed binary
        tree of :mod:`mpillm.schedules.tree`.
    recorder : Recorder, optional
        Where calls are counted.
    """

    def __init__(self, comm, name="world", order="any", recorder=None):
        self.comm, self.name, self.order = comm, name, order
        self.recorder = Recorder() if recorder is None else recorder
        self.rank, self.size = comm.rank, comm.size

    def record(self, operation, n_bytes):
        """Count one call of ``operation`` that sends ``n_bytes`` from this rank."""
        self.recorder.add(self.name, operation, n_bytes)


def as_group(comm):
    """Return ``comm`` as a :class:`Group`: itself if it is one, else one over a clone that is kept with ``comm``.

    Collective over ``comm`` the first time a communicator is seen.
    """
    if isinstance(comm, Group):
        return comm
    if comm.size == 1:
        return Group(comm)
    key = _attribute_key()
    group = comm.Get_attr(key)
    if group is None:
        group = Group(comm.Clone())
        comm.Set_attr(key, group)
    return group


def _attribute_key():
    """Create, once, the key under which a communicator keeps its group; freeing the communicator frees the clone."""
    global _keyval
    if _keyval is None:
        from mpi4py import MPI

        _keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, group: group.comm.Free())
    return _keyval

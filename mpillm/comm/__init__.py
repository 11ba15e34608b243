"""MPI: moves bytes. Works with any mpi4py communicator and without the rest of mpillm."""

from mpillm.comm.bound import Bound
from mpillm.comm.collectives import (
    allgather,
    allreduce,
    alltoall,
    bcast,
    gather,
    iallgather,
    iallreduce,
    ialltoall,
    ibcast,
    igather,
    ireduce_scatter,
    iscatter,
    reduce_scatter,
    scatter,
)
from mpillm.comm.group import Group
from mpillm.comm.mesh import Mesh
from mpillm.comm.p2p import irecv, isend
from mpillm.comm.world import comm_world, launch

__all__ = [
    "Bound", "Group", "Mesh", "allgather", "allreduce", "alltoall", "bcast", "comm_world", "gather", "iallgather",
    "iallreduce", "ialltoall", "ibcast", "igather", "irecv", "ireduce_scatter", "iscatter", "isend", "launch",
    "reduce_scatter", "scatter",
]

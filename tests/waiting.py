"""Run on four ranks: 0 meets 1 in shared memory, who first waits for 2, who first waits for what 0 has begun to send."""

import numpy as np
from mpi4py import MPI

from mpillm.comm.shared import make_node

MUCH = 1 << 20  # more than MPI sends before the receiver is ready

world = MPI.COMM_WORLD
node = make_node(world.Split(world.rank // 2))
much, little = np.ones(MUCH), np.ones(1)
if world.rank == 0:
    sent = world.Isend(much, 2)
    sent.Test()
    node.barrier()
    sent.Wait()
elif world.rank == 1:
    world.Recv(little, 2)
    node.barrier()
elif world.rank == 2:
    world.Recv(much, 0)
    world.Send(little, 1)
print("done")

"""Run on four ranks: what a rank has begun goes on while it waits for something else.

First 0 meets 1 in shared memory, who first waits for 2, who first waits for what 0 has begun to send. Then even ranks wait
for the library, and in shared memory, before they wait for a schedule that odd ranks finish first.
"""

import numpy as np
import torch
from mpi4py import MPI

from mpillm.comm import allreduce, iallreduce
from mpillm.comm.group import as_group
from mpillm.comm.shared import make_node
from mpillm.comm.tables import only
from mpillm.schedules.algorithm import LIBRARY, WINDOW

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

group = as_group(world)
ring, library, window = (group.with_table(only(name)) for name in ("ring", LIBRARY, WINDOW))
x = torch.full((MUCH,), world.rank, dtype=torch.float64)
for then in (lambda: iallreduce(x, library).wait(), lambda: allreduce(x, window)):
    begun = iallreduce(x, ring)
    if world.rank % 2:
        begun.wait()
    then()
    assert begun.wait()[0] == 6
print("done")

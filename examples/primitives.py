"""The collectives on blocks that are not equal.

    mpiexec -n 3 python examples/primitives.py

Seven items on three ranks are blocks of 2, 2 and 3: block i of p starts at item i * 7 // p. The comments draw
the data of three ranks; any number of ranks will do.
"""

import torch

from mpillm import launch
from mpillm.autograd import copy_to
from mpillm.comm import (
    allgather,
    allreduce,
    alltoall,
    bcast,
    comm_world,
    gather,
    iallreduce,
    reduce_scatter,
    scatter,
)
from mpillm.comm.group import as_group


def main():
    comm = comm_world()
    items = torch.arange(7)
    ones = torch.ones(7, dtype=torch.int64)

    # rank           0                1                2
    # block          [0 1]            [2 3]            [4 5 6]
    block = scatter(items, comm)
    show("scatter", block, comm)

    # rank           0                1                2
    # before         [0 1]            [2 3]            [4 5 6]
    # after          [0 1 2 3 4 5 6]  [0 1 2 3 4 5 6]  [0 1 2 3 4 5 6]
    show("allgather", allgather(block, comm), comm)

    # rank           0                1                2
    # before         [0 1]            [2 3]            [4 5 6]
    # after          [0 1 2 3 4 5 6]  []               []
    show("gather", gather(block, comm, root=0), comm)

    # rank           0                1                2
    # before         [1 1 1 1 1 1 1]  [2 2 2 2 2 2 2]  [3 3 3 3 3 3 3]
    # after          [6 6 6 6 6 6 6]  [6 6 6 6 6 6 6]  [6 6 6 6 6 6 6]
    mine = ones * (comm.rank + 1)
    show("allreduce", allreduce(mine, comm), comm)

    # rank           0                1                2
    # before         [1 1 1 1 1 1 1]  [2 2 2 2 2 2 2]  [3 3 3 3 3 3 3]
    # after          [6 6]            [6 6]            [6 6 6]
    show("reduce_scatter", reduce_scatter(mine, comm), comm)

    # rank           0                1                2
    # before         [0 0 0 0 0 0 0]  [1 1 1 1 1 1 1]  [2 2 2 2 2 2 2]
    # after          [2 2 2 2 2 2 2]  [2 2 2 2 2 2 2]  [2 2 2 2 2 2 2]
    last = comm.size - 1
    show("bcast", bcast(ones * comm.rank, comm, root=last), comm)

    # rank           0                   1                   2
    # before         [0 1 2 3 4 5 6]     [10 11 ... 16]      [20 21 ... 26]
    # after          [0 1 10 11 20 21]   [2 3 12 13 22 23]   [4 5 6 14 15 16 24 25 26]
    show("alltoall", alltoall(items + 10 * comm.rank, comm), comm)

    # A started operation: compute, then wait for the result.
    pending = iallreduce(mine, comm, op="max")
    squares = items.square()
    show("iallreduce + squares", pending.wait() + squares, comm)

    # Bound to a tensor: made once, started again for what the tensor holds next.
    # rank           0                1                2
    # before         [1 1], [2 2]     [2 2], [3 3]     [3 3], [4 4]
    # after          [6 6], [9 9]     [6 6], [9 9]     [6 6], [9 9]
    x = torch.zeros(2, dtype=torch.int64)
    bound = as_group(comm).bind("allreduce", x)
    for value in (1, 2):
        x.fill_(comm.rank + value)
        bound.start()
        bound.wait()
        show("bound allreduce", x, comm)
    bound.free()

    # The six movements of mpillm.autograd carry gradients. copy_to is the identity; backward sums over ranks.
    # rank           0                1                2
    # dy             [1 1]            [2 2]            [3 3]
    # dx             [6 6]            [6 6]            [6 6]
    x = torch.zeros(2, requires_grad=True)
    copy_to(x, comm).backward(torch.full((2,), comm.rank + 1.0))
    show("copy_to, gradient", x.grad, comm)


def show(what, x, comm):
    """Print every rank's ``x`` on rank 0. Collective over ``comm``."""
    lists = comm.gather(x.tolist())
    if comm.rank == 0:
        print(f"{what:20}", *lists)


launch(main)

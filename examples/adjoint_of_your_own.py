"""Hold the backward of a movement of your own against the dot-product test.

    mpiexec -n 3 python examples/adjoint_of_your_own.py

The movement: the rows of a tensor are sharded, and each rank also needs the row before its first one, as in
a convolution along the sequence. Seven rows on three ranks:

    rank              0           1           2
    x                 [a b]       [c d]       [e f g]
    with_halo(x)      [0 a b]     [b c d]     [d e f g]

Row b is used on ranks 0 and 1. So its gradient is a sum, and rank 1 has to send its part back.
Forgetful does not, which one rank alone cannot show.
"""

import torch
from mpi4py import MPI

from mpillm import check_adjoint, launch
from mpillm.errors import CollectiveError


class Halo(torch.autograd.Function):
    """Put the last row of the rank before in front of the own rows."""

    @staticmethod
    def forward(ctx, x, comm):
        ctx.comm = comm
        return torch.cat((shift(x[-1:], comm, +1), x))

    @staticmethod
    def backward(ctx, dy):
        dx = dy[1:].clone()
        dx[-1:] += shift(dy[:1], ctx.comm, -1)
        return dx, None


class Forgetful(Halo):
    """The same movement with a fault: nothing is sent back."""

    @staticmethod
    def backward(ctx, dy):
        return dy[1:].clone(), None


def shift(row, comm, by):
    """Send ``row`` to the rank ``by`` places on; return what comes in, zeros at the end of the line."""
    source, dest = comm.rank - by, comm.rank + by
    inside = range(comm.size)
    received = torch.zeros_like(row, memory_format=torch.contiguous_format)
    comm.Sendrecv(
        row.detach().contiguous().numpy(), dest if dest in inside else MPI.PROC_NULL,
        recvbuf=received.numpy(), source=source if source in inside else MPI.PROC_NULL,
    )
    return received


def main():
    comm = MPI.COMM_WORLD
    for movement in (Halo, Forgetful):
        try:
            error = check_adjoint(
                lambda x, movement=movement: movement.apply(x, comm), comm, (7, 2), "sharded(0)", "varying"
            )
            verdict = f"is an adjoint pair, relative difference {error:.0e}"
        except CollectiveError as caught:
            verdict = f"is refused: {caught}"
        if comm.rank == 0:
            print(f"{movement.__name__} on {comm.size} ranks {verdict}")


launch(main)

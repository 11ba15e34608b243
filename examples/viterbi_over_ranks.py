"""Decode one long chain on all ranks, and scan a recurrence over them.

    mpiexec -n 2 python examples/viterbi_over_ranks.py
"""

import time

import numpy as np
import torch
from mpi4py import MPI

from mpillm import launch
from mpillm.scan import AFFINE, scan, viterbi
from mpillm.schedules.blocks import bounds


def main():
    comm, steps, states = MPI.COMM_WORLD, 200_000, 45
    transitions = np.random.default_rng(0).integers(-20, 1, (states, states))  # the same on all ranks
    whole = np.random.default_rng(1).integers(-20, 1, (steps, states))  # a chain that could be longer than one rank can hold
    start, stop = bounds(steps, comm.size, comm.rank)  # any division will do: the steps of rank 0 come first

    start_s = time.perf_counter()
    path, score = viterbi(whole[start:stop], transitions, transitions[0], comm)
    seconds = time.perf_counter() - start_s
    digest = sum(comm.allgather(int((path * torch.arange(start, stop)).sum())))
    if comm.rank == 0:
        print(f"{comm.size} ranks: score {score}, path {digest:x}, {seconds:.2f} s")

    a, b = torch.full((stop - start,), 0.5), torch.ones(stop - start)  # h = a h + b, which tends to 2
    h = scan(AFFINE, (a, b), comm)[1]
    parts = comm.allgather(h[:3].tolist())
    if comm.rank == 0:
        print(f"parts of h begin with {parts}")


launch(main)

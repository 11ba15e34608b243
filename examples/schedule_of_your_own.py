"""A collective schedule written by hand: checked, refused when it is wrong, and run.

    mpiexec -n 2 python examples/schedule_of_your_own.py
"""

from dataclasses import replace

import torch

from mpillm import launch
from mpillm.comm import comm_world
from mpillm.comm.executor import Executor
from mpillm.errors import ConfigError, ScheduleError
from mpillm.schedules.check_collective import check_collective
from mpillm.schedules.collective import CollectiveSchedule, Step, draw


def rank_rounds(rank):
    """Each rank copies its own chunk into place; then both send it and receive the other at once."""
    other = 1 - rank
    return (Step("copy", None, (rank,)),), (Step("send", other, (rank,)), Step("recv", other, (other,)))


def main():
    comm = comm_world()
    if comm.size != 2:
        raise ConfigError(f"this schedule is for 2 ranks, not {comm.size}: start it with mpiexec -n 2")
    swap = CollectiveSchedule(
        op="allgather", algorithm="mine", num_ranks=2, sources=(0, 1), targets=(None, None), shares=(1, 1),
        rounds=(rank_rounds(0), rank_rounds(1)),
    )
    report = check_collective(swap)

    # DO NOT: send first and receive afterwards, which hangs as soon as a message is too large for a buffer
    wrong = replace(swap, rounds=tuple((copy, *((step,) for step in exchange)) for copy, exchange in swap.rounds))
    try:
        check_collective(wrong)
    except ScheduleError as error:
        if comm.rank == 0:
            print(f"{draw(swap)}\n{report.num_rounds} round\n\n{draw(wrong)}\n{error}\n")

    whole = torch.zeros(8)
    halves = {0: whole[:4], 1: whole[4:]}
    run = Executor(swap, report.carries, comm.Clone(), sizes=(4, 4), inputs={comm.rank: halves[comm.rank]},
                   outputs=halves, dtype=whole.dtype)
    for value in (1, 5):  # as often as one likes: requests are kept
        halves[comm.rank].fill_(value + comm.rank)
        run.start()
        run.wait()
        if comm.rank == 0:
            print(whole.tolist())
    run.free()


if __name__ == "__main__":
    launch(main)

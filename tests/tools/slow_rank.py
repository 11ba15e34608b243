"""One slow rank: what unequal shares of the batch, and unequal stages, win beside what the planner promises.

    mpiexec -n N python tests/tools/slow_rank.py

Every rank is bound to a core of its own, the last to one on which a busy loop runs. The launch is probed and planned as
any other, once with all ranks along the data axis and once along the pipeline; the plan is run in turn with the same
layout of equal shares, or of the stages that equal ranks would get. The exit code says whether the plan won less than
four fifths of what it promised.
"""

import os
import subprocess
import sys
from dataclasses import replace

import torch
from layouts import ROUNDS, measure

from mpillm.comm.group import as_group
from mpillm.comm.probe import measure_machine
from mpillm.comm.world import comm_world, set_threads
from mpillm.config import Config
from mpillm.nn.products import fast_product
from mpillm.plan import Plan
from mpillm.planner.keys import describe
from mpillm.planner.search import make_plan, price_layout

MODEL = {
    "model": {"vocab_size": 512, "hidden_size": 256, "ffn_size": 688, "num_layers": 12, "num_heads": 8},
    "train": {"seq_len": 128, "global_batch": 12},
}
ENOUGH = 0.8


def main():
    """Measure both axes; return the exit code."""
    comm = comm_world()
    cores = sorted(os.sched_getaffinity(0))
    if comm.size > len(cores):
        raise SystemExit(f"{comm.size} ranks on {len(cores)} cores: start at most one rank a core, not bound to any")
    os.sched_setaffinity(0, {cores[comm.rank]})
    set_threads(comm)
    is_slow = comm.rank == comm.size - 1
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_slow else None
    try:
        group = as_group(comm)
        machine = measure_machine(group, multiply=fast_product(comm, torch.device("cpu"), torch.float32))
        won = [compare(axis, machine, comm) for axis in ("data", "pipeline")]
    finally:
        if busy:
            busy.kill()
    return int(min(won) < ENOUGH)


def compare(axis, machine, comm):
    """Return the share of what the plan promised along an axis that it wins."""
    config = Config.from_dict({**MODEL, "layout": {"data": 1, "pipeline": 1, "tensor": 1, axis: comm.size}})
    plans = comm.bcast(planned_and_equal(axis, config, machine, comm.size) if comm.rank == 0 else None)
    expected = [plan.predicted["step_s"] for plan in plans]
    measured = measure(config, [plan.layout for plan in plans], comm, plans[0].table, ROUNDS)
    gains = [1 - planned_s / equal_s for planned_s, equal_s in (expected, measured)]
    if comm.rank == 0:
        speeds = ", ".join(f"{speed:.2f}" for speed in machine.speeds)
        print(f"{comm.size} ranks of speeds {speeds}: {describe(plans[0].layout)}")
        for what, plan, expected_s, measured_s in zip(("planned", "equal"), plans, expected, measured):
            parts = plan.layout.get("shares", "equal") if axis == "data" else plan.layout["stage_cuts"]
            print(f"  {what}: {'shares' if axis == 'data' else 'cuts'} {parts}, measured {measured_s * 1e3:.0f} ms, "
                  f"predicted {expected_s * 1e3:.0f} ms")
        print(f"  gain predicted {gains[0]:.1%}, measured {gains[1]:.1%}: {gains[1] / gains[0]:.2f} of it", flush=True)
    return gains[1] / gains[0]


def planned_and_equal(axis, config, machine, ranks):
    """Return the plan for unequal ranks, and its layout as equal ones would share the work, priced on the unequal."""
    planned = make_plan(config, machine, ranks, top=0)
    changed = {"shares": [config.train.global_batch // ranks] * ranks} if axis == "data" else {"stage_cuts": "auto"}
    equal = Plan(ranks, 0, layout={**planned.layout, **changed})
    if axis == "pipeline":
        equal = make_plan(equal.applied_to(config), replace(machine, speeds=()), ranks, top=0)
    return planned, price_layout(Plan(ranks, 0, layout=equal.layout).applied_to(config), machine, ranks)


if __name__ == "__main__":
    sys.exit(main())

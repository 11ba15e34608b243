"""How long the planner's programs take at full size, in seconds of processor time on one core.

    OMP_NUM_THREADS=1 python tests/tools/solver_times.py

The least of three repetitions; docs/planning.rst quotes it.
"""

import time

import numpy as np

from mpillm.config import Config
from mpillm.machine import PRESETS
from mpillm.model.description import SHAPES
from mpillm.planner.balance import balance
from mpillm.planner.buckets import bucket_cuts
from mpillm.planner.routes import Topology, bound
from mpillm.planner.search import layouts, make_plan
from mpillm.planner.stages import balanced_cuts
from mpillm.planner.synthesis import synthesise

# The last row of Narayanan et al. 2021, Table 1.
TRILLION = Config.from_dict({
    "model": {**SHAPES["gpt"], "vocab_size": 51200, "hidden_size": 25600, "ffn_size": 102400, "num_layers": 128,
              "num_heads": 160, "max_seq_len": 2048},
    "train": {"seq_len": 2048, "global_batch": 3072, "dtype": "bfloat16"},
})
RANKS = 3072


def pods(count, size=8, inside=300e9, outside=25e9):
    """Return a network of ``count`` nodes of ``size`` ranks, each rank on its node's switch and on the common one."""
    ranks = [(f"{pod}.{i}", f"switch {pod}") for pod in range(count) for i in range(size)]
    links = [ends for rank, switch in ranks for other, rate in ((switch, inside), ("network", outside))
             for ends in ((rank, other, rate), (other, rank, rate))]
    names = ["network", *(f"switch {pod}" for pod in range(count)), *(rank for rank, _ in ranks)]
    return Topology.make(names, ["." in name for name in names], links)


def main():
    """Measure and print."""
    rng = np.random.default_rng(0)
    layer_costs, speeds = 1 + 0.1 * rng.random(128), 1 + 0.3 * rng.random(64)
    ready_s, n_bytes = np.sort(rng.random(1000)), rng.integers(1, 10**6, 1000)
    topology, item_s = pods(128), 1 + rng.random(RANKS)
    machine = PRESETS["dgx-a100"]
    count = sum(1 for _ in layouts(TRILLION, RANKS, machine))
    programs = {
        "stages: 128 layers on 64 unequal ranks": lambda: balanced_cuts(layer_costs, 64, 256, speeds),
        "buckets: 1,000 gradients": lambda: bucket_cuts(ready_s, n_bytes, lambda x: 1e-5 + 1e-9 * x),
        f"shares: {10 * RANKS:,} sequences over {RANKS:,} ranks": lambda: balance(10 * RANKS, item_s),
        "bound: allgather of 1,024 ranks in 128 nodes": lambda: bound("allgather", topology),
        "synthesis: 32 stages x 256 microbatches": lambda: synthesise(32, 256, 1.0, 1.1, 0.9, 0.05),
        f"plan: a trillion parameters on {RANKS:,} ranks, {count:,} layouts": lambda: make_plan(
            TRILLION, machine, RANKS),
    }
    for name, program in programs.items():
        times = []
        for _ in range(3):
            start = time.process_time()
            found = program()
            times.append(time.process_time() - start)
        print(f"{min(times):8.3f} s  {name}", flush=True)
    predicted = found.predicted
    print(f"            {predicted['step_s']:.4g} s a step, at least {predicted['lower_bound_s']:.4g} s: gap "
          f"{predicted['step_s'] / predicted['lower_bound_s'] - 1:.0%}")


if __name__ == "__main__":
    main()

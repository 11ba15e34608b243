"""Two hosts and a link: every layout measured beside its prediction, and the plan's choice beside the best of them.

    mpiexec -n N ... python tests/links.py NAME FILE

``tests/hosts.sh --links`` starts it with links of several rates. The choice and the fastest others are then measured in
turn, again and again. The choice is appended to FILE; the exit code says whether it took at most a tenth longer than the
best.
"""

import statistics
import sys

import numpy as np

from mpillm.comm.group import as_group
from mpillm.comm.probe import measure_machine, measure_table
from mpillm.comm.world import comm_world, set_threads
from mpillm.config import Config
from mpillm.plan import Plan
from mpillm.planner.layout import layouts, make_plan
from mpillm.planner.pricing import Pricer, describe, to_config
from mpillm.train.choose import time_step
from mpillm.train.engine import Engine

# Three layers: stages are uneven, so that what a pipeline saves on the wire it pays for in waiting.
CONFIG = {
    "model": {"hidden_size": 256, "ffn_size": 688, "num_layers": 3, "num_heads": 4, "vocab_size": 256},
    "train": {"seq_len": 128, "global_batch": 16, "eval_every": 0, "checkpoint_every": 0},
}
STEPS, FINALISTS, ROUNDS, HOPELESS = 3, 3, 4, 4


def candidates(pricer, config, ranks, machine):
    """Return the best price of every data x pipeline x tensor x microbatch x schedule, other keys as the planner sets
    them; without those that are predicted to take more than :data:`HOPELESS` times the best."""
    found = {}
    for one in layouts(config, ranks, machine):
        price = pricer.played(pricer.price(one))
        key = one.data, one.pipeline, one.tensor, one.microbatch, one.schedule
        if key not in found or price.step_s < found[key].step_s:
            found[key] = price
    prices = sorted(found.values(), key=lambda price: price.step_s)
    return [price for price in prices if price.step_s < HOPELESS * prices[0].step_s]


def engine_of(config, keys, comm, table):
    """Return an engine of a planned layout, and its configuration."""
    resolved = Plan(comm.size, 0, layout=keys).applied_to(config).resolve(comm.size)
    return Engine(resolved, comm, table=table), resolved


def main(name, path):
    """Measure one link; return the exit code."""
    comm = comm_world()
    set_threads(comm)
    config, group = Config.from_dict(CONFIG), as_group(comm)
    machine = measure_machine(group, measure_table(group))
    plan = comm.bcast(make_plan(config, machine, comm.size) if comm.rank == 0 else None)
    pricer, rows = Pricer(config, machine, comm.size), []
    prices = comm.bcast(candidates(pricer, config, comm.size, machine) if comm.rank == 0 else None)
    for price in prices:
        keys = to_config(price.layout, pricer)
        engine, resolved = engine_of(config, keys, comm, plan.table)
        times = [time_step(engine, resolved, comm) for _ in range(1 + STEPS)]
        rows.append((statistics.median(times[1:]), price.step_s, keys))
        engine.free()
    rows.sort(key=lambda row: row[0])
    finalists = [plan.layout, *[keys for *_, keys in rows if keys != plan.layout][:FINALISTS]]
    engines = [engine_of(config, keys, comm, plan.table) for keys in finalists]
    rounds = [[statistics.median(time_step(*each, comm) for _ in range(STEPS)) for each in engines]
              for _ in range(1 + ROUNDS)]
    times = [statistics.median(own) for own in zip(*rounds[1:])]
    ratio, best = times[0] / min(times), finalists[times.index(min(times))]
    if comm.rank == 0:
        links = ", ".join(f"{level.name} {level.alpha_s * 1e6:.0f} us {1e-6 / level.beta_s_per_byte:.0f} MB/s"
                          for level in machine.levels)
        print(f"{name}: {comm.size} ranks; {links}")
        for measured_s, predicted_s, keys in rows:
            print(f"  measured {measured_s * 1e3:7.0f} ms, predicted {predicted_s * 1e3:7.0f} ms  {describe(keys)}")
        ranks = [np.argsort(np.argsort([row[i] for row in rows])) for i in (0, 1)]
        print(f"  rank correlation {np.corrcoef(ranks)[0, 1]:.2f} over {len(rows)} layouts")
        predicted_s = plan.predicted["step_s"]
        print(f"  chosen {describe(plan.layout)}: {times[0] * 1e3:.0f} ms, predicted {predicted_s * 1e3:.0f}; "
              f"{ratio:.3f} of the best, {describe(best)}", flush=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(describe(plan.layout) + "\n")
    return int(ratio > 1.1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

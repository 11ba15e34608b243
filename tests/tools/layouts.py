"""Every layout of a model measured beside its prediction, and the plan's choice beside the best of them.

    mpiexec -n N python tests/tools/layouts.py MODEL [FILE]

MODEL is one of those below. Every data x pipeline x tensor x microbatch x schedule of the ranks is run for a few steps,
other keys as the planner sets them; then the plan's first three and the fastest others in turn, again and again. The
choice is appended to FILE; the exit code says whether it took at most a tenth longer than the best.
``tests/hosts.sh --links`` starts it with links of several rates between two hosts, ``tests/soak.sh`` on one host.
"""

import math
import statistics
import sys

import numpy as np
import torch

from mpillm.comm.devices import pick_device
from mpillm.comm.group import as_group
from mpillm.comm.probe import measure_machine
from mpillm.comm.world import comm_world, set_threads
from mpillm.config import Config
from mpillm.nn.products import fast_product
from mpillm.plan import Plan
from mpillm.planner.keys import describe, to_config
from mpillm.planner.layout_costs import Pricer
from mpillm.planner.search import layouts, make_plan
from mpillm.train.choose import time_step
from mpillm.train.engine import Engine

# Bound by products, by gradients and by activations. The one for links has three layers: stages are uneven, so that
# what a pipeline saves on the wire it pays for in waiting.
MODELS = {
    "compute": {
        "model": {"vocab_size": 8192, "hidden_size": 512, "ffn_size": 1376, "num_layers": 8, "num_heads": 8},
        "train": {"seq_len": 256, "global_batch": 8},
    },
    "gradient": {
        "model": {"vocab_size": 32768, "hidden_size": 768, "ffn_size": 2048, "num_layers": 4, "num_heads": 12},
        "train": {"seq_len": 32, "global_batch": 2},
    },
    "activation": {
        "model": {"vocab_size": 512, "hidden_size": 256, "ffn_size": 688, "num_layers": 12, "num_heads": 8},
        "train": {"seq_len": 512, "global_batch": 8},
    },
    "link": {
        "model": {"vocab_size": 256, "hidden_size": 256, "ffn_size": 688, "num_layers": 3, "num_heads": 4},
        "train": {"seq_len": 128, "global_batch": 16},
    },
}
STEPS, FIRST, FASTEST, ROUNDS = 3, 3, 3, 7
HOPELESS = {"link": 4.0}  # over a slow link, what is predicted to take so many times the best would take hours


def candidates(pricer, config, ranks, machine, hopeless=math.inf):
    """Return the best price of every data x pipeline x tensor x microbatch x schedule, the cheapest first; without
    those that are predicted to take ``hopeless`` times the best."""
    found = {}
    for one in layouts(config, ranks, machine):
        price = pricer.played(pricer.price(one))
        key = one.data, one.pipeline, one.tensor, one.microbatch, one.schedule
        if key not in found or price.step_s < found[key].step_s:
            found[key] = price
    prices = sorted(found.values(), key=lambda price: price.step_s)
    return [price for price in prices if price.step_s < hopeless * prices[0].step_s]


def measure(config, chosen, comm, table, rounds=1):
    """Return the median seconds of a step in each of the planned layouts, run by turns so that all see the same weather."""
    engines = []
    for keys in chosen:
        resolved = Plan(comm.size, 0, layout=keys).applied_to(config).resolve(comm.size)
        engines.append((Engine(resolved, comm, table=table), resolved))
        time_step(*engines[-1], comm)  # the first step makes windows and requests
    times = [[statistics.median(time_step(*each, comm) for _ in range(STEPS)) for each in engines] for _ in range(rounds)]
    for engine, _ in engines:
        engine.free()
    return list(map(statistics.median, zip(*times)))


def main(name, path=None):
    """Measure one model; return the exit code."""
    comm = comm_world()
    set_threads(comm)
    config, group = Config.from_dict(MODELS[name]), as_group(comm)
    device, dtype = pick_device(config.train.device, comm), getattr(torch, config.train.dtype)
    machine = measure_machine(group, device=device, dtype=dtype, multiply=fast_product(comm, device, dtype))
    pricer = Pricer(config, machine, comm.size)

    def plan_and_price():
        prices = candidates(pricer, config, comm.size, machine, HOPELESS.get(name, math.inf))
        return make_plan(config, machine, comm.size, top=FIRST - 1), [
            (price.step_s, to_config(price, pricer)) for price in prices]

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)

    plan, priced = comm.bcast(plan_and_price() if comm.rank == 0 else None)
    links = ", ".join(f"{level.name} {level.alpha_s * 1e6:.0f} us {1e-6 / max(level.beta_s_per_byte, 1e-15):.0f} MB/s"
                      for level in machine.levels)
    say(f"{name}: {comm.size} ranks; {links}; {len(priced)} layouts, in the order of their predictions")
    rows = []
    for predicted_s, keys in priced:
        rows.append((*measure(config, [keys], comm, plan.table), predicted_s, keys))
        say(f"  measured {rows[-1][0] * 1e3:7.0f} ms, predicted {predicted_s * 1e3:7.0f} ms  {describe(keys)}")
    slowest_s, fastest_s = max(row[0] for row in rows), min(row[0] for row in rows)
    places = [np.argsort(np.argsort([row[i] for row in rows])) for i in (0, 1)]
    say(f"  slowest {slowest_s / fastest_s:.2f} times the fastest; rank correlation "
        f"{np.corrcoef(places)[0, 1]:.2f}")
    first = [plan.layout, *[other["layout"] for other in plan.alternatives]]
    fastest = [keys for *_, keys in sorted(rows, key=lambda row: row[0]) if keys not in first][:FASTEST]
    times = measure(config, first + fastest, comm, plan.table, ROUNDS)
    best_s = min(times)
    say(f"  chosen {describe(plan.layout)}: {times[0] * 1e3:.0f} ms, predicted {plan.predicted['step_s'] * 1e3:.0f}; "
        f"{times[0] / best_s:.3f} of the best, {describe((first + fastest)[times.index(best_s)])}; the best of the "
        f"first {len(first)} {min(times[:len(first)]) / best_s:.3f}")
    if comm.rank == 0 and path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(describe(plan.layout) + "\n")
    return int(times[0] > 1.1 * best_s)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

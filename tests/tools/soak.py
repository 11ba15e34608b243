"""Every layout of this launch's ranks, for the long test: against the reference, and bit for bit in ``exact``, also models of
every description (``families``); and with ranks that are late at random, bit for bit on every path that messages take.

    PYTHONPATH=tests mpiexec -n N python tests/tools/soak.py [PART ...] [OPTION ...]

What ``exact`` is to show, with odd sizes, in minutes: ``exact`` as the only part, on 1, 2 and 4 ranks, with ``--few`` for one
layout of every choice of degrees; ``--way`` and ``--dtype`` for each way of products; the variables that choose a processor's
instructions for another processor.
"""

import argparse
import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
from tiny import FAMILIES, GROUPED, alone, one_for_every_degrees, reference_steps, tiny, train

from mpillm.comm import executor, group, handover, library, scheduled, shared
from mpillm.comm.tables import only
from mpillm.comm.world import comm_world, launch
from mpillm.errors import OK, VALIDATION
from mpillm.nn.products import WAYS
from mpillm.plan import DEFAULT_TABLE
from mpillm.planner.keys import describe
from mpillm.schedules.algorithm import LIBRARY, TWO_LEVEL, WINDOW
from mpillm.train.engine import Engine
from mpillm.train.selftest import check_exact
from mpillm.verify.compare import all_layouts, compare_layout

MODELS = {
    "as many key/value heads": {},
    "one key/value head, tied": {**GROUPED["shared"], "model.tie_embeddings": True},
    "straddling groups, masked": {**GROUPED["straddling"], "data.mask_documents": True},
}
EXACT = {"train.numerics": "exact", "train.dtype": "float32", "train.steps": 20}
STEPS = 500
PARTS = ("reference", "families", "exact", "late", "paths")
# How often ranks are late, by up to 5 ms; least at what is called again and again while they wait
LATE = ((shared.Node, "barrier", 0.02), (library.Library, "_call", 0.02), (library.Persistent, "start", 0.02),
        (handover.Handover, "_take", 0.02), (executor.Executor, "Test", 0.002))
# In fast float64: the decision table of each path, and what brings the run onto it
PATHS = {
    "window": (only(WINDOW), lambda patch: None),
    "ring": (only("ring"), lambda patch: None),
    "windows off": (DEFAULT_TABLE, lambda patch: patch.setenv(shared.SWITCH, "0")),
    "pretended nodes": (only(TWO_LEVEL), lambda patch: (
        patch.setattr(group, "make_node", lambda comm: None),
        patch.setattr(scheduled, "nodes_of", lambda comm: tuple(rank // 2 * 2 for rank in range(comm.size))))),
}


def main():
    """Compare what is asked for; return the exit code."""
    asked, comm, differing = options(), comm_world(), 0
    torch.set_num_threads(asked.threads)
    for way in set(WAYS) - {asked.way or way for way in WAYS}:
        del WAYS[way]
    exact = {**EXACT, "train.dtype": asked.dtype}
    families = {name: {"model.num_layers": 4, **model} for name, model in FAMILIES.items()}
    for name, model in {**MODELS, **families}.items():
        if ("families" if name in families else "reference") in asked.parts:
            differing += against_reference(tiny(model), f"{name}, 5 steps in float64", comm)
        if "exact" in asked.parts:
            differing += against_one_rank(tiny({**model, **exact}), name, comm, asked.few)
    late = {"train.steps": STEPS, "model.num_layers": 4}
    if "late" in asked.parts:
        differing += late_against_one_rank(tiny({**exact, **late}), comm)
    for path in PATHS if comm.size > 1 and "paths" in asked.parts else ():
        differing += late_against_in_time(tiny(late), path, comm)
    return VALIDATION if differing else OK


def options():
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--few", action="store_true", help="exact: one layout of every choice of degrees")
    parser.add_argument("--way", choices=WAYS, help="exact: the way of products, in place of the first that holds")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of exact")
    parser.add_argument("--threads", type=int, default=1, help="a rank")
    asked = parser.parse_args()
    if set(asked.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    asked.parts = asked.parts or PARTS
    return asked


def against_reference(config, title, comm):
    """Return how many layouts differ from the serial reference beyond the tolerance."""
    batches, expected = reference_steps(config, 5, comm)
    return report(title, comm, {describe(layout.layout): compare_layout(layout, comm, batches, expected).first
                                for layout in all_layouts(config, comm.size)})


def against_one_rank(config, title, comm, is_few):
    """Return how many layouts differ in any bit from the run of one rank."""
    expected, layouts = alone(config, comm, 20), (one_for_every_degrees if is_few else all_layouts)(config, comm.size)
    way = check_exact(config.resolve(1), comm)
    return report(f"{title}, 20 steps in exact {config.train.dtype}, products {way}", comm, {
        describe(layout.layout): differs(run(layout, comm, 20), expected, comm) for layout in layouts})


def late_against_one_rank(config, comm):
    """Return how many exact runs, in which ranks are late at random, differ in any bit from that of one rank."""
    expected, found = alone(config, comm, STEPS), {}
    with late(comm) as calls:
        for algorithm in (WINDOW, LIBRARY):
            for layout in one_for_every_degrees(config, comm.size):
                found[f"{describe(layout.layout)} {algorithm}"] = differs(
                    run(layout, comm, STEPS, only(algorithm)), expected, comm)
    return report(f"{STEPS} steps in exact float32, late at random ({calls_of(calls)})", comm, found)


def late_against_in_time(config, path, comm):
    """Return how many runs on a path, in which ranks are late at random, differ in any bit from those in time."""
    found, calls, (table, prepare) = {}, Counter(), PATHS[path]
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        for layout in one_for_every_degrees(config, comm.size):
            expected = run(layout, comm, STEPS, table)
            with late(comm) as own:
                found[describe(layout.layout)] = differs(run(layout, comm, STEPS, table), expected, comm)
            calls += own
    return report(f"{path}, {STEPS} steps in float64, late at random ({calls_of(calls)})", comm, found)


@contextmanager
def late(comm):
    """Let this rank be late at random, also at handing over the smallest messages; give a count of all occasions."""
    numbers, calls = random.Random(comm.rank), Counter()

    def delayed(function, chance):
        @wraps(function)
        def call(*args):
            calls[function.__qualname__] += 1
            if numbers.random() < chance:
                time.sleep(numbers.random() * 0.005)
            return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handover, "LEAST_BYTES", 1)
        for owner, name, chance in LATE:
            patch.setattr(owner, name, delayed(getattr(owner, name), chance))
        yield calls


def run(layout, comm, steps, table=DEFAULT_TABLE):
    """Train; return losses and norms, and ``{(name, start): flat values}`` of this rank's weights."""
    engine = Engine(layout, comm, table=table)
    history = train(engine, steps)
    weights = {(name, start): values.clone() for name, ranges in engine.weight_ranges().items()
               for start, values in ranges}
    engine.free()
    return history, weights


def differs(found, expected, comm):
    """Say of a run if it differs in any bit, on any rank, from another on these ranks or from that of one rank."""
    (history, weights), (right, whole) = found, expected
    is_same = history == right and all(
        torch.equal(values, whole[name, start] if (name, start) in whole else whole[name][start:start + len(values)])
        for (name, start), values in weights.items())
    return None if all(comm.allgather(is_same)) else "not the same bits"


def calls_of(calls):
    """Return counted calls as text."""
    return ", ".join(f"{name} {count}" for name, count in sorted(calls.items()))


def report(title, comm, found):
    """Print what differs; return how many."""
    wrong = {layout: what for layout, what in found.items() if what}
    if comm.rank == 0:
        for layout, what in wrong.items():
            print(f"DIFFERS {layout}: {what}")
        print(f"{time.strftime('%H:%M:%S')} {comm.size} ranks, {title}: {len(found)} layouts, {len(wrong)} differ")
        sys.stdout.flush()
    return len(wrong)


if __name__ == "__main__":
    launch(main)

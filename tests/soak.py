"""Every layout of this launch's ranks, for the long test: against the reference, and bit for bit in ``exact``.

    mpiexec -n N python tests/soak.py
"""

import random
import sys
import time

import pytest
import torch
from tiny import GROUPED, alone, one_for_every_degrees, reference_steps, tiny, train

from mpillm.comm import library, shared
from mpillm.comm.probe import only
from mpillm.comm.world import comm_world, launch
from mpillm.errors import OK, VALIDATION
from mpillm.plan import LIBRARY, WINDOW
from mpillm.train.compare import all_layouts, compare_layout, describe
from mpillm.train.engine import Engine

MODELS = {
    "as many key/value heads": {},
    "one key/value head, tied": {**GROUPED["shared"], "model.tie_embeddings": True},
    "straddling groups, masked": {**GROUPED["straddling"], "data.mask_documents": True},
}
EXACT = {"train.numerics": "exact", "train.dtype": "float32", "train.steps": 20}


def main():
    """Compare all; return the exit code."""
    comm, differing = comm_world(), 0
    torch.set_num_threads(1)
    for name, model in MODELS.items():
        differing += against_reference(tiny(model), f"{name}, 5 steps in float64", comm)
        differing += against_one_rank(tiny({**model, **EXACT}), f"{name}, 20 steps in exact float32", comm)
    late = tiny({**EXACT, "train.steps": 500, "model.num_layers": 4})
    differing += with_delays(late, "500 steps in exact float32, ranks late at random", comm)
    return VALIDATION if differing else OK


def against_reference(config, title, comm):
    """Return how many layouts differ from the serial reference beyond the tolerance."""
    batches, expected = reference_steps(config, 5, comm)
    return report(title, comm, {describe(layout.layout): compare_layout(layout, comm, batches, expected).first
                                for layout in all_layouts(config, comm.size)})


def against_one_rank(config, title, comm):
    """Return how many layouts differ in any bit from the run of one rank."""
    history, whole = alone(config, comm, 20)
    found = {}
    for layout in all_layouts(config, comm.size):
        engine = Engine(layout, comm)
        same = train(engine, 20) == history
        same &= all(torch.equal(values, whole[name][start:start + len(values)])
                    for name, ranges in engine.weight_ranges().items() for start, values in ranges)
        engine.free()
        found[describe(layout.layout)] = None if all(comm.allgather(same)) else "not the same bits"
    return report(title, comm, found)


def with_delays(config, title, comm):
    """Return how many runs of 500 steps, in which ranks are late at random, differ in any bit from that of one rank."""
    history, whole = alone(config, comm, 500)
    late, found = random.Random(comm.rank), {}

    def delayed(function):
        def call(*args):
            if late.random() < 0.02:
                time.sleep(late.random() * 0.005)
            return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.Node, "barrier", delayed(shared.Node.barrier))
        patch.setattr(library.Library, "_call", delayed(library.Library._call))
        for algorithm in (WINDOW, LIBRARY):
            for layout in one_for_every_degrees(config, comm.size):
                engine = Engine(layout, comm, table=only(algorithm))
                same = train(engine, 500) == history
                same &= all(torch.equal(values, whole[name][start:start + len(values)])
                            for name, ranges in engine.weight_ranges().items() for start, values in ranges)
                engine.free()
                same = all(comm.allgather(same))
                found[f"{describe(layout.layout)} {algorithm}"] = None if same else "not the same bits"
    return report(title, comm, found)


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

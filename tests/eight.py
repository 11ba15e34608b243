"""A layout that splits all three axes, on eight ranks: near the serial reference in float64, the bits of one rank in exact.

    mpiexec -n 8 python tests/eight.py

Exits with 1 where they differ.
"""

from dataclasses import replace

import torch
from helpers import assert_all
from tiny import alone, reference_steps, tiny, train

import mpillm
from mpillm.comm.world import comm_world
from mpillm.config import Layout
from mpillm.planner.keys import describe
from mpillm.train.engine import Engine
from mpillm.verify.compare import compare_layout

STEPS = 2
LAYOUTS = {
    "fast": {"layout.schedule": "1f1b", "layout.sequence_parallel": True, "layout.zero": 1},
    "zero bubble": {"layout.schedule": "zb-h1", "layout.order": ["tensor", "pipeline", "data"], "layout.zero": 0},
    "exact": {"train.numerics": "exact", "train.dtype": "float32", "layout.recompute": "full"},
}


def main():
    torch.set_num_threads(1)
    comm = comm_world()
    for name, more in LAYOUTS.items():
        config = tiny({"model.num_layers": 4, "layout.data": 2, "layout.pipeline": 2, "layout.tensor": 2, **more},
                      comm.size)
        fault = differing_bits(config, comm) if name == "exact" else difference(config, comm)
        assert_all(fault is None, f"{name}: {fault}", comm)
        if comm.rank == 0:
            print(f"agrees {name}: {describe(config.layout)}")


def difference(config, comm):
    """Return what differs from the serial reference beyond 1e-10, or None."""
    batches, expected = reference_steps(config, STEPS, comm)
    found = compare_layout(config, comm, batches, expected)
    return found.first and str(found)


def differing_bits(config, comm):
    """Return which weights of this rank, or which losses, have other bits than one rank's run gives them, or None."""
    whole_model = replace(config, layout=Layout())
    history, whole = alone(whole_model, comm, STEPS)
    engine = Engine(config, comm)
    losses = train(engine, STEPS)
    wrong = [name for name, ranges in engine.weight_ranges().items() for start, values in ranges
             if not torch.equal(values, whole[name][start:start + len(values)])]
    engine.free()
    return wrong or (None if losses == history else (losses, history))


if __name__ == "__main__":
    mpillm.launch(main)

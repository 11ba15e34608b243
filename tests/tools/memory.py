"""Memory of every rank beside its prediction: every pipeline schedule, microbatches in flight, layout and way to recompute.

    mpiexec -n N python tests/tools/memory.py [WORD ...]

Prints a line for the fullest rank of every case whose name contains all WORDs: predicted, measured, their ratio, and that of
activations alone; the exit code says whether each prediction is within 5 % or 1 MB. What is measured is exact and repeats: what
PyTorch's allocator handed out, and shared memory, each window counted to the ranks that share it in equal parts. What MPI and
the interpreter take is not in it.
"""

import gc
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mpillm.comm import handover, shared
from mpillm.comm.devices import onednn_gains
from mpillm.comm.world import comm_world, set_threads
from mpillm.config import Config
from mpillm.machine import Level, Machine
from mpillm.planner.layout_costs import Candidate, Pricer
from mpillm.planner.synthesis import synthesise
from mpillm.train.engine import Engine
from mpillm.verify.compare import batches

MODEL = {"vocab_size": 2048, "hidden_size": 192, "ffn_size": 512, "num_layers": 8, "num_heads": 6}
TRAIN = {"seq_len": 128, "microbatch": 2, "dtype": "float32", "device": "cpu", "eval_every": 0, "checkpoint_every": 0}
BIASES = {"model.attention_bias": True, "model.output_bias": True, "model.ffn_bias": True}
KEYED = {  # models whose layers keep other things
    "plain layers": {"model.norm": "layer", "model.positions": "learned", "model.ffn": "gelu", **BIASES},
    "parallel": {"model.norm": "layer", "model.residual": "parallel", "model.ffn": "gelu", **BIASES},
    "norms of heads": {"model.qk_norm": "head", "model.num_kv_heads": 2},
    "norms of all heads": {"model.qk_norm": "whole", "model.norm_placement": "output"},
    "masked words": {"model.norm": "layer", "model.norm_placement": "post", "model.ffn": "gelu", "model.head": "masked",
                     "model.attention": "bidirectional", "model.embedding_norm": True, "model.tie_embeddings": True},
    "pooled classes": {"model.norm": "layer", "model.norm_placement": "post", "model.attention": "bidirectional",
                       "model.head": "classes", "model.num_labels": 40, "model.pooler": True},
    "window and cap": {"model.window": 16, "model.ffn": "geglu", "model.norm_offset": True, "model.logit_softcap": 30.0},
}
CLOSE, FEW_BYTES = 0.05, 1e6
STEPS, STEPS_SPAN = 2, "steps"
MEMORY_EVENT = "[memory]"  # as the profiler calls what PyTorch takes or gives back


class Row(NamedTuple):
    """Bytes of a pipeline rank: predicted and measured, and those of the prediction that are always there."""

    place: int
    predicted: float
    measured: float
    fixed: float

    @property
    def activations(self):
        """Return what of the prediction is not always there, beside what of the measured is not."""
        return (self.predicted - self.fixed) / (self.measured - self.fixed)


class Windows:
    """Counts the bytes of shared memory that this rank answers for."""

    def __init__(self):
        self.n_bytes = 0

    @contextmanager
    def counted(self):
        """Count all windows that are made meanwhile, and the slots of handovers that are used."""
        allocate, set_aside = shared.Node._allocate, handover.set_aside

        def counting(node, sizes, is_set_aside=True):
            self.n_bytes += sum(sizes) / len(sizes) if is_set_aside else 0
            return allocate(node, sizes, is_set_aside)

        def counting_slot(slot):
            self.n_bytes += slot.nbytes
            return set_aside(slot)

        shared.Node._allocate, handover.set_aside = counting, counting_slot
        try:
            yield
        finally:
            shared.Node._allocate, handover.set_aside = allocate, set_aside


def peak_bytes(events):
    """Return the most bytes that were in use at once during the steps.

    Before, weights have memory that nobody writes to, until they lie in their buffers; the system gives none for that.
    """
    began_ns = next(e.start_ns() for e in events if e.name() == STEPS_SPAN)
    most = now = 0
    for event in sorted((e for e in events if e.name() == MEMORY_EVENT), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now if event.start_ns() >= began_ns else 0)
    return most


def measured_bytes(config, comm):
    """Return what a few steps took on this rank at most, what of PyTorch's memory is left when the engine is freed, and the
    pipeline rank. Collective."""
    gc.collect()  # what is let go of later must not count as given back
    windows = Windows()
    with windows.counted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine = Engine(config, comm)
        with record_function(STEPS_SPAN):
            for batch in batches(config, STEPS):
                engine.train_step(batch.part, config.train.lr)
        coordinate = engine.mesh.coord("pipeline")
        engine.free()
    events = recorded.profiler.kineto_results.events()
    left = sum(event.nbytes() for event in events if event.name() == MEMORY_EVENT)
    return peak_bytes(events) + windows.n_bytes, left, coordinate


def machine_of(comm):
    """Return a machine of one node, or of as many as ranks where nothing is shared."""
    is_shared = shared.make_node(comm)
    if is_shared:
        is_shared.free()
    level = Level("node", comm.size, 1e-6, 1e-9)
    levels = (level,) if is_shared else (Level("core", 1, 1e-6, 1e-9), level)
    return Machine("any", "made up", levels, ((32, 1e9),), 1e15, 1e10, shares_memory=bool(is_shared),
                   adds_in_parts=onednn_gains(comm, torch.device("cpu"), torch.float32))


def synthesised(pipeline, microbatches):
    """Return a schedule of no textbook, made for uneven times, as a file that is read like any other."""
    times = [[1.0 + 0.3 * rank, 1.2, 0.8] for rank in range(pipeline)]
    made = synthesise(pipeline, microbatches, *map(list, zip(*times)), 0.2, memory_limit=pipeline + 1)
    path = Path(tempfile.gettempdir()) / f"mpillm-memory-{pipeline}-{microbatches}.txt"
    path.write_text(made.schedule.to_text(), encoding="utf-8")
    return str(path)


def cases(ranks):
    """Yield names and overrides."""
    for schedule in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "synthesised") if ranks > 1 else ():
        for microbatches in (ranks, ranks + 1, ranks + 2, ranks + 4):
            for recompute in ("none", "full"):
                yield f"{schedule} microbatches={microbatches} {recompute}", {
                    "layout.pipeline": ranks, "layout.schedule": schedule, "layout.chunks": 1 + (schedule == "interleaved"),
                    "layout.recompute": recompute, "train.global_batch": 2 * microbatches}
    splits = [{"layout.data": ranks}, {"layout.tensor": ranks}, {"layout.tensor": ranks, "layout.sequence_parallel": True},
              {"layout.pipeline": ranks}]
    if ranks == 4:
        splits += [{"layout.data": 2, "layout.pipeline": 2}, {"layout.data": 2, "layout.tensor": 2},
                   {"layout.data": 2, "layout.tensor": 2, "layout.sequence_parallel": True},
                   {"layout.pipeline": 2, "layout.tensor": 2},
                   {"layout.pipeline": 2, "layout.tensor": 2, "layout.sequence_parallel": True}]
    for split in splits if ranks > 1 else [{}]:
        shape = " ".join(f"{key.removeprefix('layout.')}={value}" for key, value in split.items())
        for name, more in {
            "": {}, "selective": {"layout.recompute": "selective"}, "full": {"layout.recompute": "full"},
            "tied": {"model.tie_embeddings": True}, "zero=0": {"layout.zero": 0}, "exact": {"train.numerics": "exact"},
            "grouped": {"model.num_kv_heads": 2}, "bfloat16": {"train.dtype": "bfloat16"},
            "large head": {"model.vocab_size": 32768}, "sgd": {"train.optimizer": "sgd"},
            "documents": {"data.mask_documents": True}, **KEYED,
        }.items():
            yield f"{shape} {name}", {**split, **more, "train.global_batch": 4 * ranks}


def config_of(overrides, comm):
    """Return the resolved configuration of a case. Collective."""
    config = Config.from_dict({"model": MODEL, "train": TRAIN, "data": {"path": "no such file"}}, overrides)
    if overrides.get("layout.schedule") == "synthesised":
        pipeline = overrides["layout.pipeline"]
        path = synthesised(pipeline, config.train.global_batch // config.train.microbatch) if comm.rank == 0 else None
        config = config.with_values({"layout.schedule": comm.bcast(path)})
    return config.resolve(comm.size)


def compare(config, machine, comm):
    """Return a :class:`Row` of every pipeline rank, each of the fullest of its data and tensor ranks. Collective."""
    measured, _, stage = measured_bytes(config, comm)
    layout = config.layout
    asked = Candidate(layout.data, layout.pipeline, layout.tensor, layout.chunks, layout.schedule, config.train.microbatch,
                   layout.zero, layout.sequence_parallel, layout.recompute, layout.order)
    pricer = Pricer(config, machine, comm.size)
    predicted = pricer.memory_bytes(asked)
    fixed = np.broadcast_to(pricer.footprint.fixed(asked, pricer.stage_sizes(asked)), predicted.shape)
    fullest = {}
    for place, taken in comm.allgather((stage, float(measured))):
        fullest[place] = max(taken, fullest.get(place, 0.0))
    return [Row(place, float(predicted[place]), taken, float(fixed[place])) for place, taken in sorted(fullest.items())]


def is_close(row):
    """Tell whether a prediction is good enough."""
    return abs(row.predicted - row.measured) <= max(CLOSE * row.measured, FEW_BYTES)


def main():
    """Print the table."""
    comm = comm_world()
    set_threads(comm)
    machine, words, wrong = machine_of(comm), sys.argv[1:], 0
    for name, overrides in cases(comm.size):
        if not all(word in name for word in words):
            continue
        rows = compare(config_of(overrides, comm), machine, comm)
        wrong += sum(not is_close(row) for row in rows)
        if comm.rank == 0:
            shown = "  ".join(f"{row.predicted / 1e6:8.2f} {row.measured / 1e6:8.2f} {row.predicted / row.measured:5.3f} "
                              f"{row.activations:5.3f}" + (" " if is_close(row) else "!") for row in rows)
            print(f"{name:45} {shown}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

"""Runs on samples with labels, and runs that start from other runs' weights with another head."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, MODEL, TRAIN

import mpillm
from mpillm.config import Config
from mpillm.data.samples import training_order
from mpillm.errors import CheckpointError, on_rank_0
from mpillm.train.run import Run
from mpillm.verify.compare import ReferenceTrainer

DRAW = np.random.default_rng(1)
TOKENS = DRAW.integers(0, 257, (60, 12))
TAGS = np.where(DRAW.random(TOKENS.shape) < 0.3, -100, TOKENS % 5)
LENGTHS = DRAW.integers(3, 13, 60)
HEAD = {"head": "tags", "num_labels": 5, "attention": "bidirectional"}


@pytest.fixture
def path(comm, comm_path):
    """A sample file of tags."""

    def write():
        mpillm.write_samples(comm_path / "samples.h5", "train", TOKENS[:40], TAGS[:40], LENGTHS[:40])
        mpillm.write_samples(comm_path / "samples.h5", "validation", TOKENS[40:], TAGS[40:], LENGTHS[40:])

    on_rank_0(comm, "write", write)
    return comm_path / "samples.h5"


def config_for(path, name, layout, **train):
    train = {**TRAIN, "run_dir": str(path.parent / name), **train}
    return Config.from_dict({"model": {**MODEL, **HEAD}, "train": train, "data": {"path": str(path)}}, layout)


def test_a_run_on_labels_trains_and_evaluates_as_the_reference_does(comm, path):
    config = config_for(path, "tags", LAYOUTS[comm.size], eval_every=3, eval_batches=0, steps=3)
    run = Run(config, comm)
    reference = ReferenceTrainer(run.config)
    metrics = []
    for step in range(3):
        numbers = range(9 * step, 9 * step + 9)
        order = order_of(run, numbers)
        wanted = reference.step(*run.train_source.read(order, numbers))[0]
        metrics.append(next(iter(run)))
        assert_all(metrics[-1]["loss"] == pytest.approx(wanted, rel=1e-11), f"step {step}", comm)
    every = list(range(20))
    samples = run.validation_source.read(every, every)
    tensors = [None if each is None else torch.as_tensor(each) for each in samples]
    wanted = reference.reference.loss(*tensors).item()
    assert_all(metrics[-1]["validation_loss"] == pytest.approx(wanted, rel=1e-9), metrics[-1], comm)
    chosen = reference.reference.logits(tensors[0], *tensors[2:]).argmax(-1).numpy()
    counted = samples.targets >= 0
    right = (chosen == samples.targets)[counted].mean()
    assert_all(metrics[-1]["accuracy"] == pytest.approx(right) and 0 < metrics[-1]["macro_f1"] <= 1, metrics[-1], comm)
    run.free()


def order_of(run, numbers):
    """Which samples a step takes."""
    return training_order(run.train_source.num_samples, run.config.train.seed, numbers.start, len(numbers), run.sample_order)


def test_a_body_gets_another_head(comm, path):
    """The body is that of the first run, to the bit; the head is the one that a fresh run has."""
    first = Run(config_for(path, "first", LAYOUTS[comm.size], checkpoint_every=1, steps=2), comm)
    list(first)
    trained = weights_of(first, comm)
    first.free()
    again = {"model.num_labels": 7, **LAYOUTS[comm.size]}
    fresh = Run(config_for(path, "fresh", again), comm)
    wanted = weights_of(fresh, comm)
    fresh.free()
    with pytest.warns(UserWarning, match="its head tags stays behind, a new one") if comm.rank == 0 else nullcontext():
        second = Run(config_for(path, "second", again, init_from=str(path.parent / "first")), comm)
    found = weights_of(second, comm)
    second.free()
    for name, values in found.items():
        right = wanted if name.startswith("head.") else trained
        assert_all(torch.equal(values, right[name]), name, comm)
    with pytest.raises(CheckpointError, match="weights of another model: ffn_size = 54 .this run: 55."):
        Run(config_for(path, "third", {**again, "model.ffn_size": 55}, init_from=str(path.parent / "first")), comm)


def weights_of(run, comm):
    """All weights whole, on every rank."""
    parts = {}
    for own in comm.allgather({name: [(start, values.clone()) for start, values in ranges]
                               for name, ranges in run.engine.weight_ranges().items()}):
        for name, ranges in own.items():
            parts.setdefault(name, {}).update(ranges)
    return {name: torch.cat([ranges[start] for start in sorted(ranges)]) for name, ranges in parts.items()}

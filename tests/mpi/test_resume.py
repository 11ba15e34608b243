"""Stop and go on: the same bytes at the same layout, the same curve at another; and what must be refused."""

import hashlib
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, configure, everything, same, tiny, unpack, write_token_file

from mpillm.checkpoint.saving import _write_manifest
from mpillm.config import Config
from mpillm.errors import DataError, MpillmError
from mpillm.guard.stop import StopRequest
from mpillm.inference.engine import Engine
from mpillm.inference.requests import Request, Sampling
from mpillm.model.parameters import is_frozen
from mpillm.train import optimizers
from mpillm.train.learning_rate import learning_rate
from mpillm.train.run import Run

pytestmark = pytest.mark.mpi

# Two layouts of N ranks each, to stop at one and go on at the other; None is one rank.
MOVES = {
    "1 to N": lambda n: (None, {"layout.data": n}),
    "N to 1": lambda n: (LAYOUTS[n], None),
    "pipeline to tensor": lambda n: ({"layout.pipeline": n}, {"layout.tensor": n}),
    "zero 0 to 1": lambda n: ({"layout.data": n, "layout.zero": 0}, {"layout.data": n, "layout.zero": 1}),
    "zero 1 to 0": lambda n: ({"layout.data": n, "layout.zero": 1}, {"layout.data": n, "layout.zero": 0}),
}


def run(comm, path, name, steps, layout=None, **more):
    """Train ``name`` up to step ``steps`` of 6; return the losses."""
    config = tiny(configure(path, name, **(layout or LAYOUTS[comm.size]), **more))
    trainer, losses = Run(config, comm), []
    while trainer.step_number < steps:
        losses.append(trainer.step()["loss"])
    trainer.save()
    trainer.free()
    return losses


def run_at(layout, comm, path, name, steps, **more):
    """Train as :func:`run`, at a layout of all ranks or, if None, on one of them; return the losses on all."""
    if layout is not None:
        return run(comm, path, name, steps, layout, **more)
    alone = comm.Split(comm.rank, 0)
    losses = run(alone, path, name, steps, **more) if comm.rank == 0 else None
    alone.Free()
    return comm.bcast(losses)


def test_a_checkpoint_that_names_no_order_goes_on_in_that_of_its_time(comm, data_path, monkeypatch):
    """Checkpoints held the digest of the whole file of tokens then."""
    with monkeypatch.context() as patch:
        patch.setattr("mpillm.train.run.ORDER", "permutation")
        whole, losses = run(comm, data_path, "whole", 6), run(comm, data_path, "parts", 3)
    if comm.rank == 0:
        folder = data_path / "parts" / "checkpoints" / "step-00000003"
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["data"]["order"], manifest["data"]["fingerprint"], manifest["sha256"]
        manifest["data"]["sha256"] = hashlib.sha256((data_path / "tokens.h5").read_bytes()).hexdigest()
        _write_manifest(folder, manifest)
    comm.Barrier()
    losses += run(comm, data_path, "parts", 5) + run(comm, data_path, "parts", 6)  # the last from one of today's
    assert_all(losses == whole and same(data_path, "whole", "parts"), f"{losses} {whole}", comm)
    assert_all(run(comm, data_path, "other", 2) != whole[:2], "both orders are the same", comm)


@pytest.mark.parametrize(("optimizer", "dtype"), [
    ("adamw", "float64"), ("adamw", "bfloat16"), ("adam", "float32"), ("sgd", "float64"), ("rmsprop", "float64"),
    ("adagrad", "float64"),
])
def test_resumed_equals_unbroken_bit_for_bit(comm, data_path, optimizer, dtype):
    more = {"train.optimizer": optimizer, "train.dtype": dtype}
    whole = run(comm, data_path, "whole", 6, **more)
    parts = run(comm, data_path, "parts", 3, **more) + run(comm, data_path, "parts", 6, **more)
    assert_all(parts == whole and same(data_path, "whole", "parts"), f"{parts} {whole}", comm)


@pytest.mark.parametrize(("move", "optimizer", "dtype"), [
    ("1 to N", "adamw", "float64"), ("N to 1", "adam", "float32"), ("pipeline to tensor", "adamw", "float32"),
    ("zero 0 to 1", "adam", "float64"), ("zero 1 to 0", "adamw", "float32"),
])
def test_resume_at_other_layouts_and_rank_counts(comm, data_path, move, optimizer, dtype):
    (before, after), more = MOVES[move](comm.size), {"train.dtype": dtype, "train.optimizer": optimizer}
    tolerance = {"float64": 1e-10, "float32": 1e-6}[dtype]
    whole = run_at(before, comm, data_path, "whole", 4, **more)
    found = run_at(before, comm, data_path, "moved", 2, **more) + run_at(after, comm, data_path, "moved", 4, **more)
    assert_all(np.allclose(found, whole, rtol=tolerance, atol=0), f"{found} {whole}", comm)


FROZEN = {"train.freeze": ["embedding.*", "layers.0.*", "*norm*"], "train.lr_factors": {"head.*": 2.0}}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_frozen_weights_are_in_checkpoints_and_stay_as_they_were_loaded(comm, data_path, dtype):
    """With nothing beside them, whatever else is trained or restored; and a run on other layouts goes on from them."""
    run(comm, data_path, "first", 2, **{"train.dtype": dtype})
    more = {**FROZEN, "train.dtype": dtype, "train.init_from": str(data_path / "first")}
    whole = run(comm, data_path, "whole", 6, **more)
    parts = run(comm, data_path, "parts", 3, **more) + run(comm, data_path, "parts", 6, **more)
    first, last = everything(data_path, "first"), everything(data_path, "whole")
    frozen = {name for _, name in last if is_frozen(name, FROZEN["train.freeze"])}
    as_is = [torch.from_numpy(first["weight", name]).to(getattr(torch, dtype)).to(torch.from_numpy(first["weight", name]).dtype)
             for name in frozen]
    kept = all(np.array_equal(last["weight", name], values) for name, values in zip(frozen, as_is))
    moved = all(not np.array_equal(last["weight", name], first["weight", name]) for kind, name in last if name not in frozen)
    apart = all(kind == "weight" for kind, name in last if name in frozen)
    assert_all(len(frozen) > 9 and kept and moved and apart, f"{frozen} {kept} {moved} {apart}", comm)
    assert_all(parts == whole and same(data_path, "whole", "parts"), f"{parts} {whole}", comm)


class Forgetful:
    """Makes a resume forget something, by patching what it reads."""

    @staticmethod
    def moments(monkeypatch):
        restore = optimizers.ShardedOptimizer.restore
        monkeypatch.setattr(optimizers.ShardedOptimizer, "restore", lambda self, read, step: restore(
            self, lambda kind, piece: read(kind, piece) * (kind == "weight"), step))

    @staticmethod
    def optimizer_step(monkeypatch):
        restore = optimizers.ShardedOptimizer.restore
        monkeypatch.setattr(optimizers.ShardedOptimizer, "restore", lambda self, read, step: restore(self, read, 0))

    @staticmethod
    def rate_step(monkeypatch):
        monkeypatch.setattr("mpillm.train.run.learning_rate", lambda train, step: learning_rate(train, step - 3))

    @staticmethod
    def cursor(monkeypatch):
        load = Run._load

        def forget(self, start):
            load(self, start)
            self.samples_seen = 0

        monkeypatch.setattr(Run, "_load", forget)


@pytest.mark.parametrize("forget", ["moments", "optimizer_step", "rate_step", "cursor"])
def test_forgetting_anything_is_seen(comm, data_path, forget, monkeypatch):
    run(comm, data_path, "whole", 6)
    run(comm, data_path, "parts", 3)
    getattr(Forgetful, forget)(monkeypatch)
    run(comm, data_path, "parts", 6)
    assert_all(not same(data_path, "whole", "parts"), f"nothing seen though {forget} was forgotten", comm)


@pytest.mark.parametrize("lacks", [(), ("kind", "rope_theta", "seq_len", "skipped")])
def test_a_run_of_version_0_1_0_goes_on(comm, data_path, lacks):
    """What that version wrote; and what one would have written that knew some keys less, which have their defaults."""
    folder = data_path / "kept"
    if comm.rank == 0:
        unpack("v0.1.0", folder, lacks)
    comm.Barrier()
    expected = json.loads((folder / "expected.json").read_text())
    layout = {1: {}, 2: {"layout.tensor": 2}, 3: {"layout.data": 3}, 4: {"layout.data": 2, "layout.tensor": 2}}[comm.size]
    words = {"data.path": str(folder / "tokens.h5"), "train.run_dir": str(folder / "run"), **layout}
    trainer = Run(Config.load(folder / "config.toml", words), comm)
    assert_all(trainer.step_number == 2, trainer.step_number, comm)
    found = list(trainer)
    trainer.free()
    for line, kept in zip(found, expected["metrics"], strict=True):
        equal = all(line[key] == pytest.approx(value, rel=2e-6) for key, value in kept.items())
        assert_all(equal, f"{line} {kept}", comm)
    kept = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert_all(kept == [1, 2, 3, 4], kept, comm)


@pytest.mark.parametrize("lacks", [(), ("kind", "rope_theta")])
def test_weights_of_version_0_1_0_generate(comm, data_path, lacks):
    folder = data_path / "kept"
    if comm.rank == 0:
        unpack("v0.1.0", folder, lacks)
    comm.Barrier()

    def listing():
        return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))

    before = listing()
    part = comm.Split(comm.rank // 2)  # for the model has two heads and one layer
    engine = Engine(folder / "run", part, {"layout.tensor": part.size})
    result, = engine.generate([Request("", [111, 110, 101], 1, Sampling(logprobs=300), ignore_ends=True)])
    engine.free()
    part.Free()
    expected = np.array(json.loads((folder / "expected.json").read_text())["next_logits"])
    found = np.array([value for _, value in sorted(result.top_logprobs[0])])[:len(expected)]
    assert_all(found - found[0] == pytest.approx(expected - expected[0], abs=1e-6), found, comm)
    assert_all(listing() == before, "who only reads a run wrote to it", comm)


@pytest.mark.parametrize("change, word", [
    ({"model.ffn_size": 55}, "ffn_size"), ({"train.optimizer": "sgd"}, "optimizer"), ({"train.seed": 1}, "seed"),
    ({"train.seq_len": 10}, "seq_len"), ({"train.freeze": ["layers.0.*"]}, r"train.freeze = \[\], this run has .*init_from"),
])
def test_another_run_is_refused(comm, data_path, change, word):
    run(comm, data_path, "first", 2)
    with pytest.raises(MpillmError, match=word):
        Run(tiny(configure(data_path, "first", **LAYOUTS[comm.size], **change)), comm)


def test_other_tokens_are_refused(comm, data_path):
    run(comm, data_path, "first", 2)
    if comm.rank == 0:
        write_token_file(data_path / "tokens.h5", seed=1)
    comm.Barrier()
    with pytest.raises(MpillmError, match="SHA-256"):
        Run(tiny(configure(data_path, "first", **LAYOUTS[comm.size])), comm)


def test_metrics_of_steps_done_again_are_replaced(comm, data_path):
    """A run that died between two checkpoints leaves lines behind its newest one."""
    run(comm, data_path, "run", 2)
    path = data_path / "run" / "metrics.jsonl"
    if comm.rank == 0:
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    comm.Barrier()
    config = tiny(configure(data_path, "run", **LAYOUTS[comm.size], **{"train.steps": 4}))
    trainer = Run(config, comm)
    done = [metrics["step"] for metrics in trainer]
    trainer.free()
    comm.Barrier()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert_all(done == [3, 4] and steps == [1, 2, 3, 4], f"{done} {steps}", comm)


def test_metrics_are_there_before_the_checkpoint_of_their_step(comm, data_path, monkeypatch):
    trainer = Run(tiny(configure(data_path, "run", **LAYOUTS[comm.size], **{"train.checkpoint_every": 2})), comm)
    save, lines = trainer.save, []

    def watched():
        lines.append(len((data_path / "run" / "metrics.jsonl").read_text().splitlines()))
        return save()

    monkeypatch.setattr(trainer, "save", watched)
    for _ in trainer:
        pass
    trainer.free()
    assert_all(comm.rank > 0 or lines == [2, 4, 6], lines, comm)


def test_metrics_that_cannot_be_written_are_an_error_of_files(comm, data_path, monkeypatch):
    trainer = Run(tiny(configure(data_path, "run", **LAYOUTS[comm.size])), comm)
    if comm.rank == 0:
        monkeypatch.setattr(trainer._metrics, "_file", open("/dev/full", "ab"))
        with pytest.raises(DataError, match="metrics.jsonl.*No space left"):
            trainer._metrics.add({"step": 1})
        monkeypatch.undo()
    trainer.free()


def test_weights_to_start_from(comm, data_path):
    run(comm, data_path, "first", 3)
    config = tiny(configure(data_path, "second", **LAYOUTS[comm.size], **{"train.init_from": str(data_path / "first")}))
    trainer = Run(config, comm)
    trainer.save()
    trainer.free()
    left, right = everything(data_path, "first"), everything(data_path, "second")
    weights = [key for key in left if key[0] == "weight"]
    equal = all(np.array_equal(left[key], right[key]) for key in weights)
    assert_all(weights and equal and trainer.step_number == 0, "weights differ", comm)


@pytest.mark.parametrize("during", ["training", "evaluation", "start"])
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(comm, data_path, during, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    more = {"train.eval_every": 3, "train.steps": 6, "train.checkpoint_every": 0, **LAYOUTS[comm.size]}
    whole, parts = (tiny(configure(data_path, f"{name}-{during}", **more)) for name in ("whole", "parts"))
    unbroken = Run(whole, comm)
    losses = [metrics["loss"] for metrics in unbroken]
    unbroken.free()

    def interrupt():
        if comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        stop = StopRequest()
        trainer, found = Run(parts, comm, stop=stop), []
        if during == "start":
            interrupt()
        if during == "evaluation":
            evaluate = trainer.evaluate
            monkeypatch.setattr(trainer, "evaluate", lambda: (interrupt(), evaluate())[1])
        for metrics in trainer:
            found.append(metrics["loss"])
            if during == "training" and metrics["step"] == 2:
                interrupt()
        expected = {"start": 0, "training": 2, "evaluation": 3}[during]
        assert_all(trainer.stopped_by == "SIGUSR1" and trainer.step_number == expected, trainer.step_number, comm)
        assert_all("validation_loss" not in metrics if found else True, found, comm)
        trainer.free()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    resumed = Run(parts, comm)
    assert_all(resumed.step_number == expected, resumed.step_number, comm)
    found += [metrics["loss"] for metrics in resumed]
    resumed.free()
    comm.Barrier()
    kept = [[{key: line.get(key) for key in ("step", "loss", "validation_loss", "bits_per_byte")} for line in
             map(json.loads, (data_path / f"{name}-{during}" / "metrics.jsonl").read_text().splitlines())]
            for name in ("whole", "parts")]
    assert_all(kept[0] == kept[1] and kept[0][2]["validation_loss"] and kept[0][5]["validation_loss"], kept, comm)
    assert_all(found == losses and same(data_path, f"whole-{during}", f"parts-{during}"), f"{found} {losses}", comm)


def test_the_walltime_is_a_request_to_stop(comm, data_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    now = time.time()
    try:
        far = StopRequest({"SLURM_JOB_START_TIME": str(now - 10), "SLURM_JOB_END_TIME": str(now + 1000)})
        near = StopRequest({"SLURM_JOB_START_TIME": str(now - 1000), "SLURM_JOB_END_TIME": str(now + 90)})
        assert_all(far.agreed(comm) is None and StopRequest({}).agreed(comm) is None, "too early", comm)
        assert_all(near.agreed(comm) == "the walltime", "too late", comm)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

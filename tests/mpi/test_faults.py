"""What goes wrong on one rank is one decision of all: bad numbers, flipped bits, damaged files, calls that differ."""

import errno
import json
import math
import os
import re
import time
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, configure, everything, same, tiny

from mpillm import comm as mpi
from mpillm.checkpoint import reading, saving
from mpillm.comm.group import Group
from mpillm.comm.recorder import RESTING
from mpillm.errors import CollectiveError, DataError, MpillmError, NumbersError
from mpillm.guard import stragglers
from mpillm.pipeline import stage
from mpillm.train.run import Run

pytestmark = pytest.mark.mpi


def make(comm, path, name, **more):
    return Run(tiny(configure(path, name, **{**LAYOUTS[comm.size], **more})), comm)


@pytest.mark.parametrize("where", ["data", "stragglers", "agree"])
def test_an_error_that_a_script_catches_leaves_the_rank_at_rest(comm, data_path, monkeypatch, where):
    """The watchdog is to leave alone who does something else then; and the run goes on."""
    every_rank_reads = {"layout.data": comm.size, "layout.pipeline": 1, "layout.tensor": 1}
    trainer = make(comm, data_path, f"caught-{where}", **every_rank_reads, **{"train.hang_limit_s": 60.0})
    trainer.step()
    failing = {"data": (trainer.train_source, "read"), "stragglers": (trainer.stragglers, "end_step"),
               "agree": (trainer, "stop")}[where]
    monkeypatch.setattr(*failing, Mock(side_effect=DataError("planted"),
                                       **{"agreed.side_effect": DataError("planted")}))
    with pytest.raises(DataError, match="planted"):
        next(iter(trainer)) if where == "agree" else trainer.step()
    recorder = trainer.engine.mesh.recorder
    assert_all(recorder.kind == RESTING and not recorder._open, recorder.kind, comm)
    assert_all(comm.size == 1 or trainer.watchdog.limit_of(recorder.kind) == math.inf, "still watched", comm)
    monkeypatch.undo()
    before = trainer.step_number
    assert_all(trainer.step()["step"] == before + 1, "does not go on", comm)
    trainer.free()


def held(trainer):
    """Copies of all weights and state of this rank."""
    return [tensor.clone() for _, kinds in trainer.engine.optimizer.state() for tensor in kinds.values()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_on_one_rank_change_nothing_on_any(comm, data_path, monkeypatch, value):
    trainer = make(comm, data_path, f"run{value}", **{"train.skip_limit": 2})
    trainer.step()
    before = held(trainer)
    reduce = trainer.engine.gradients.reduce

    def spoilt():
        found = reduce()
        if comm.rank == comm.size - 1:
            next(iter(found.values()))[0] = value
        return found

    monkeypatch.setattr(trainer.engine.gradients, "reduce", spoilt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = trainer.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, held(trainer)))
    assert_all(unchanged and not math.isfinite(metrics["grad_norm"]), metrics, comm)
    assert_all(comm.rank > 0 or any("left out" in str(w.message) for w in caught), caught, comm)
    monkeypatch.undo()
    trainer.step()  # which is none of those in a row
    trainer.save()
    monkeypatch.setattr(trainer.engine.gradients, "reduce", spoilt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.step()
        with pytest.raises(NumbersError, match="2 steps in a row.*checkpoint is of step 3"):
            trainer.step()
    monkeypatch.undo()
    trainer.free()


def test_weights_that_went_bad_leave_good_checkpoints_to_go_on_from(comm, data_path):
    """The update of step 5 is of finite gradients, and what it leaves is not: its checkpoint is as bad as the next."""
    good = {"train.checkpoint_every": 1, "train.checkpoint_keep": 1, "train.steps": 4, "train.lr_schedule": "constant"}
    bad = {**good, "train.steps": 20, "train.lr": 1e38, "train.warmup_steps": 0, "train.dtype": "float32",
           "train.grad_clip": 0.0}
    folder = data_path / "run" / "checkpoints"

    def trained(**more):
        trainer = make(comm, data_path, "run", **{"train.dtype": "float32", **more})
        try:
            return trainer.step_number, [metrics["loss"] for metrics in trainer]
        finally:
            trainer.free()
            comm.Barrier()

    trained(**good)
    assert_all([path.name[-1] for path in reading.complete_checkpoints(folder)] == ["3", "4"], os.listdir(folder), comm)
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(NumbersError, match="checkpoint is of step 4: start again"):
            warnings.simplefilter("ignore")
            trained(**bad)
        names = sorted(os.listdir(folder))
        assert_all("step-00000004" in names and "step-00000005.bad" in names, names, comm)
        comm.Barrier()
    first, losses = trained(**{**good, "train.steps": 12})  # as the message says, with a lower rate
    assert_all(first == 4 and np.isfinite(losses).all(), f"{first} {losses}", comm)
    assert_all(sorted(os.listdir(folder)) == ["step-00000011", "step-00000012"], os.listdir(folder), comm)


def test_what_one_rank_cannot_read_just_now_is_waited_for_and_no_older_one_taken(comm, data_path, monkeypatch):
    trainer = make(comm, data_path, "run", **{"train.checkpoint_every": 2, "train.steps": 4})
    for _ in trainer:
        pass
    trainer.free()
    original, left = reading.open_to_read, [2]

    def failing(path):
        if comm.rank == comm.size - 1 and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(path)

    monkeypatch.setattr(reading, "open_to_read", failing)
    monkeypatch.setattr(reading, "PAUSES_S", (0.0, 0.0))
    resumed = make(comm, data_path, "run")
    assert_all(resumed.step_number == 4, resumed.step_number, comm)
    resumed.free()
    left[0] = 100
    with pytest.raises(MpillmError, match=r"step-00000004.*\[Errno 116\] Stale file handle") as caught:
        make(comm, data_path, "run")
    assert_all(caught.value.exit_code == 74, caught.value, comm)


def test_a_run_that_left_a_step_out_resumes_bit_for_bit(comm, data_path, monkeypatch):
    for name, stop in (("whole", None), ("parts", 3)):
        trainer = make(comm, data_path, name)
        while trainer.step_number < 5:
            clip = trainer.engine.gradients.clip
            if trainer.step_number == 1:
                monkeypatch.setattr(trainer.engine.gradients, "clip", lambda *_: math.nan)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    trainer.step()
                monkeypatch.setattr(trainer.engine.gradients, "clip", clip)
            else:
                trainer.step()
            if trainer.step_number == stop:
                trainer.save()
                trainer.free()
                trainer = make(comm, data_path, name)
        trainer.save()
        trainer.free()
    assert_all(same(data_path, "whole", "parts"), "differ", comm)


@pytest.mark.parametrize("what, bit, before", [  # bit 62 is of the exponent: nothing is finite after it
    ("weight", 62, "step"), ("exp_avg", 40, "step"), ("weight", 40, "save"),
])
def test_a_flipped_bit_is_found_and_named(comm, data_path, what, bit, before):
    trainer = make(comm, data_path, "run", **{"train.digests": True})
    trainer.step()
    trainer.step()
    if comm.rank == comm.size - 1:
        piece, kinds = next(iter(trainer.engine.optimizer.state()))
        kinds[what].view(torch.int64)[0] ^= 1 << bit
    with pytest.raises(MpillmError, match="has changed since the last update") as caught:
        getattr(trainer, before)()
    named = what in str(caught.value) and (piece.name if comm.rank == comm.size - 1 else "") in str(caught.value)
    located = comm.size == 1 or f"failed on ranks [{comm.size - 1}] of" in str(caught.value)
    assert_all(named and located, caught.value, comm)
    assert_all(not reading.complete_checkpoints(data_path / "run" / "checkpoints"), "saved", comm)
    trainer.free()


def test_a_wrong_update_is_outvoted(comm, data_path):
    if comm.size < 3:
        pytest.skip("fewer than three replicas have no majority")
    layout = {"layout.data": comm.size, "layout.pipeline": 1, "layout.tensor": 1, "layout.zero": 0}
    trainer = make(comm, data_path, "run", **layout, **{"train.digests": True})
    trainer.step()
    if comm.rank == 1:
        piece, kinds = next(iter(trainer.engine.optimizer.state()))
        kinds["weight"][0] += 1
        trainer.engine.digests.take()  # as if the update had come to this
    with pytest.raises(MpillmError, match=r"failed on ranks \[1\].*is not what most replicas hold") as caught:
        trainer.step()
    assert_all(comm.rank != 1 or f"weight {piece.name}" in str(caught.value), caught.value, comm)
    trainer.free()


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "swapped", "manifest", "keys"])
def test_resume_takes_the_newest_whole_checkpoint(comm, data_path, damage):
    name = f"run-{damage}"
    trainer = make(comm, data_path, name, **{"train.checkpoint_every": 2, "train.steps": 4})
    for _ in trainer:
        pass
    trainer.free()
    newest = data_path / name / "checkpoints" / "step-00000004"
    if comm.rank == 0:
        files = sorted(newest.glob("*.h5"))
        raw = files[-1].read_bytes()
        if damage == "flipped":
            with reading.h5py.File(files[-1], "a") as file:
                file.visititems(lambda where, item: item.__setitem__(0, item[0] + 1) if hasattr(item, "shape") and len(
                    item) else None)
        elif damage == "cut":
            files[-1].write_bytes(raw[:len(raw) // 2])
        elif damage == "missing":
            files[-1].unlink()
        elif damage == "swapped":
            files[-1].write_bytes((newest.parent / "step-00000002" / files[-1].name).read_bytes())
        elif damage == "keys":  # though its digest matches
            manifest = json.loads((newest / "manifest.json").read_text())
            del manifest["data"], manifest["sha256"]
            saving._write_manifest(newest, manifest)
        else:
            (newest / "manifest.json").write_text("{}")
    comm.Barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = make(comm, data_path, name, **{"train.checkpoint_every": 2, "train.steps": 4})
    assert_all(resumed.step_number == 2, resumed.step_number, comm)
    assert_all(comm.rank > 0 or any("step-00000004" in str(w.message) for w in caught), caught, comm)
    whole = make(comm, data_path, "whole", **{"train.checkpoint_every": 2, "train.steps": 4})
    for trainer in (resumed, whole):
        for _ in trainer:
            pass
        trainer.free()
    assert_all(same(data_path, name, "whole"), "the weights differ", comm)
    with pytest.raises(DataError if damage in ("manifest", "keys") else MpillmError):
        if comm.rank == 0:
            (newest / "manifest.json").unlink(missing_ok=True)
        comm.Barrier()
        Run(tiny(configure(data_path, name, **LAYOUTS[comm.size])), comm, resume=str(newest))


def test_a_full_disk_is_an_error_of_all_and_costs_no_checkpoint(comm, data_path, monkeypatch):
    trainer = make(comm, data_path, "run")
    trainer.step()
    kept = trainer.save()
    trainer.step()
    write = saving._write_file

    def full(path, shards):
        if comm.rank == comm.size - 1:
            raise OSError(28, "No space left on device")
        return write(path, shards)

    monkeypatch.setattr(saving, "_write_file", full)
    with pytest.raises(MpillmError, match="No space left") as caught:
        trainer.save()
    assert_all(caught.value.exit_code == 74, caught.value, comm)
    assert_all(reading.complete_checkpoints(data_path / "run" / "checkpoints") == [kept], "announced", comm)
    monkeypatch.undo()
    trainer.save()
    trainer.free()


@pytest.mark.parametrize("what", ["listing", "contents"])
def test_all_ranks_resume_from_one_checkpoint(comm, data_path, what, monkeypatch):
    """One rank sees old listings, or cannot read the newest file."""
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    more = {"train.checkpoint_every": 2, "train.steps": 4}
    trainer = make(comm, data_path, "run", **more)
    for _ in trainer:
        pass
    trainer.free()
    found, read = reading.complete_checkpoints, reading.Checkpoint._read_shard

    def unreadable(self, *shard):
        if self.step == 4:
            raise reading.CheckpointError("Input/output error")
        return read(self, *shard)

    if comm.rank == comm.size - 1:
        if what == "listing":
            monkeypatch.setattr(reading, "complete_checkpoints", lambda folder: found(folder)[:-1])
        else:
            monkeypatch.setattr(reading.Checkpoint, "_read_shard", unreadable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = make(comm, data_path, "run", **more)
    assert_all(resumed.step_number == {"listing": 4, "contents": 2}[what], resumed.step_number, comm)
    resumed.free()


@pytest.mark.parametrize("then", ["save", "free"])
def test_a_save_that_is_pending_is_finished(comm, data_path, then):
    trainer = make(comm, data_path, "run", **{"train.checkpoint_background": True})
    trainer.step()
    kept = [trainer.save()]
    if then == "save":
        trainer.step()
        kept.append(trainer.save())
    trainer.free()
    comm.Barrier()
    assert_all(reading.complete_checkpoints(data_path / "run" / "checkpoints") == kept, kept, comm)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("of the thread")])
def test_a_save_that_failed_is_told_once_and_the_next_is_not_disturbed(comm, data_path, error, monkeypatch):
    trainer = make(comm, data_path, "run", **{"train.checkpoint_background": True})
    trainer.step()
    with monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr(saving, "_write_file", Mock(side_effect=error))
        trainer.save()
        trainer._saving._thread.join()
    with pytest.raises(MpillmError, match=f"{type(error).__name__}.*{error.args[-1]}") as caught:
        trainer.save()
    assert_all(caught.value.exit_code == 74, caught.value, comm)
    kept = [trainer.save()]
    trainer.free()
    comm.Barrier()
    assert_all(reading.complete_checkpoints(data_path / "run" / "checkpoints") == kept, kept, comm)


def test_checkpoints_in_the_background_hold_the_same(comm, data_path, monkeypatch):
    """Also where copying takes far longer than a step: the update waits for it."""
    copied = saving.Saving._copied
    monkeypatch.setattr(saving.Saving, "_copied", lambda *arguments: (time.sleep(0.2), copied(*arguments))[1])
    runs = {"front": False, "back": True}
    for name, is_background in runs.items():
        more = {"train.checkpoint_every": 2, "train.steps": 6, "train.checkpoint_background": is_background}
        trainer = make(comm, data_path, name, **more)
        for _ in trainer:
            pass
        trainer.free()
    for step in (2, 4, 6):
        found = [everything(data_path, f"{name}/checkpoints/step-{step:08d}") for name in runs]
        assert_all(all(np.array_equal(found[0][key], found[1][key]) for key in found[0]), step, comm)


@pytest.mark.parametrize("fault", ["operation", "reduction", "dtype", "shape", "root", "none"])
def test_checked_mode_names_both_calls(comm, fault):
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    group, is_other = Group(comm.Clone(), "data", is_checked=True), comm.rank == comm.size - 1
    x = torch.ones(6)
    mpi.allreduce(x, group)
    calls = {
        "operation": lambda: mpi.bcast(x, group) if is_other else mpi.allreduce(x, group),
        "reduction": lambda: mpi.allreduce(x, group, "max" if is_other else "sum"),
        "dtype": lambda: mpi.allreduce(x.double() if is_other else x, group),
        "shape": lambda: mpi.allreduce(torch.ones(7) if is_other else x, group),
        "root": lambda: mpi.bcast(x, group, root=int(is_other)),
        "none": lambda: mpi.allgather(torch.ones(comm.rank), group),
    }
    if fault == "none":
        calls[fault]()
    else:
        with pytest.raises(CollectiveError, match=f"call 2 of axis data.*rank 0 .*rank {comm.size - 1} ") as caught:
            calls[fault]()
        assert_all(str(caught.value).count("test_faults.py") == 2, caught.value, comm)
    group.free()


@pytest.mark.parametrize("then", ["next step", "end"])
def test_checked_mode_finds_a_call_left_out_before_one_that_is_alike(comm, then):
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    group, is_other = Group(comm.Clone(), "data", is_checked=True), comm.rank == comm.size - 1
    group.recorder.begin_step(1)
    mpi.allreduce(torch.ones(6), group)
    mpi.allreduce(torch.ones(6), group)  # the second of the others: the last rank has left out its first
    with pytest.raises(CollectiveError, match="call 3 of axis data.*rank 0 calls allreduce sum .* in step 1 at.*"
                       f"rank {comm.size - 1} calls {'allreduce' if then == 'next step' else 'free'}"):
        if is_other and then == "end":
            group.free()
        if is_other:
            group.recorder.begin_step(2)
        mpi.allreduce(torch.ones(6), group)
    group.recorder.begin_step(3)
    group.free()


def test_a_rank_that_holds_up_the_others_is_named_with_its_work(comm, data_path, monkeypatch):
    if comm.size == 1:
        pytest.skip("one rank has nobody to hold up")
    monkeypatch.setattr(stragglers, "EVERY", 2)
    monkeypatch.setattr(stragglers, "LEAST_S", 0.0)
    trainer = make(comm, data_path, "run", **{"train.steps": 12, "train.microbatch": 3})
    forward, slow_from = stage.Stage.forward, 6

    now_s = [0.0]  # of a clock that what else runs on this machine does not move

    def sleeping(self, *work):  # balanced because all do nothing else
        is_slow = comm.rank == comm.size - 1 and trainer.step_number >= slow_from
        now_s[0] += 0.2 if is_slow else 0.05
        return forward(self, *work)

    monkeypatch.setattr(stage.Stage, "forward", sleeping)
    for module in ("recorder", "collectives", "bound"):  # which take from a span what its collectives waited
        monkeypatch.setattr(f"mpillm.comm.{module}.time", SimpleNamespace(perf_counter=lambda: now_s[0], time=time.time))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(slow_from):
            trainer.step()
        too_early = list(caught)
        for _ in range(4):
            trainer.step()
    told = [str(w.message) for w in caught if "holds up the others" in str(w.message)]
    wanted = [rf"rank {comm.size - 1} on .* of own work a step, .* most of it in F"] * (comm.rank == 0)
    assert_all(not too_early, too_early, comm)
    assert_all(len(told) == len(wanted) and all(map(re.fullmatch, wanted, told)), told, comm)
    trainer.free()

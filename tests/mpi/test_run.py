"""A run's folder and its evaluation: what is counted, what is kept, and refusals that all ranks agree on."""

import json
import math
import os
import warnings

import h5py
import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, configure, tiny, write_token_file

from mpillm.data.tokens import TokenFile
from mpillm.errors import MpillmError
from mpillm.report.records import read_trace
from mpillm.train.run import Run
from mpillm.verify.reference import Reference

pytestmark = [pytest.mark.mpi, pytest.mark.parts]


def start(comm, path, name="run", resume="auto", **more):
    """Open the run ``name``; ``__`` stands for the dot of a key."""
    more = {key.replace("__", "."): value for key, value in more.items()}
    return Run(tiny(configure(path, name, **{**LAYOUTS[comm.size], **more})), comm, resume)


def train(comm, path, name="run", resume="auto", **more):
    """Train to the end; return the metrics of the last step."""
    trainer = start(comm, path, name, resume, **more)
    *_, metrics = trainer
    trainer.free()
    comm.Barrier()
    return metrics


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_going_back_behind_newer_checkpoints_is_refused(comm, data_path):
    """They would push the new ones out, and be taken for the newest."""
    train(comm, data_path, train__steps=4, train__checkpoint_every=1)
    older, before = data_path / "run" / "checkpoints" / "step-00000002", contents(data_path / "run")
    with pytest.raises(MpillmError, match=r"step 2.*step-00000003, step-00000004.*another train\.run_dir"):
        start(comm, data_path, resume=str(older))
    comm.Barrier()
    assert_all(contents(data_path / "run") == before, "a refused run wrote", comm)
    moved = data_path / older.name
    if comm.rank == 0:
        older.rename(moved)
    comm.Barrier()
    with pytest.raises(MpillmError, match="step-00000003, step-00000004"):  # wherever the older one lies
        start(comm, data_path, resume=str(moved))
    for name, resume, steps in (("other", moved, 3), ("run", data_path / "run", 5)):
        metrics = train(comm, data_path, name, str(resume), train__steps=steps)
        kept = sorted(path.name for path in (data_path / name / "checkpoints").iterdir())
        assert_all((metrics["step"], kept[-1]) == (steps, f"step-{steps:08d}"), f"{metrics} {kept}", comm)


@pytest.mark.parametrize("lacking", ["metrics.jsonl", "checkpoints"])
def test_a_used_directory_is_never_begun_anew(comm, data_path, lacking):
    train(comm, data_path, train__steps=1)
    if comm.rank == 0:
        (data_path / "run" / lacking).rename(data_path / "away")
    comm.Barrier()
    with pytest.raises(MpillmError, match="--resume never: .*run holds a run already"):
        start(comm, data_path, resume="never")


def test_tokens_are_counted_over_a_change_of_the_batch(comm, data_path):
    seen = [train(comm, data_path, train__steps=2)["tokens"],
            train(comm, data_path, train__steps=3, train__global_batch=6)["tokens"]]
    assert_all(seen == [2 * 9 * 12, (2 * 9 + 6) * 12], seen, comm)


@pytest.mark.parametrize(("batches", "samples"), [(0, 16), (1, 9), (5, 16)])
def test_an_evaluation_against_an_independent_count(comm, data_path, batches, samples):
    """Of the first samples in order, a last short batch included, though the run itself never evaluates."""
    trainer = start(comm, data_path, train__eval_batches=batches)
    found = trainer.evaluate()
    trainer.free()
    with h5py.File(data_path / "tokens.h5") as file:
        tokens = torch.as_tensor(file["validation/tokens"][:].astype("int64"))
    rows = torch.stack([tokens[12 * i:12 * i + 13] for i in range(samples)])
    with torch.no_grad():
        loss = Reference(trainer.config.model, 0).loss(rows[:, :-1], rows[:, 1:]).item()
    wanted = {"validation_loss": loss, "bits_per_byte": loss / math.log(2) * 200 / 600}
    assert_all(found == pytest.approx(wanted, rel=1e-11), f"{found} {wanted}", comm)


def test_nothing_to_evaluate_on(comm, data_path):
    if comm.rank == 0:
        write_token_file(data_path / "tokens.h5", validation=5)
    comm.Barrier()
    trainer = start(comm, data_path)
    with pytest.raises(MpillmError, match="validation split has 5 tokens"):
        trainer.evaluate()
    trainer.free()


@pytest.mark.parametrize("mask", [False, True])
def test_stages_in_the_middle_read_no_tokens(comm, data_path, monkeypatch, mask):
    """And a run of them gives the losses of a run without any."""
    read, samples, train__mask = [], TokenFile.samples, {"data__mask_documents": mask, "train__steps": 2}
    monkeypatch.setattr(TokenFile, "samples", lambda *arguments: (read.append(arguments), samples(*arguments))[1])
    found = train(comm, data_path, "pipeline", train__eval_every=2, layout__data=1, layout__tensor=1,
                  layout__pipeline=comm.size, **train__mask)
    is_outer = comm.rank in (0, comm.size - 1)
    assert_all(bool(read) == is_outer, f"{len(read)} times", comm)
    whole = train(comm, data_path, "whole", train__eval_every=2, **train__mask)
    assert_all(all(found[key] == pytest.approx(whole[key], rel=1e-11) for key in ("loss", "validation_loss")),
               f"{found} {whole}", comm)


def change_tokens(comm, path, change):
    """Let rank 0 change the file of tokens."""
    if comm.rank == 0:
        with h5py.File(path / "tokens.h5", "a") as file:
            change(file)
    comm.Barrier()


@pytest.mark.parametrize("change", [
    lambda file: file["validation"].attrs.__delitem__("bytes"),
    lambda file: file["validation"].attrs.__setitem__("bytes", 0),
    lambda file: [file[split].attrs.__delitem__("bytes") for split in file if split != "tokenizer"],
])
def test_tokens_that_are_no_text_have_a_loss_but_no_bits_per_byte(comm, data_path, change):
    change_tokens(comm, data_path, change)
    metrics = train(comm, data_path, train__steps=2, train__eval_every=1)
    assert_all(metrics["validation_loss"] > 0 and "bits_per_byte" not in metrics, metrics, comm)


@pytest.mark.parametrize("has_group", [True, False])
def test_without_validation_tokens_nothing_is_evaluated(comm, data_path, has_group):
    def change(file):
        del file["validation" if not has_group else "validation/tokens"]
        if has_group:
            file["validation/tokens"] = np.empty(0, np.uint16)

    change_tokens(comm, data_path, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = train(comm, data_path, train__steps=2, train__eval_every=1)
    said = [str(warning.message) for warning in caught if "nothing is evaluated" in str(warning.message)]
    assert_all("validation_loss" not in metrics and metrics["step"] == 2, metrics, comm)
    assert_all(len(said) == (comm.rank == 0) and all("--validation-fraction" in text for text in said), said, comm)


@pytest.mark.parametrize("line", ["text", "[1]", '{"loss": 1}', '{"step": "1"}', "\udcff"])
def test_lines_that_are_no_metrics(comm, data_path, line):
    folder = data_path / "run"
    if comm.rank == 0:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n', errors="surrogateescape")
    comm.Barrier()
    before = contents(folder)
    with pytest.raises(MpillmError, match=r"metrics\.jsonl, line 2: not the metrics"):
        start(comm, data_path)
    comm.Barrier()
    assert_all(contents(folder) == before, "a refused run wrote", comm)


def test_metrics_that_cannot_be_written_stay_as_they_are(comm, data_path, monkeypatch):
    train(comm, data_path, train__steps=2)
    path, replace = data_path / "run" / "metrics.jsonl", os.replace
    before = path.read_text()

    def fail(source, target):
        if str(target) == str(path):
            raise OSError("planted")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(MpillmError, match="run cannot be written, choose another: planted"):
            start(comm, data_path)
    assert_all(path.read_text() == before, path.read_text(), comm)
    assert_all([json.loads(text)["step"] for text in before.splitlines()] == [1, 2], before, comm)


def test_a_trace_that_one_rank_cannot_write(comm, data_path):
    if comm.rank == 0:
        (data_path / "run" / "trace" / "rank-00000.jsonl").mkdir(parents=True)
    comm.Barrier()
    with pytest.raises(MpillmError, match=r"set train\.trace = false: .*rank-00000\.jsonl"):
        start(comm, data_path, train__trace=True)


def test_the_trace_of_a_finished_run_holds_its_last_evaluation_and_save(comm, data_path):
    """After its last step, ahead of the one that would follow; and that step stays complete."""
    train(comm, data_path, train__steps=2, train__eval_every=1, train__trace=True, train__checkpoint_every=1)
    folder = data_path / "run" / "trace"
    lines = (folder / f"rank-{comm.rank:05d}.jsonl").read_text().splitlines()
    spans = [record for record in map(json.loads, lines) if "kind" in record]
    found = [(span["step"], span["kind"], span["name"]) for span in spans if span["kind"] in ("evaluate", "save")]
    between = [("evaluate", "validation"), ("save", "checkpoint"), ("save", "announce")]
    assert_all(found == [(step, *span) for step in (2, 3) for span in between], found, comm)
    (launch,) = read_trace(folder)
    kinds = {span.kind for own in launch.steps[2] for span in own}
    assert_all(list(launch.steps) == [1, 2] and "update" in kinds and "evaluate" not in kinds, launch.steps, comm)

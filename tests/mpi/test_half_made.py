"""Constructors that fail half-way give back what they have acquired: communicators, windows, threads, files."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest
from helpers import assert_all
from mpi4py import MPI
from tiny import LAYOUTS, configure, tiny

from mpillm.comm.group import as_group
from mpillm.errors import DataError, MpillmError, ScheduleError, agreed, half_made
from mpillm.inference import engine as inference
from mpillm.train import engine
from mpillm.train.run import Run

pytestmark = [pytest.mark.mpi, pytest.mark.parts]
TRIES, PATIENCE_S = 3, 60.0


class Counted(MPI.Intracomm):
    """A communicator that counts those that come from it, while they live."""

    live = 0

    def Clone(self):
        Counted.live += 1
        return super().Clone()

    def Split(self, *args):
        Counted.live += 1
        return Counted(super().Split(*args))

    def Split_type(self, *args):
        Counted.live += 1
        return Counted(super().Split_type(*args))

    def Free(self):
        Counted.live -= 1
        super().Free()


def held():
    """What this process holds and has to give back, by kind."""
    gc.collect()
    names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return {"communicators": Counted.live,
            "windows": sum("/dev/shm" in line for line in Path("/proc/self/maps").read_text().splitlines()),
            "threads": sum(thread.name == "watchdog" for thread in threading.enumerate()),
            "files": sum(name.endswith("jsonl") for name in names)}


def refuse_on_last(comm):
    """Return what fails on the last rank alone."""
    def refuse(*_):
        if comm.rank == comm.size - 1:
            raise DataError("planted")

    return refuse


def raise_error(error):
    raise error


def run(comm, path, **more):
    return Run(tiny(configure(path, "run", **LAYOUTS[comm.size], **{"train.trace": True, **more})), comm)


def weights_that_are_missing(comm, path, patch):
    run(comm, path, **{"train.init_from": "no such run"})


def metrics_that_are_none(comm, path, patch):
    (path / "run").mkdir(exist_ok=True)
    (path / "run" / "metrics.jsonl").write_text("text\n")
    comm.Barrier()
    run(comm, path)


def a_description_that_cannot_be_written(comm, path, patch):
    patch.setattr(Run, "_describe", lambda self: raise_error(OSError("planted")))
    run(comm, path)


def a_trace_that_one_rank_cannot_write(comm, path, patch):
    (path / "run" / "trace" / f"rank-{comm.size - 1:05d}.jsonl").mkdir(parents=True, exist_ok=True)
    comm.Barrier()
    run(comm, path)


def a_schedule_that_is_refused(comm, path, patch):
    patch.setattr(engine, "check", lambda schedule: raise_error(ScheduleError("planted")))
    engine.Engine(tiny(LAYOUTS[comm.size]).resolve(comm.size), comm, path / "trace")




@pytest.mark.parametrize("fail", [weights_that_are_missing, metrics_that_are_none, a_schedule_that_is_refused,
                                  a_description_that_cannot_be_written, a_trace_that_one_rank_cannot_write])
def test_what_was_acquired_is_given_back(comm, data_path, fail, monkeypatch):
    counted = Counted(comm)
    as_group(counted)  # which is kept with the communicator
    before = held()
    for _ in range(TRIES):
        with monkeypatch.context() as patch, pytest.raises(MpillmError):
            fail(counted, data_path, patch)
    deadline = time.monotonic() + PATIENCE_S  # for the watchdogs to see that they are to end
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert_all(held() == before, f"{before} before, {held()} after {TRIES} tries", comm)


def test_a_run_may_be_freed_twice(comm, data_path):
    counted = Counted(comm)
    as_group(counted)
    before = held()
    trainer = run(counted, data_path)
    during = held()
    trainer.step()
    for _ in range(2):
        trainer.free()
    kinds = ("communicators", "files") if comm.size > 1 else ("files",)  # one rank needs no communicator
    assert_all(all(during[kind] > before[kind] for kind in kinds), during, comm)
    assert_all(held() | {"threads": 0} == before, f"{before} {held()}", comm)


def test_an_engine_that_cannot_read_gives_back(comm, data_path, monkeypatch):
    trainer = run(comm, data_path)
    trainer.save()
    trainer.free()
    counted = Counted(comm)
    as_group(counted)
    before = held()
    monkeypatch.setattr(inference, "load_weights", refuse_on_last(comm))
    for _ in range(TRIES):
        with pytest.raises(MpillmError, match="planted"):
            inference.Engine(data_path / "run", counted)
    assert_all(held() == before, f"{before} {held()}", comm)


def test_after_a_bug_of_one_rank_nothing_is_done_together(comm):
    """The others are elsewhere: what has to be given back by all would wait for them for ever."""
    given = []
    for error, wanted in ((DataError("agreed"), ["second", "first"]),
                          (KeyError("bug"), [] if comm.size > 1 else ["second", "first"]), (None, [])):
        given.clear()
        try:
            with half_made(comm) as made:
                made.callback(given.append, "first")
                made.callback(given.append, "second")
                with agreed(comm, "work"):
                    if error:
                        raise error
        except (DataError, KeyError):
            pass
        assert_all(given == wanted, f"{error}: {given}", comm)

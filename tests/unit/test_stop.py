"""A signal to the launcher, at any moment of a job: it leaves with 85, and goes on to the same weights."""

import os
import signal
import time
from pathlib import Path

import pytest
import tomli_w
from helpers import run_mpi
from tiny import MODEL, same, write_token_file

from mpillm.comm.single import SingleComm
from mpillm.guard import stop

TRAIN = {"steps": 8, "seq_len": 12, "global_batch": 9, "microbatch": 2, "eval_every": 3, "checkpoint_every": 2}
FAULTY = Path(__file__).parents[1] / "faulty.py"


@pytest.mark.parametrize("start", [["-m", "mpillm"], ["-c", "from mpillm.__main__ import main; main()"]], ids=["-m", "script"])
def test_a_request_waits_from_the_first_lines_on(tmp_path, start):
    """What takes time to start comes after: here the first module that is not Python's own asks."""
    asks = "import os, signal\nfor number in (signal.SIGUSR1, signal.SIGTERM): os.kill(os.getpid(), number)\n"
    (tmp_path / "click.py").write_text(asks + "raise SystemExit(str(signal.sigpending()))")
    path = os.pathsep.join([str(tmp_path), str(Path(stop.__file__).parents[2])])
    job = run_mpi(0, [*start, "train", "config.toml"], cwd=tmp_path, env={"PYTHONPATH": path})
    assert job.returncode == 1 and "SIGUSR1" in job.stderr and "SIGTERM" in job.stderr, job
    assert run_mpi(0, [*start, "data", "train"], cwd=tmp_path, env={"PYTHONPATH": path}).returncode == -signal.SIGUSR1


@pytest.mark.launches
@pytest.mark.slow
def test_a_signal_to_the_launcher_leads_to_85_at_any_moment(tmp_path):
    write_token_file(tmp_path / "tokens.h5")
    config = {"model": MODEL, "data": {"path": "tokens.h5"}, "train": TRAIN, "layout": {"data": 2}}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))

    def train(name, *fault, **more):
        words = [FAULTY, *fault] if fault else ["-m", "mpillm"]
        return run_mpi(2, [*words, "train", "config.toml", "--train.run_dir", name], cwd=tmp_path, **more)

    def send(job):
        deadline = time.monotonic() + 180
        while len(list(tmp_path.glob("now-*"))) < asking and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):  # as where launcher and batch system both pass it on
            job.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
        (tmp_path / "sent").touch()

    assert train("whole").returncode == 0
    for moment, asked_at, stopped_after in (("start", 0, 0), ("step", 3, 3), ("save", 4, 4), ("evaluate", 6, 6)):
        for left in [*tmp_path.glob("now-*"), *tmp_path.glob("sent")]:
            left.unlink()
        asking = 2 if moment == "start" else 1
        job = train("parts", f"ask-{moment}", 1, asked_at, meanwhile=send)
        assert job.returncode == 85, (moment, job.stderr)
        assert f"stopped by SIGUSR1 after step {stopped_after};" in job.stderr
    assert train("parts").returncode == 0
    assert same(tmp_path, "parts", "whole")


def test_who_insists_for_long_ends_the_process(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in stop.SIGNALS}
    raised = []
    try:
        stop.StopRequest({})
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # would end this process were it not a repeat
        now = time.monotonic() + stop.REPEATS_S
        monkeypatch.setattr(stop.time, "monotonic", lambda: now + 1)
        monkeypatch.setattr(stop.signal, "raise_signal", raised.append)
        handler = signal.getsignal(signal.SIGTERM)
        handler(signal.SIGTERM, None)
        assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


NEVER = float("inf")


@pytest.mark.parametrize("ends_in_s, slurm, near_in_s", [
    (1000, None, 880),
    (90, None, 0),
    (-600, None, NEVER),  # over before this began, and nobody to ask: the shell of an ended job
    (-600, "exit 1", NEVER),
    (-600, "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", NEVER),
    (-600, "true", NEVER),  # squeue no longer lists it
    (-600, -600, NEVER),  # OverTimeLimit
    (-600, 3000, 2880),  # the limit was raised
    (-600, 60, 0),
    (90, 3000, 2880),
    (90, 90, 0),
    (90, "true", NEVER),  # cancelled, and its shell lives on
    (90, "echo N/A", 0),
    (90, "sleep 60", 0),
    ("soon", None, NEVER), ("nan", None, NEVER), ("", None, NEVER),
])
def test_one_variable_of_a_launcher_is_not_believed_against_all_else(tmp_path, monkeypatch, ends_in_s, slurm, near_in_s):
    """What Slurm said at the start of a job may be old, of another job, or nothing; squeue answers, or not."""
    now = time.time()
    end = ends_in_s if isinstance(ends_in_s, str) else str(int(now + ends_in_s))
    answer = f"[ $SLURM_TIME_FORMAT = %s ] && echo {now + slurm:.0f}" if isinstance(slurm, int) else slurm
    if answer:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}" if answer else str(tmp_path))
    monkeypatch.setattr(stop, "_ANSWER_S", 0.5 if slurm == "sleep 60" else 30.0)
    walltime = stop.Walltime({"SLURM_JOB_ID": "7", "SLURM_JOB_START_TIME": str(int(now - 7200)),
                              "SLURM_JOB_END_TIME": end})
    for later_s in (1, 500, 900, 2500, 2900):
        monkeypatch.setattr(stop.time, "time", lambda: now + later_s)
        assert walltime.is_near() == (later_s > near_in_s), later_s


def test_signals_are_given_back(monkeypatch):
    """Unless all have agreed to stop: a launcher may then send SIGTERM to whoever leaves last."""
    handlers = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        with pytest.raises(ZeroDivisionError), stop.StopRequest({}) as request:
            assert signal.getsignal(signal.SIGTERM) == request._note
            1 / 0
        assert handlers == {number: signal.getsignal(number) for number in stop.SIGNALS}
        with stop.StopRequest({}) as request:
            signal.raise_signal(signal.SIGUSR1)
            assert request.agreed(SingleComm()) == "SIGUSR1"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

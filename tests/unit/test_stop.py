"""A signal to the launcher, at any moment of a job: it leaves with 85, and goes on to the same weights."""

import signal
import time
from pathlib import Path

import pytest
import tomli_w
from helpers import run_mpi
from tiny import MODEL, same, write_token_file

from mpillm.guard import stop

TRAIN = {"steps": 8, "seq_len": 12, "global_batch": 9, "microbatch": 2, "eval_every": 3, "checkpoint_every": 2}
FAULTY = Path(__file__).parents[1] / "faulty.py"


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
        deadline = time.monotonic() + 30
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

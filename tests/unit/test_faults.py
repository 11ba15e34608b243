"""Jobs with a fault planted on one rank: they end soon, say where, lose nothing, and go on to the same weights."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from helpers import AS_ROOT, OVERSUBSCRIBE, SLOWER, mpiexec, run_mpi
from tiny import MODEL, same, write_token_file

from mpillm.checkpoint.reading import complete_checkpoints

pytestmark = [pytest.mark.launches, pytest.mark.slow]  # under Open MPI in tests/soak.sh

RANKS, LIMIT_S = 3, 10.0
TRAIN = {"steps": 6, "seq_len": 12, "global_batch": 9, "microbatch": 2, "eval_every": 0, "checkpoint_every": 2,
         "hang_limit_s": LIMIT_S}  # of what is new, as all is in a run of six short steps
WHOLE_S = {}  # what an unbroken run takes
TESTS = Path(__file__).parents[1]
FAULTY = TESTS / "faulty.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults")
    write_token_file(path / "tokens.h5")
    config = {"model": {**MODEL, "num_layers": 4}, "data": {"path": "tokens.h5"}, "train": TRAIN,
              "layout": {"data": 1, "pipeline": RANKS, "tensor": 1}}
    (path / "config.toml").write_text(tomli_w.dumps(config))
    start = time.monotonic()
    assert train(path, "whole").returncode == 0
    WHOLE_S["took"] = time.monotonic() - start
    return path


def train(path, name, *fault, options=()):
    words = [FAULTY, *fault] if fault else ["-m", "mpillm"]
    return run_mpi(RANKS, [*words, "train", "config.toml", "--train.run_dir", name, *options], cwd=path)


def goes_on(path, name, step):
    """Whether the newest checkpoint is of ``step`` and the run goes on from it to the weights of the unbroken one."""
    kept = complete_checkpoints(path / name / "checkpoints")
    assert [int(found.name[5:]) for found in kept][-1:] == ([step] if step else [])
    resumed = train(path, name)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from step {step}" in resumed.stderr if step else "starting" in resumed.stderr
    return same(path, name, "whole")


@pytest.mark.parametrize("kind, within_s", [("kill", 10), ("raise", 5), ("stop", LIMIT_S + 10)])
def test_a_fault_in_a_step_ends_the_job_and_says_where(folder, kind, within_s):
    start = time.monotonic()
    job = train(folder, kind, kind, 1, 5)
    assert job.returncode not in (0, 85)
    assert time.monotonic() - start < WHOLE_S["took"] + within_s * SLOWER
    assert ("wrote nothing" in job.stderr) == (kind == "stop"), job.stderr  # else no watchdog has to end it
    if kind == "kill":  # the others are ended before they could say anything: the launcher names it, as it can
        named = r"PID \d+ RUNNING AT \S+\s+=\s+EXIT CODE: 9|rank 1 with PID \d+ on node \S+\s+exited\s+on\s+signal 9"
        assert re.search(named, job.stdout + job.stderr), job.stdout + job.stderr
    if kind == "raise":
        assert re.search(r"\[rank 1/3 [^]]+\] step 5, in \d[BI]\d: Traceback", job.stderr), job.stderr
        assert "RuntimeError: planted" in job.stderr
        assert job.stderr.count("planted") <= 2  # the message, and the line of source in the traceback
    if kind == "stop":
        assert "ranks [1] wrote nothing" in job.stderr and "rank 0 on" in job.stderr and "rank 2 on" in job.stderr
        told = run_mpi(0, ["-m", "mpillm", "diagnose", kind], cwd=folder)
        assert told.returncode == 0 and "ranks [1] wrote nothing" in told.stdout
    assert goes_on(folder, kind, 4)


@pytest.mark.parametrize("kind, said", [
    ("skip", r"axis world, call \d+, allreduce: ranks \[0, 2\] are in it, ranks \[1\] have not come to it: rank 1 on"),
    ("other-op", r"axis world, call \d+: .* rank 0 allreduce, rank 1 bcast, rank 2 allreduce"),
])
def test_a_rank_that_calls_something_else_is_named_with_the_call(folder, kind, said):
    job = train(folder, kind, kind, 1, 5, options=["--layout.data", RANKS, "--layout.pipeline", 1, "--layout.zero", 0,
                                                   "--train.hang_limit_s", LIMIT_S / 2])
    assert job.returncode not in (0, 85)
    assert re.search(said, job.stderr), job.stderr


@pytest.mark.parametrize("phase, rank, step", [
    ("middle", 1, 2), ("manifest", 0, 2),  # and at any moment: kills.py
])
def test_a_rank_killed_while_saving_leaves_a_whole_checkpoint(folder, phase, rank, step):
    name = f"save-{phase}"
    job = train(folder, name, name, rank, 4)
    assert job.returncode not in (0, 85)
    assert goes_on(folder, name, step)


def test_a_full_disk_ends_all_and_costs_no_checkpoint(folder):
    job = train(folder, "full", "full", 1, 4)
    assert job.returncode == 74
    assert "rank 1" in job.stderr and "File too large" in job.stderr
    assert goes_on(folder, "full", 2)


def test_a_file_system_that_fills_up_keeps_its_checkpoint(folder):
    """Room for one checkpoint, not for two; once there is more the run goes on."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("it needs root and a mount namespace, to mount a file system")
    (folder / "tmpfs").mkdir()
    script = """
        mount -t tmpfs -o size=1600k tmpfs tmpfs
        "$@"; echo "first $?"
        ls tmpfs/checkpoints/*/manifest.json
        mount -o remount,size=16m tmpfs tmpfs
        "$@"; echo "second $?"
        mkdir kept && cp -r tmpfs/. kept"""
    words = [mpiexec(), "-n", str(RANKS), sys.executable, "-m", "mpillm", "train", "config.toml"]
    job = subprocess.run(["unshare", "--mount", "bash", "-c", script, "bash", *words, "--train.run_dir", "tmpfs"],
                         cwd=folder, env=os.environ | OVERSUBSCRIBE | AS_ROOT, capture_output=True, text=True,
                         timeout=120 * SLOWER)
    assert "first 74" in job.stdout and "second 0" in job.stdout, job.stdout + job.stderr
    kept = job.stdout.split("first 74")[1].split("second")[0].split()
    assert kept == ["tmpfs/checkpoints/step-00000002/manifest.json"]
    assert "No space left on device" in job.stderr and "going on from step 2" in job.stderr
    assert same(folder, "kept", "whole")


def test_batches_killed_and_stopped_at_random_moments_lose_nothing():
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    job = run_mpi(0, [TESTS / "tools/batch_kills.py", 3, 5], timeout=150, env={"PYTHONPATH": paths})  # 50 in tests/soak.sh
    assert job.returncode == 0, job.stdout + job.stderr


def test_clients_that_vanish_and_send_garbage_do_nothing_to_others():
    pytest.importorskip("uvicorn", reason="needs starlette and uvicorn: pip install 'mpillm[serve]'")
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    job = run_mpi(0, [TESTS / "tools/serve_storm.py", 2, 60, 5], timeout=150, env={"PYTHONPATH": paths})  # soak.sh: 2,000
    assert job.returncode == 0, job.stdout + job.stderr

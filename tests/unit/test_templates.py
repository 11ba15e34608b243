"""The job templates with a stand-in for Slurm: what they do when asked to stop at any moment, and when a rank fails."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mpillm.guard.stop import MARGIN_S
from mpillm.inference.parts import Part, Parts

SLURM = Path(__file__).parents[2] / "slurm"
# srun hands USR1 to its ranks and, as the real one, kills them when it gets TERM. The ranks save, and leave with 85.
SRUN = """#!/bin/bash
while [ "$1" != mpillm ]; do shift; done
echo "$2 begins" >>log
case $2:$MODE in
    doctor:in-doctor | train:in-train | generate:in-generate) trap 'echo "$2 USR1" >>log; exit '"${ON_USR1:-85}" USR1
        trap 'echo "$2 killed" >>log; exit 143' TERM
        echo up >>up; sleep 5 >&- & wait ;;
    train:exit-* | generate:exit-*) exit "${MODE#exit-}" ;;
esac
"""
# The number of an array stands for all its elements, which have a line each.
SQUEUE = """#!/bin/bash
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || [[ "$*" = *_"$SLURM_ARRAY_TASK_ID"* ]] || echo R
echo "${STATE:-R}"
"""
SCONTROL = '#!/bin/bash\necho "$@" >>log\nexit ${SCONTROL_CODE:-0}\n'


def run(folder, mode, signals=(), template="cpu.sbatch", **env):
    """Run a template, send it signals once the stage that ``mode`` names is up; return its code and what was called."""
    for name, text in (("srun", SRUN), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "log").unlink(missing_ok=True)
    (folder / "up").unlink(missing_ok=True)
    environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "MODE": mode, "SLURM_SUBMIT_DIR": str(folder),
               "VENV": str(folder), "MPILLM_SLURM": str(SLURM), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", **env}
    job = subprocess.Popen(["bash", SLURM / template], cwd=folder, env=environ, stdout=subprocess.PIPE, text=True)
    for number in signals:
        while not (folder / "up").exists() and job.poll() is None:
            time.sleep(0.01)
        job.send_signal(number)
        time.sleep(0.05)
    out, _ = job.communicate(timeout=120)
    return job.returncode, (folder / "log").read_text().splitlines(), out


@pytest.mark.parametrize("template, command", [("cpu.sbatch", "train"), ("batch.sbatch", "generate")])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_asked_to_stop_saves_and_goes_back_into_the_queue(tmp_path, number, template, command):
    code, log, _ = run(tmp_path, f"in-{command}", [number, number], template)
    assert (code, log) == (85, ["doctor begins", f"{command} begins", f"{command} USR1", "requeue 7"])


@pytest.mark.parametrize("on_usr1", [0, 138])  # the stage ends well, or dies of it
def test_a_stop_before_training_is_not_lost(tmp_path, on_usr1):
    code, log, _ = run(tmp_path, "in-doctor", [signal.SIGUSR1], ON_USR1=str(on_usr1))
    assert (code, log) == (85, ["doctor begins", "doctor USR1", "requeue 7"])


@pytest.mark.parametrize("left, is_requeued", [(0, False), (85, True), (138, True), (74, False), (1, False), (143, False)])
def test_what_the_ranks_left_with_decides(tmp_path, left, is_requeued):
    code, log, _ = run(tmp_path, f"exit-{left}")
    assert code == (85 if is_requeued else left) and ("requeue 7" in log) == is_requeued


def test_a_failure_after_the_request_is_a_failure(tmp_path):
    code, log, _ = run(tmp_path, "in-train", [signal.SIGUSR1], ON_USR1="74")
    assert code == 74 and "requeue 7" not in log


def test_starts_without_a_new_checkpoint_end_and_those_with_one_do_not(tmp_path):
    checkpoints, starts = tmp_path / "run" / "checkpoints", tmp_path / "run" / "starts"
    checkpoints.mkdir(parents=True)
    starts.write_text("")  # as a job leaves it whose disk was full
    for step in ("step-00000001", "step-00000001.tmp", "step-00000003.old", None):  # only the first is one
        if step:
            (checkpoints / step).mkdir()
        code, log, out = run(tmp_path, "exit-85")
        assert code == 85
    assert starts.read_text() == "step-00000001 3\n" and "requeue 7" not in log and "not started again" in out
    (checkpoints / "step-00000002").mkdir()
    assert "requeue 7" in run(tmp_path, "exit-85")[1]


def test_a_batch_is_started_again_as_long_as_there_are_new_results(tmp_path):
    parts = Parts(tmp_path / "out", {})
    for number in (1, 2, None, None, None):
        paths = parts.begin(2)  # every start makes parts
        if number:
            Part(paths[1]).add(number, {"id": number})
        code, log, out = run(tmp_path, "exit-85", template="batch.sbatch", RESULTS=str(tmp_path / "out"))
        assert code == 85 and ("requeue 7" in log) == ((tmp_path / "out.parts/starts").read_text() != "2 3\n")
    assert "3 starts in a row without a new checkpoint or result" in out and "requeue 7" not in log
    parts.merge([1, 2], {})
    assert not list(tmp_path.glob("out.parts*"))


def test_starts_that_never_made_a_checkpoint_count_from_the_first(tmp_path):
    assert ["requeue 7" in run(tmp_path, "exit-85")[1] for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("how", [{"STATE": "CG"}, {"SCONTROL_CODE": "1"}])  # cancelled, or requeued by Slurm; a race
def test_a_job_that_slurm_ends_leaves_as_asked_and_is_not_put_back(tmp_path, how):
    code, log, out = run(tmp_path, "exit-85", **how)
    assert code == 85 and "not put back" in out and ("requeue 7" in log) == ("STATE" not in how)


def test_an_element_of_an_array_goes_back_by_itself(tmp_path):
    (tmp_path / "sweep.txt").write_text("--train.lr 1e-3\n--train.lr 2e-3\n")
    code, log, _ = run(tmp_path, "exit-85", template="sweep.sbatch", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert (code, log) == (85, ["doctor begins", "train begins", "requeue 7_1"])


def test_the_templates_are_asked_as_long_before_the_walltime_as_a_run_stops_by_itself():
    asked = {path.name: re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", path.read_text(), re.MULTILINE)
             for path in SLURM.glob("*.sbatch")}
    assert len(asked) == 5 and all(margins == [f"{MARGIN_S:.0f}"] for margins in asked.values()), asked

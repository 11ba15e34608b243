"""Kills a rank at a random moment of training, again and again; started without a launcher.

    PYTHONPATH=tests python tests/tools/kills.py [COUNT [SEED]]

A checkpoint is written after every step, in every other launch in the background. After each kill every announced
checkpoint must be readable and hold the bits of the unbroken run, and the next launch must go on: save a newer one, and
end well if it is not killed. At the end it prints what the kills hit, as the disk shows it; of COUNT (200) kills, at
least two in five must lie in a save.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import tomli_w
from helpers import AS_ROOT, OVERSUBSCRIBE, mpiexec, run_mpi
from tiny import MODEL, write_token_file

from mpillm.checkpoint.reading import Checkpoint, complete_checkpoints
from mpillm.errors import CheckpointError

RANKS, STEPS, KEPT, LIMIT_S = 2, 60, 3, 60
TRAIN = {"steps": STEPS, "seq_len": 12, "global_batch": 2, "microbatch": 1, "eval_every": 0, "checkpoint_every": 1,
         "checkpoint_keep": KEPT, "hang_limit_s": 5.0, "lr_schedule": "constant"}


def main(count=200, seed=None):
    """Return the exit code: 1 if anything was lost."""
    seed = random.randrange(1 << 30) if seed is None else seed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng, phases, wrong = random.Random(seed), Counter(), 0
        print(f"seed {seed}", flush=True)
        write_token_file(folder / "tokens.h5")
        config = {"model": {**MODEL, "num_layers": 4}, "data": {"path": "tokens.h5"}, "train": TRAIN,
                  "layout": {"data": RANKS}}
        (folder / "config.toml").write_text(tomli_w.dumps(config))
        words = ["-m", "mpillm", "train", "config.toml", "--train.run_dir"]
        whole = run_mpi(RANKS, [*words, "whole", "--train.checkpoint_keep", str(STEPS)], timeout=300, cwd=folder)
        assert whole.returncode == 0, whole.stderr
        expected = {found.name: contents(found) for found in complete_checkpoints(folder / "whole" / "checkpoints")}
        run = launches = 0
        while phases.total() < count:
            if not launches or newest(checkpoints) == STEPS:  # noqa: F821
                run += 1
                checkpoints = folder / f"run-{run}" / "checkpoints"
            before, is_background = newest(checkpoints), launches % 2
            launches += 1
            options = [f"run-{run}", "--train.checkpoint_background", str(bool(is_background)).lower()]
            phase, complaint = kill_one(folder, [*words, *options], checkpoints, rng)
            complaints = [complaint] if complaint else []
            if phase:
                phases["background, " * is_background + phase] += 1
            complaints += [f"{found} is not what the unbroken run had" for found in complete_checkpoints(checkpoints)
                           if not is_as(expected[found.name], found)]
            if newest(checkpoints) <= before:
                complaints.append(f"had {before}, now {newest(checkpoints)}")
            wrong += len(complaints)
            for text in complaints:
                print(f"launch {launches}: {text}", flush=True)
        saves = sum(number for phase, number in phases.items() if "save" in phase)
        print(f"{count} kills in {launches} launches of {run} runs, {saves} of them in a save, {dict(phases)}: {wrong} wrong")
        return int(wrong > 0 or saves < 0.4 * count)


def kill_one(folder, words, checkpoints, rng):
    """Start the run and kill one rank some time after it goes on.

    Returns
    -------
    phase : str or None
        What the kill hit; nothing if the run came to its end before.
    complaint : str or None
        What is wrong with how the launch ended.
    """
    env = {**os.environ, **OVERSUBSCRIBE, **(AS_ROOT if os.geteuid() == 0 else {}), "OMP_NUM_THREADS": "1"}
    before, phase = newest(checkpoints), None
    job = subprocess.Popen([mpiexec(), "-n", str(RANKS), sys.executable, *words], cwd=folder, env=env,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                           start_new_session=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        while newest(checkpoints) <= before and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.5)
        ranks = [pid for pid in children(job.pid) if b"config.toml" in cmdline(pid) and b"mpiexec" not in cmdline(pid)]
        if job.poll() is None and len(ranks) == RANKS:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            phase = "hit"
        _, err = job.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        return "hung", f"not ended {LIMIT_S} s after its rank"
    if phase and job.returncode:
        return phase_of(checkpoints), None
    is_whole = job.returncode == 0 and newest(checkpoints) == STEPS  # a rank may be killed after its last word
    return None, None if is_whole else f"left by itself with {job.returncode} at step {newest(checkpoints)}: {err[-2000:]}"


def phase_of(checkpoints):
    """Return what a job was at when it died, by what it left."""
    if any(checkpoints.glob("*.old")) or len(complete_checkpoints(checkpoints)) > KEPT:
        return "save: removing old ones"
    left = next(checkpoints.glob("*.tmp"), None)
    if left is None:
        return "training"
    if (left / "manifest.json").exists():
        return "save: manifest"
    files = list(left.glob("*.h5"))
    if not files:
        return "save: begun"
    return "save: written" if len(files) == RANKS and all(map(can_be_opened, files)) else "save: writing"


def can_be_opened(path):
    """Tell whether an HDF5 file was closed as it should be."""
    try:
        h5py.File(path, "r").close()
    except OSError:
        return False
    return True


def children(pid):
    """Return all processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


def cmdline(pid):
    """Return the command line of a process, empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def newest(checkpoints):
    """Return the step of the newest announced checkpoint, 0 if there is none."""
    found = complete_checkpoints(checkpoints) if checkpoints.is_dir() else []
    return int(found[-1].name[5:]) if found else 0


def contents(path):
    """Return all tensors of a checkpoint."""
    source = Checkpoint(path)
    return {(kind, name): source.read(name, kind) for kind in source.tensors for name in source.names(kind)}


def is_as(expected, path):
    """Tell whether a checkpoint can be read whole and holds these bits."""
    try:
        found = contents(path)
    except CheckpointError:
        return False
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in found)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

"""Kills and stops batch jobs at random moments and goes on with other numbers of ranks; started without a launcher.

    PYTHONPATH=tests python tests/tools/batch_kills.py [COUNT [SEED]]

One rank or all are killed, or asked to stop, COUNT (50) times. After each no line may have lost its result, have two, or one
that is not what the unbroken job of one rank gave; a job that comes to its end must leave that one's file, and nothing else.
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

from helpers import AS_ROOT, OVERSUBSCRIBE, mpiexec, run_mpi
from kills import children, cmdline
from written import make_model, make_run

from mpillm.errors import RESUME
from mpillm.files import to_json
from mpillm.inference.parts import records

LINES, LIMIT_S = 150, 300
WORDS = ["-m", "mpillm", "generate", "run", "--prompts", "in.jsonl", "--tokens", "40"]
HOW = ("kill one", "kill all", "kill the launcher too", "stop one", "stop all")


def main(count=50, seed=None):
    """Return the exit code: 1 if anything was lost."""
    seed = random.randrange(1 << 30) if seed is None else seed
    with tempfile.TemporaryDirectory() as name:
        folder, rng, hits, wrong, jobs, launches = Path(name), random.Random(seed), Counter(), 0, 0, 0
        print(f"seed {seed}", flush=True)
        make_run(folder / "run", make_model(max_seq_len=96), dtype="float32")
        prompts = [{"id": f"line {i}", "prompt": "ab " * rng.randrange(15), "logprobs": 0} for i in range(LINES)]
        (folder / "in.jsonl").write_text("".join(to_json(prompt) + "\n" for prompt in prompts) + "{a bad line\n")
        whole = run_mpi(1, [*WORDS, "-o", "whole"], timeout=100, cwd=folder)
        assert whole.returncode == 0, whole.stderr
        expected, held = (folder / "whole").read_bytes(), {}
        while hits.total() < count:
            target = folder / f"out-{jobs}"
            launches += 1
            how, code, said = launch(folder, target, rng, len(held))
            before, held, complaints = held, *results(target, expected.splitlines())
            is_whole = target.exists()
            complaints += ["not the file of the unbroken job"] * (is_whole and target.read_bytes() != expected)
            if not code:
                left = {each.name for each in folder.glob(f"{target.name}*")}
                complaints += [f"left {left}"] * (left != {target.name, f"{target.name}.job"})
                jobs, held = jobs + 1, {}
            elif is_whole:
                complaints += [f"left with {code}: {said[-2000:]}"] * ("kill" not in (how or ""))
            else:
                complaints += [f"lost {len(before.keys() - held.keys())} results"] * (not before.keys() <= held.keys())
                is_early = how and not said  # a signal before Python runs the first line of mpillm
                if how is None or "stop" in how and code != RESUME and not is_early:
                    complaints.append(f"left with {code}: {said[-2000:]}")
            if how:
                hits[f"{how}, {'at the end' if is_whole else 'at work' if len(held) > len(before) else 'before'}"] += 1
            wrong += len(complaints)
            for text in complaints:
                print(f"launch {launches}, {how}: {text}", flush=True)
        print(f"{count} times in {launches} launches of {jobs} jobs, {dict(sorted(hits.items()))}: {wrong} wrong")
        return int(wrong > 0)


def launch(folder, target, rng, done):
    """Start the job and do something to it at a random moment; return what, how it left and what it said."""
    ranks, moment = rng.randint(1, 4), rng.choice(("any", "at work", "at work"))
    layout = ["--layout.data", "1", "--layout.pipeline", str(ranks)] if rng.random() < 0.3 else []
    wanted, delay_s = done + rng.randrange(1, LINES - done + 1) if done < LINES else 0, rng.random() * 10
    env = {**os.environ, **OVERSUBSCRIBE, **(AS_ROOT if os.geteuid() == 0 else {}), "OMP_NUM_THREADS": "1"}
    words = [mpiexec(), "-n", str(ranks), sys.executable, *WORDS, "-o", target.name, *layout]
    job = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           errors="replace", start_new_session=True)
    how, deadline = None, time.monotonic() + LIMIT_S
    try:
        start = time.monotonic()
        while job.poll() is None and time.monotonic() < deadline:
            if time.monotonic() > start + delay_s if moment == "any" else count(target) >= wanted:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        found = [pid for pid in children(job.pid) if b"in.jsonl" in cmdline(pid) and b"mpiexec" not in cmdline(pid)]
        if job.poll() is None and len(found) == ranks:
            how = rng.choice(HOW)
            number = signal.SIGKILL if "kill" in how else rng.choice((signal.SIGTERM, signal.SIGUSR1))
            for pid in [rng.choice(found)] if "one" in how else [*([job.pid] if "too" in how else []), *found]:
                send(pid, number)
        _, said = job.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        return how, "a hang", job.communicate()[1]
    for pid in found:  # of a launcher that was killed
        send(pid, signal.SIGKILL)
    return how, job.returncode, said


def send(pid, number):
    """Send a signal to a process that may have gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def count(target):
    """Return how many lines the parts of a job have, of any kind but the first."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in parts(target))


def parts(target):
    """Return the parts of a job."""
    return sorted(Path(f"{target}.parts").glob("*-*"))


def results(target, expected):
    """Return the results that a job holds by their number, and what is wrong with them."""
    held, complaints = {}, []
    for path in parts(target):
        data = path.read_bytes()
        for number, start, length in records(path):
            if number:
                complaints += [f"line {number} has two results"] * (number in held)
                held[number] = data[start:start + length]
                complaints += [f"line {number} is not what it was"] * (held[number] != expected[number - 1])
    return held, complaints


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

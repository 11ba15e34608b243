"""What it costs to be safe, in steps of one run with each guard turned off and on by turns.

    mpiexec -n N python -m mpi4py tests/tools/costs.py CONFIG [PAIRS]

Prints a table: recorder and watchdog, checked collectives, digests, the trace; then how long a checkpoint in the
background keeps training, as a share of the time that writing it takes. N may be 1; the run directory is a temporary one.
"""

import sys
import tempfile
import time
from functools import partial
from statistics import median

from mpillm.checkpoint import saving
from mpillm.comm.recorder import Checker, Recorder
from mpillm.comm.world import comm_world
from mpillm.config import Config
from mpillm.guard.watchdog import Watchdog
from mpillm.train.run import Run

SAVES, NOTES = 7, 100_000


def main(path, pairs=10):
    """Measure and print."""
    comm = comm_world()
    with tempfile.TemporaryDirectory() as folder:
        folder = comm.bcast(folder)
        config = Config.load(path).with_values({
            "train.run_dir": folder, "train.steps": 1_000_000, "train.hang_limit_s": 0, "train.trace": True,
            "train.checkpoint_every": 0, "train.eval_every": 0, "train.checkpoint_background": True})
        run = Run(config, comm, resume="never")
        turn_trace = partial(turn_trace_to, run.engine.trace._file)
        turn_trace(run, False)
        say(run, f"{comm.size} ranks, {run.threads} threads each")
        for _ in range(2):
            run.step()
        count_notes(run)
        for name, turn in {"recorder and watchdog": turn_recorder, "checked collectives": turn_checked,
                           "digests": turn_digests, "trace": turn_trace}.items():
            compare(run, name, turn, int(pairs))
        save_in_background(run)
        run.free()
        comm.Barrier()


def count_notes(run):
    """Print what the notes of a step cost by themselves."""
    recorder = run.engine.mesh.recorder
    before = recorder.beats
    step_s = timed(run)
    notes, fresh = recorder.beats - before, Recorder()
    start = time.perf_counter()
    for _ in range(NOTES // 3):  # of three notes, as in a span with one call
        fresh.begin("F", "0F0")
        fresh.add(("tensor", "allreduce", 1))
        fresh.end("F")
    note_s = (time.perf_counter() - start) / NOTES
    say(run, f"{notes} notes a step of {step_s:.3f} s, {note_s * 1e6:.2f} us each: {notes * note_s / step_s:.4%} of it")


def compare(run, name, turn, pairs):
    """Print how much longer steps take with a guard than without, alternating."""
    ratios = []
    for pair in range(pairs):
        taken = {}
        for is_on in (False, True) if pair % 2 else (True, False):
            turn(run, is_on)
            taken[is_on] = timed(run)
            turn(run, False)
        ratios.append(taken[True] / taken[False] - 1)
    ratios.sort()
    say(run, f"{name}: {median(ratios):+.2%} (median of {pairs} pairs; the middle half "
             f"{ratios[pairs // 4]:+.2%} to {ratios[-1 - pairs // 4]:+.2%})")


def turn_recorder(run, is_on):
    """Note everything and watch, or nothing."""
    recorder, quiet = run.engine.mesh.recorder, ("begin", "end", "add")
    for name in quiet:
        if is_on:
            recorder.__dict__.pop(name, None)
        else:
            recorder.__dict__[name] = lambda *_: None
    if is_on:
        run.watchdog = Watchdog(recorder, run.folder / "flight", run.comm.rank, run.comm.size, {}, 600.0)
    elif run.watchdog:
        run.watchdog = run.watchdog.stop()


def turn_checked(run, is_on):
    """Check collectives, or not."""
    mesh = run.engine.mesh
    for group in (mesh.world, *map(mesh.group, ("data", "pipeline", "tensor"))):
        if is_on and group.size > 1:
            group._checker = Checker(group.comm, group.name)
        elif group._checker:
            group._checker = group._checker.free()


def turn_digests(run, is_on):
    """Take and check digests, or not."""
    run.engine.digests._is_on = is_on
    run.engine.digests.take()


def turn_trace_to(file, run, is_on):
    """Write spans to the file, or nowhere."""
    run.engine.trace._file = file if is_on else None


def save_in_background(run):
    """Print what saving costs the steps beside it."""
    write, written_s = saving._write_file, []

    def timed_write(*arguments):
        start = time.perf_counter()
        entries = write(*arguments)
        written_s.append(time.perf_counter() - start)
        return entries

    saving._write_file = timed_write
    for _ in range(SAVES):
        step_s = median(timed(run) for _ in range(5))
        start, steps = time.perf_counter(), 0
        run.save()
        while not run._saving.is_written():
            run.step()
            steps += 1
        run.finish_save()
        stall_s = time.perf_counter() - start - steps * step_s
        say(run, f"saving in the background: writing {written_s[-1]:.2f} s, beside {steps} steps of {step_s:.3f} s; "
                 f"keeps training {stall_s:.2f} s: {stall_s / written_s[-1]:.1%}")
    saving._write_file = write


def timed(run):
    """Return the seconds of one step, of the slowest rank."""
    run.comm.Barrier()
    start = time.perf_counter()
    run.step()
    return max(run.comm.allgather(time.perf_counter() - start))


def say(run, text):
    """Print on rank 0."""
    if run.comm.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

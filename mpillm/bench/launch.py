"""Jobs of their own: started, waited for, and their memory sampled from outside."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpillm.errors import LaunchError, MpillmError

SAMPLE_EVERY_S = 0.05
_TAIL_LINES = 20
_GRACE_S = 5.0
# Without them every job gives each rank its share of the cores.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """What a finished job printed, and the peak memory of all its processes together if that was sampled."""

    output: str
    peak_bytes: int | None


def mpiexec():
    """Return the launcher beside this Python, else the one on PATH.

    Raises
    ------
    LaunchError
        If there is neither.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            f"no mpiexec beside {sys.executable} nor on PATH, and jobs of several ranks need one: install "
            "mpillm[mpich], or load the module of an MPI library"
        )
    return found


def run_job(command, samples_memory=False):
    """Run a command to its end, each rank with its share of the cores as threads.

    Local. Sampling takes processor time from the job (about 10 ms a GiB and sample), so a job is either timed or
    sampled. If this process is interrupted or asked to stop, the whole job is ended. Call it from the main thread.

    Parameters
    ----------
    command : sequence of str
    samples_memory : bool
        Keep the peak of :func:`tree_pss`, looked at every 50 ms.

    Raises
    ------
    MpillmError
        If the job fails, with the end of what it wrote to stderr.
    """
    environ = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    peak = 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _exit_on_sigterm():
            job = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                   start_new_session=True)
            try:
                while samples_memory and job.poll() is None:
                    peak = max(peak, tree_pss(job.pid))
                    time.sleep(SAMPLE_EVERY_S)
                job.wait()
            except BaseException:
                _end(job)
                raise
        output, errors = (_read(stream) for stream in (out, err))
    if job.returncode:
        tail = "\n".join(errors.splitlines()[-_TAIL_LINES:])
        raise MpillmError(f"job {' '.join(command)}: left with code {job.returncode}; the end of its stderr:\n{tail}")
    return Job(output, peak or None)


@contextmanager
def started(command):
    """Start a command that goes on meanwhile, each rank with its share of the cores as threads, and end it; gives the process.

    Local. What it writes to stderr is shown.
    """
    environ = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    job = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        with _exit_on_sigterm():
            yield job
    finally:
        _end(job)


def tree_pss(pid):
    """Return the summed proportional set size, in bytes, of a process and all below it.

    Local; 0 where the system does not tell. A page that n processes share counts 1/n in each, so that nothing counts
    twice. Source: proc_pid_smaps(5).
    """
    total = 0
    for process in process_tree(pid):
        with suppress(psutil.Error):  # it has just ended
            total += getattr(process.memory_full_info(), "pss", 0)
    return total


def process_tree(pid):
    """Return a process and all below it, none if it has ended."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


@contextmanager
def _exit_on_sigterm():
    """Let a request to stop, as batch systems send it, unwind the program as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(job):
    """End a job: its launcher first, which ends the ranks in order, then whoever is left."""
    processes = process_tree(job.pid)
    job.terminate()
    with suppress(subprocess.TimeoutExpired):
        job.wait(_GRACE_S)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    job.wait()


def _read(stream):
    stream.seek(0)
    return stream.read().decode(errors="replace")

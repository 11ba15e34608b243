"""What tests of several ranks share: an assertion that all ranks make together, and starting of jobs."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# How mpiexec is asked for more ranks than cores, where it wants to be asked; MPICH does not.
OVERSUBSCRIBE = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "true",
    "OMPI_MCA_mpi_yield_when_idle": "true",
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SLOWER = 6  # times as slow as when idle a machine that others use may be, which no test may fail for
# What a launcher tells its ranks; a job started from one of them must not see it.
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "PRTE_", "OMPI_", "HYDI_", "HYDRA_", "MPI_LOCAL", "SLURM_")


class RanksFailed(AssertionError):
    """A failed assertion that every rank of a communicator raises, so that the session may go on."""

    collective = True


def assert_all(ok, message, comm):
    """Raise on every rank if ``ok`` is false on any, naming the ranks and what each has to say.

    Collective over ``comm``: every rank that runs the test.
    """
    reports = comm.allgather(None if ok else str(message))
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if failed:
        lines = "".join(f"\n  rank {rank}: {reports[rank]}" for rank in failed)
        raise RanksFailed(f"failed on ranks {failed} of {comm.size}:{lines}")


def run_mpi(n, args, timeout=60, cwd=None, env=None, meanwhile=None):
    """Run ``python *args`` on ``n`` ranks (0: without a launcher) and return the finished process.

    Local. ``timeout`` is meant for an idle machine: the job has :data:`SLOWER` times as many seconds; if it is not done
    then it is ended, and ``subprocess.TimeoutExpired`` raised with what it printed. ``env`` adds variables; ``meanwhile``
    is called with the process once it has started.
    """
    command = [sys.executable, *map(str, args)]
    if n:
        command = [mpiexec(), "-n", str(n), *command]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    defaults = OVERSUBSCRIBE | (AS_ROOT if os.geteuid() == 0 else {})
    environ |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    timeout *= SLOWER
    environ = {"OMP_NUM_THREADS": "1"} | environ | {"MPIEXEC_TIMEOUT": str(timeout)} | (env or {})
    job = subprocess.Popen(
        command, cwd=cwd, env=environ, start_new_session=True, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    if meanwhile:
        meanwhile(job)
    try:
        # the launcher's own limit comes first, because it ends the ranks in order
        out, err = job.communicate(timeout=timeout + 10 if n else timeout)
    except subprocess.TimeoutExpired as expired:
        os.killpg(job.pid, signal.SIGKILL)
        expired.stdout, expired.stderr = job.communicate()
        raise
    return subprocess.CompletedProcess(command, job.returncode, out, err)


def mpiexec():
    """Return the launcher beside this Python, else the one on PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise FileNotFoundError(f"no mpiexec beside {sys.executable} nor on PATH: install mpillm[mpich]")
    return found

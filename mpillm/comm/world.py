"""Starting and ending: the world communicator on first use, refusal of lonely ranks, and the abort hook."""

import os
import sys
import time
import traceback

from mpillm.comm.limits import cores_of_rank
from mpillm.comm.single import SingleComm
from mpillm.errors import FAILURE, LaunchError, MpillmError

# What a launcher says about the number of processes it started; the first one set counts. SLURM_NTASKS is not here:
# batch shells have it too.
_LAUNCH_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LAUNCH_RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_RENDEZVOUS_S = 3.0
_LAST_WORDS_S = 0.2  # for the launcher to pass on what was written: what it has not read when the job ends is lost


def launched_size(environ=os.environ):
    """Return ``(variable, ranks)`` that the launcher announced, or ``(None, 1)`` without a launcher."""
    for name in _LAUNCH_SIZE_VARIABLES:
        if environ.get(name, "").isdigit():
            return name, int(environ[name])
    return None, 1


def is_first_launched(environ=os.environ):
    """Tell whether the launcher calls this process its first: of lonely ranks, the one to speak."""
    return all(environ.get(name, "0") == "0" for name in _LAUNCH_RANK_VARIABLES)


def comm_world():
    """Return the world communicator, starting MPI if nobody has; the stand-in where there is no MPI library.

    Collective over all processes of the launch on first use.

    Raises
    ------
    LaunchError
        On every process of a launch whose N processes each think they are alone.
    """
    try:  # with mpi4py's own thread level, multiple: with a lower one MPICH does not yield while it waits
        from mpi4py import MPI
        comm, library = MPI.COMM_WORLD, MPI.Get_library_version().split("\n")[0].strip("\0")
    except (ImportError, RuntimeError) as error:
        comm, library = SingleComm(), f"none ({error})"
    variable, announced = launched_size()
    if announced > 1 and comm.size == 1:
        raise LaunchError(
            f"the launcher started {announced} processes ({variable}={announced}), but each sees a world of 1 rank "
            f"(MPI library: {library}): launcher and MPI library do not match. Use the mpirun of that library, or "
            "another process interface under Slurm (srun --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI), or point "
            "MPI4PY_LIBMPI at the MPI library of this launcher"
        )
    return comm


def set_threads(comm):
    """Give each rank its share of the node's cores unless the user set the number; return the threads in use.

    Collective over ``comm``. The node's cores are those this process may run on and its job may keep busy.
    """
    import torch

    threads = cores_of_rank(comm)
    if "OMP_NUM_THREADS" not in os.environ and "MKL_NUM_THREADS" not in os.environ:  # may differ between nodes
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def abort(comm, error, code=FAILURE):
    """Print one report of ``error`` with rank, node and, where it arose in one, step and span; then end the whole job.

    Local: the launcher ends the other ranks. Does not return.
    """
    where = f"[rank {comm.rank}/{comm.size} {os.uname().nodename}]"
    if isinstance(error, MpillmError):
        text = f"{type(error).__name__}: {error}"
    else:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    during = f"{error.during}: " if hasattr(error, "during") else ""
    sys.stderr.write(f"{where} {during}{text}\n{where} ending the job\n")
    sys.stderr.flush()
    time.sleep(_LAST_WORDS_S)
    comm.Abort(code)
    os._exit(code)


def launch(main, comm=None):
    """Run ``main()`` so that a failure of any rank ends the job with one report.

    Collective over ``comm``.

    Parameters
    ----------
    main : callable
        The program. What it returns is the exit code (``None`` is 0).
    comm : Comm, optional
        Defaults to :func:`comm_world`.

    Raises
    ------
    SystemExit
        On every rank, with the exit code. An :class:`~mpillm.errors.MpillmError` that all ranks raise is printed
        once, by rank 0, and all leave with its code; any other failure is printed by the rank that failed, which
        then calls ``Abort``.
    """
    try:
        comm = comm_world() if comm is None else comm
    except LaunchError as error:
        if is_first_launched():
            sys.stderr.write(f"mpillm: error: {error}\n")
        raise SystemExit(error.exit_code) from None
    try:
        code = main() or 0
    except MpillmError as error:
        if not _all_arrive(comm):
            abort(comm, error, error.exit_code)
        if comm.rank == 0:
            sys.stderr.write(f"mpillm: error: {error}\n")
        code = error.exit_code
    except Exception as error:
        abort(comm, error)
    except KeyboardInterrupt as error:
        abort(comm, error, 130)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def _all_arrive(comm):
    """Tell whether every rank comes here within a few seconds, that is, raised as well."""
    if comm.size == 1:
        return True
    request, deadline = comm.Ibarrier(), time.monotonic() + _RENDEZVOUS_S
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True

"""Starting and ending: the world communicator on first use, refusal of lonely ranks, and the end of all with one."""

import atexit
import math
import os
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mpillm.comm.limits import SHM_REMEDY, cores_of_rank
from mpillm.comm.single import SingleComm
from mpillm.errors import FAILURE, OK, LaunchError, MpillmError, NodeError

# What a launcher says about the number of processes it started: those of MPI libraries, and where there is none of them
# Slurm's. SLURM_NTASKS is not here: batch shells have it too.
_LAUNCH_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS",)
_LAUNCH_RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SEGMENT_BYTES, _RANK_BYTES = 8 << 10, 1032 << 10  # of /dev/shm that MPICH 5.0 takes on a node, and for every rank there
_STARTING_S = 60.0  # for which ranks of one start wait for each other
_WHICH_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_THREADS = re.compile(r"\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*")  # OpenMP takes a number for each level of nesting
_REFUSAL_S, _FAILURE_S, _EXIT_S = 3.0, 1.0, 5.0  # for how long a rank that ends so looks whether all do
PATIENCE_S = 3600.0  # for how long one that has returned waits for the others
_NOTICE_S = 10.0  # after which one that has returned says for whom it waits
_TURN_S, _TURNS = 0.5, 6  # of ranks that end alone, the least in number speaks; the others are ended before their turn
_VOICES = 3  # of ranks that have different things to say, so many do
_LAST_WORDS_S = 0.2  # for the launcher to pass on what was written: what it has not read when the job ends is lost


def launched_size(environ=os.environ):
    """Return ``(variable, ranks)`` that the launcher announced, or ``(None, 1)`` without a launcher. Local.

    Of two the one that says more: one is left over from the launch of a shell, perhaps, and lonely ranks must be noticed.
    """
    for names in _LAUNCH_SIZE_VARIABLES:
        said = [(int(environ[name]), name) for name in names if environ.get(name, "").isdecimal()]
        if said:
            return max(said)[::-1]
    return None, 1


def refuse(error, say, environ=os.environ):
    """Report a :class:`LaunchError` by ``say()``, on the first process by the launcher's count, and leave.

    A :class:`NodeError` may not hold for all: the others would wait in ``MPI_Init`` for ever. MPICH's launcher, which tells
    how many ranks a node has, is asked to end the job by the first process that comes here; they take turns, so that one
    speaks.
    """
    is_alone = isinstance(error, NodeError) and {"PMI_FD", "MPI_LOCALRANKID"} <= environ.keys()
    if is_alone:
        time.sleep(_TURN_S * min(int(environ["MPI_LOCALRANKID"]), _TURNS))
    if is_alone or all(environ.get(name, "0") == "0" for name in _LAUNCH_RANK_VARIABLES):
        say()
        sys.stderr.flush()
    if is_alone:
        time.sleep(_LAST_WORDS_S)
        os.write(int(environ["PMI_FD"]), f"cmd=abort exitcode={error.exit_code}\n".encode())
    raise SystemExit(error.exit_code) from None


def comm_world():
    """Return the world communicator, starting MPI if nobody has; the stand-in where there is no MPI library.

    Collective over all processes of the launch on first use.

    Raises
    ------
    LaunchError
        On every process of a launch whose N processes each think they are alone, or that has MPI finalized already or
        started without threads. A :class:`NodeError` on those of a node that has no room for MPI.
    """
    _see_room()
    try:
        from mpi4py import MPI, rc

        library = MPI.Get_library_version().split("\n")[0].strip("\0")
    except (ImportError, RuntimeError) as error:
        comm, library = SingleComm(), f"none ({error})"
    else:
        _start(MPI, rc)
        comm = MPI.COMM_WORLD
        _forget_segments()
    variable, announced = launched_size()
    if announced > 1 and comm.size == 1:
        raise LaunchError(
            f"the launcher started {announced} processes ({variable}={announced}), but each sees a world of 1 rank "
            f"(MPI library: {library}): launcher and MPI library do not match. Use the mpirun of that library, or "
            "another process interface under Slurm (srun --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI), or point "
            "MPI4PY_LIBMPI at the MPI library of this launcher; in a shell that itself is one of several tasks, or was "
            f"left behind by one, unset {variable}"
        )
    return comm


def _see_room(environ=os.environ):
    """Refuse a node where ``MPI_Init`` would die of a bus error: MPICH does not ask whether ``/dev/shm`` has room for it.

    Local. Only MPICH's own launcher says how many ranks a node has, elsewhere room for one is looked for. The library is
    asked for its name by a process of its own, because importing it here may start it.
    """
    if "mpi4py.MPI" in sys.modules:
        return
    ranks = int(environ.get("MPI_LOCALNRANKS", "1"))
    need_bytes = _SEGMENT_BYTES + ranks * _RANK_BYTES
    try:
        room = os.statvfs("/dev/shm")
        free_bytes = room.f_bavail * room.f_frsize
        if not room.f_blocks or free_bytes >= need_bytes:
            return
        found = [os.stat(entry) for entry in os.scandir("/dev/shm") if entry.name.startswith("mpich_shm_")]
    except OSError:
        return
    # Ranks that came before may have taken their part.
    free_bytes += sum(512 * segment.st_blocks for segment in found if segment.st_ctime > time.time() - _STARTING_S)
    if free_bytes >= need_bytes:
        return
    asked = subprocess.run([sys.executable, "-c", _WHICH_LIBRARY], capture_output=True, text=True)
    if "MPICH" in asked.stdout:
        raise NodeError(
            f"node {os.uname().nodename}: /dev/shm has {free_bytes >> 10} KiB free, and MPICH takes {need_bytes >> 10} KiB "
            f"for the ranks of this node ({ranks}), or dies of a bus error: {SHM_REMEDY}")


def _start(MPI, rc):
    """Start MPI, and see to its end, where mpi4py was told not to; see that it is fit for use."""
    if MPI.Is_finalized():
        raise LaunchError("MPI has been finalized in this process, and it starts but once: leave MPI.Finalize() to mpi4py, "
                          "or call it last")
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)  # with a lower level MPICH does not yield while it waits
    if rc.finalize is False or rc.finalize is None and not rc.initialize:  # mpi4py will not: a launcher calls that a crash
        atexit.register(lambda: MPI.Is_finalized() or MPI.Finalize())
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        level = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled"}[MPI.Query_thread()]
        raise LaunchError(f"MPI was started with thread level {level}, and mpillm needs serialized: let mpillm start MPI, "
                          "or do not set mpi4py.rc.threads and thread_level (MPI4PY_RC_THREADS, MPI4PY_RC_THREAD_LEVEL)")


def _forget_segments():
    """Remove the name of the memory that MPICH's ranks of this node share, which outlives a job that is killed.

    Local. All ranks of the node have mapped it when the first of them comes out of ``MPI_Init``, and the system keeps it for
    as long as one has. It is known by being mapped here: what other jobs have is never touched.
    """
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            path = line.split(maxsplit=5)[-1]
            if path.startswith("/dev/shm/mpich_shm_") and not path.endswith("(deleted)"):
                Path(path).unlink(missing_ok=True)


def set_threads(comm):
    """Give each rank its share of the node's cores unless the user set the number; return the threads in use.

    Collective over ``comm``. The node's cores are those this process may run on and its job may keep busy.
    """
    import torch

    threads, said = cores_of_rank(comm), {name: os.environ.get(name, "") for name in _THREAD_VARIABLES}
    if not user_threads():  # may differ between nodes
        torch.set_num_threads(threads)
    for name, value in said.items():
        if comm.rank == 0 and value.strip() and not _THREADS.fullmatch(value):
            warnings.warn(f"{name} = {value!r} is no number of threads and says nothing: {torch.get_num_threads()} are "
                          "used", stacklevel=2)
    return torch.get_num_threads()


def user_threads(environ=os.environ):
    """Return the variables with which the user set the number of threads; one that is empty or no number sets none. Local."""
    return [name for name in _THREAD_VARIABLES if _THREADS.fullmatch(environ.get(name, ""))]


def abort(comm, error, code=FAILURE):
    """Print one report of ``error`` with rank, node and, where it arose in one, step and span; then end the whole job.

    Local: the launcher ends the other ranks. Does not return.
    """
    where = f"[rank {comm.rank}/{comm.size} {os.uname().nodename}]"
    sys.stderr.write(f"{where} {_text(error)}\n{where} ending the job\n")
    sys.stderr.flush()
    _end(comm, code)


def launch(main, comm=None, patience_s=PATIENCE_S):
    """Run ``main()`` so that all ranks end when one does, with one report.

    Collective over ``comm``.

    Parameters
    ----------
    main : callable
        The program. What it returns is the exit code (``None`` is 0).
    comm : Comm, optional
        Defaults to :func:`comm_world`.
    patience_s : float
        For how long a rank that has returned 0 waits for the others. They may rightly be at work still, such as rank 0 that
        draws; or they wait for what this rank left out, and would for ever.

    Raises
    ------
    SystemExit
        On every rank, with the first exit code that is not 0, once all have come to their end. What they have to say is
        printed once for those that say the same, by rank 0. A rank that ends alone, by an exception of any kind or an exit
        code that is not 0, says so some seconds later and calls ``Abort``. One that returns 0 names after ten seconds whom
        it waits for, and calls ``Abort`` after ``patience_s``.
    """
    try:
        comm = comm_world() if comm is None else comm
    except LaunchError as error:
        refuse(error, lambda error=error: sys.stderr.write(f"mpillm: error: {error}\n"))
    exits = comm.Clone()  # nothing else talks on it
    ending = _run(main, patience_s)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    if not _all_arrive(exits, ending):
        abort(comm, ending.error, ending.code or FAILURE)
    code = _told(exits, ending)
    if code:  # a thread that lives on keeps a process that has done its work, not one that failed
        late = threading.Timer(_EXIT_S, _end, (comm, code))
        late.daemon = True
        late.start()
    exits.Free()
    raise SystemExit(code)


class _Ending(NamedTuple):
    """How a rank came to its end: with an exit code, what is to be said if all say so, and for how long it waits for them."""

    code: int
    words: str
    patience_s: float
    error: BaseException


def _run(main, patience_s):
    """Return the :class:`_Ending` of ``main()``; with ``patience_s`` for others if it is a good one."""
    try:
        code = main() or OK
    except SystemExit as error:
        code = error.code or OK
    except MpillmError as error:
        return _Ending(error.exit_code, f"mpillm: error: {error}", _REFUSAL_S, error)
    except BaseException as error:
        return _Ending(130 if isinstance(error, KeyboardInterrupt) else FAILURE, _text(error), _FAILURE_S, error)
    if not isinstance(code, int):  # what Python makes of sys.exit("a reason")
        return _Ending(FAILURE, str(code), _EXIT_S, SystemExit(code))
    return _Ending(code, "", _EXIT_S if code else patience_s, SystemExit(code))


def _told(comm, ending):
    """Print what the ranks have to say, each thing once; return the first exit code that is not 0.

    Collective over ``comm``.
    """
    endings = comm.allgather((ending.code, ending.words))
    if comm.rank == 0:
        for words in list(dict.fromkeys(words for _, words in endings if words))[:_VOICES]:
            sys.stderr.write(f"{words}\n")
        sys.stderr.flush()
    comm.Barrier()  # a launcher may end all with the first that leaves
    return next((code for code, _ in endings if code), OK)


def _text(error):
    """Return what is to be said of an error that ends the job."""
    during = f"{error.during}: " if hasattr(error, "during") else ""
    if isinstance(error, SystemExit) and not error.code:
        return ("came to the end of main(), and other ranks have not: they wait for what this one leaves out, or work for "
                "longer than launch's patience_s")
    if isinstance(error, SystemExit):
        return f"exit with {error.code}, which other ranks do not"
    if isinstance(error, MpillmError):
        return f"{during}{type(error).__name__}: {error}"
    return during + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()


def _end(comm, code):
    """End the whole job. Does not return."""
    time.sleep(_LAST_WORDS_S)
    comm.Abort(code)
    os._exit(code)


def _all_arrive(comm, ending):
    """Tell whether every rank comes here while this one waits, that is, comes to its end as well."""
    if comm.size == 1:
        return True
    before, now = (comm.rank - 1) % comm.size, time.monotonic()
    deadline = now + ending.patience_s + _TURN_S * min(comm.rank, _TURNS)
    notice = math.inf if ending.code else now + _NOTICE_S
    try:
        requests = comm.isend(None, (comm.rank + 1) % comm.size), comm.irecv(source=before)
        everybody = comm.Ibarrier()
        while not everybody.Test():
            if time.monotonic() > deadline:
                return False
            if time.monotonic() > notice and not requests[1].test()[0]:  # so each that is missing is named by one at most
                sys.stderr.write(f"[rank {comm.rank}/{comm.size} {os.uname().nodename}] has come to the end of main() and "
                                 f"waits for rank {before}, which has not\n")
                notice = math.inf
            time.sleep(0.01)
        for request in requests:
            request.wait()
    except (Exception, KeyboardInterrupt):  # MPI may be what failed, and who interrupts twice means it
        return False
    return True

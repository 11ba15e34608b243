"""A request to stop: a signal to any rank, agreed on by all at the next safe point."""

import math
import os
import signal
import time

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REPEATS_S = 10.0
MARGIN_S, MARGIN_SHARE = 120.0, 0.1  # before the walltime: so long, but no larger a share of it
_ANSWER_S = 5.0  # for Slurm to say when the job ends


def hold():
    """Let requests wait until a :class:`StopRequest` is made. Local.

    Until then, while MPI and torch start, a signal would end the process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class StopRequest:
    """Notes SIGUSR1 and SIGTERM instead of dying from them, as batch systems send before they end a job; and the
    :class:`Walltime` where Slurm says it.

    Local. The same request may come by several ways at once; a signal that comes more than :data:`REPEATS_S` later
    does what it always does, so that a job that cannot come to a safe point can still be ended. Once all have agreed to
    stop, both are ignored, because a launcher that is told to end the job with its first failing rank sends SIGTERM to
    the others as soon as one has left. Must be made in the main thread; until then a signal ends the process, unless
    :func:`hold` keeps it. :meth:`free`, or the end of a ``with``, gives the signals back.

    Parameters
    ----------
    environ : dict of str to str
        Where Slurm says which job this is, when it started and when it ends.
    """

    def __init__(self, environ=os.environ):
        self._noted, self._noted_s, self._is_agreed, self._walltime = None, math.inf, False, Walltime(environ)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.free()

    def free(self):
        """Let signals do what they did before, unless all have agreed to stop. Local."""
        if not self._is_agreed:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number, _):
        if time.monotonic() > self._noted_s + REPEATS_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._noted, self._noted_s = signal.Signals(number).name, min(self._noted_s, time.monotonic())

    def asked(self, watches_walltime=True):
        """Return what asks this rank to stop, or None. Local."""
        return self._noted or ("the walltime" if watches_walltime and self._walltime.is_near() else None)

    def agreed(self, comm):
        """Return what asks to stop, on all ranks the same.

        Collective over ``comm``. Cost: one message of a few bytes to all.

        Parameters
        ----------
        comm : Comm

        Returns
        -------
        str or None
            The name of a signal that some rank got, or ``"the walltime"``; ``None`` to go on.
        """
        found = next(filter(None, comm.allgather(self.asked(comm.rank == 0))), None)
        if found:
            self.settle()
        return found

    def settle(self):
        """Ignore requests from here on: there is nothing left to stop. Local."""
        self._is_agreed = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class Walltime:
    """When a Slurm job ends.

    Local. What it said at its start (``SLURM_JOB_END_TIME``) is asked for again when it comes near, because limits are
    raised; where Slurm does not answer it holds. A job that was over before this was made is none: its variables are
    left in a shell, or Slurm lets it run on, until it sends a signal.

    Parameters
    ----------
    environ : dict of str to str
    """

    def __init__(self, environ):
        start_s, self._end_s = (_moment(environ, f"SLURM_JOB_{which}_TIME") for which in ("START", "END"))
        share_s = MARGIN_SHARE * (self._end_s - start_s)
        self._margin_s, self._job = min(MARGIN_S, share_s if share_s > 0 else MARGIN_S), environ.get("SLURM_JOB_ID")
        self._made_s = time.time()

    def is_near(self):
        """Tell whether it is time to save: the last :data:`MARGIN_S`, or the last tenth of a shorter job, has begun."""
        if time.time() <= self._end_s - self._margin_s:
            return False
        said_s = _end_of(self._job)
        if said_s is not None:
            self._end_s = said_s
        if self._end_s < self._made_s:
            self._end_s = math.inf
        return time.time() > self._end_s - self._margin_s


def _moment(environ, name):
    """Return seconds since 1970 that a variable says, ``inf`` where it says none."""
    try:
        value = float(environ[name])
    except (KeyError, ValueError):
        return math.inf
    return value if math.isfinite(value) else math.inf


def _end_of(job):
    """Return when Slurm ends a job, in seconds since 1970: ``-inf`` if it has, ``None`` if it cannot be asked."""
    import subprocess  # only where there is a job: the first lines of a start are to be short, see hold()

    if not job:
        return None
    try:
        asked = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%e"], capture_output=True, text=True,
                               env=os.environ | {"SLURM_TIME_FORMAT": "%s"}, timeout=_ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Invalid job id" in asked.stderr or not asked.returncode and not asked.stdout.strip():
        return -math.inf
    try:
        return float(asked.stdout)
    except ValueError:
        return None

"""A request to stop: a signal to any rank, agreed on by all at the next safe point."""

import math
import os
import signal
import time

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REPEATS_S = 10.0
MARGIN_S, MARGIN_SHARE = 120.0, 0.1  # before the walltime: so long, but no larger a share of it


def hold():
    """Let requests wait until a :class:`StopRequest` is made. Local.

    Until then, while MPI and torch start, a signal would end the process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class StopRequest:
    """Notes SIGUSR1 and SIGTERM instead of dying from them, as batch systems send before they end a job; and the
    walltime where Slurm says it (``SLURM_JOB_END_TIME``).

    Local. The same request may come by several ways at once; a signal that comes more than :data:`REPEATS_S` later
    does what it always does, so that a job that cannot come to a safe point can still be ended. Once all have agreed to
    stop, both are ignored, because a launcher that is told to end the job with its first failing rank sends SIGTERM to
    the others as soon as one has left. Must be made in the main thread; until then a signal ends the process, unless
    :func:`hold` keeps it.

    Parameters
    ----------
    environ : dict of str to str
        Where Slurm says when the job started and ends.
    """

    def __init__(self, environ=os.environ):
        self._noted, self._noted_s, self._end_s = None, math.inf, _last_call(environ)
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _note(self, number, _):
        if time.monotonic() > self._noted_s + REPEATS_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._noted, self._noted_s = signal.Signals(number).name, min(self._noted_s, time.monotonic())

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
        mine = self._noted or ("the walltime" if time.time() > self._end_s else None)
        found = next(filter(None, comm.allgather(mine)), None)
        if found:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        return found


def _last_call(environ):
    """Return when to save before the end of a job, in seconds since 1970; never where nobody says when that is."""
    try:
        start_s, end_s = float(environ["SLURM_JOB_START_TIME"]), float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return math.inf
    return end_s - min(MARGIN_S, MARGIN_SHARE * (end_s - start_s))

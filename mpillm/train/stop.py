"""A request to stop: a signal to any rank, agreed on by all at the next safe point."""

import signal

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Notes SIGUSR1 and SIGTERM instead of dying from them, as batch systems send before they end a job.

    Local. A second signal of the same kind does what it always does, so that a job that cannot come to a safe point
    can still be ended; once all have agreed to stop, both are ignored, because a launcher that is told to end the job
    with its first failing rank sends SIGTERM to the others as soon as one has left. Must be made in the main thread.
    """

    def __init__(self):
        self._noted = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, _):
        self._noted = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def agreed(self, comm):
        """Return the name of the signal that some rank got, else ``None``; on all ranks the same.

        Collective over ``comm``. Cost: one message of a few bytes to all.
        """
        found = next(filter(None, comm.allgather(self._noted)), None)
        if found:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        return found

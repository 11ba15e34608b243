"""A request to stop: a signal to any rank, agreed on by all at the next safe point."""

import signal


class StopRequest:
    """Notes SIGUSR1 and SIGTERM instead of dying from them, as batch systems send before they end a job.

    Local. A second signal of the same kind does what it always does, so that a job that cannot come to a safe point
    can still be ended. Must be made in the main thread.
    """

    def __init__(self):
        self._noted = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _):
        self._noted = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def agreed(self, comm):
        """Return the name of the signal that some rank got, else ``None``; on all ranks the same.

        Collective over ``comm``. Cost: one message of a few bytes to all.
        """
        return next(filter(None, comm.allgather(self._noted)), None)

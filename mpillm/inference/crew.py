"""An engine whose requests only rank 0 knows: it asks, and the other ranks do the same."""

from contextlib import suppress

from mpillm.errors import DataError, MpillmError
from mpillm.inference.engine import Engine


class Crew:
    """All ranks, which do what rank 0 asks for.

    Parameters
    ----------
    comm : Comm

    Attributes
    ----------
    engine : Engine or None
        Once :meth:`open` was called.
    """

    def __init__(self, comm):
        self.comm, self.engine = comm, None

    def open(self, path, overrides):
        """Make the engine. Collective."""
        self.engine = Engine(path, self.comm, overrides)

    def run(self, function):
        """Return what ``function()`` returns on rank 0, which alone calls it, and None on the others.

        Collective. It may :meth:`ask` meanwhile.

        Raises
        ------
        MpillmError
            On every rank, that of rank 0; also in the place of an OSError.
        """
        error = result = None
        if self.comm.rank:
            while (told := self.comm.bcast(None))[0]:
                with suppress(MpillmError):  # rank 0 has the same, and says at the end what becomes of it
                    self._do(*told)
            error = told[1]
        else:
            try:
                result = function()
            except MpillmError as caught:
                error = caught
            except OSError as caught:
                error = DataError(str(caught))
            self.comm.bcast((None, error))
        if error is not None:
            raise error
        return result

    def ask(self, method, *arguments):
        """Call :meth:`open`, or a method of the engine, on all ranks; return what rank 0 has of it. On rank 0."""
        self.comm.bcast((method, arguments))
        return self._do(method, arguments)

    def _do(self, method, arguments):
        return self.open(*arguments) if method == "open" else getattr(self.engine, method)(*arguments)

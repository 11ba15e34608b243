"""The one-rank stand-in: what mpillm asks of a communicator, without an MPI library."""


class SingleComm:
    """A communicator of one rank. Collectives over it return at once; it has nobody to send to."""

    rank, size = 0, 1

    def Clone(self):
        """Return itself: there is no traffic to keep apart."""
        return self

    def Split(self, color=0, key=0):
        """Return itself: one rank splits into one rank."""
        return self

    def Free(self):
        """Do nothing: there is nothing to release."""

    def Barrier(self):
        """Return at once."""

    def allgather(self, value):
        """Return the one value in a list."""
        return [value]

    def gather(self, value, root=0):
        """Return the one value in a list."""
        return [value]

    def bcast(self, value, root=0):
        """Return the value."""
        return value

    def Abort(self, errorcode=1):
        """End this process with ``errorcode``."""
        raise SystemExit(errorcode)

"""What a decision table may name for a collective, beside the generators' algorithms."""

from dataclasses import dataclass

LIBRARY, WINDOW, TWO_LEVEL = "mpi", "window", "two_level"
COMPOSED = "reduce_scatter+allgather"
PADDED, PIECES = "padded", "pieces"
WHOLE = ("allreduce", "bcast")  # operations on one vector, of any length and piece by piece


@dataclass(frozen=True)
class Algorithm:
    """How a collective is carried out; ``str`` gives what :meth:`parse` reads.

    Parameters
    ----------
    name : str
        ``"mpi"`` (the MPI library's own), ``"window"`` (memory that a node's ranks share),
        ``"reduce_scatter+allgather"`` (an allreduce by these two), ``"padded"``, ``"pieces"``, or one of
        :data:`mpillm.schedules.generators.ALGORITHMS`.
    n_bytes : int or None
        Of padded and pieces: as a message of that many bytes goes, or in messages of at most that many.
    """

    name: str
    n_bytes: int | None = None

    @classmethod
    def parse(cls, text):
        """Read ``"ring"``, ``"padded:4096"``. Local. A name that nobody has is for the table to refuse."""
        name, _, size = text.partition(":")
        if name in (PADDED, PIECES) and size.isdecimal() and int(size) > 0:
            return cls(name, int(size))
        return cls(text)

    def __str__(self):
        return self.name if self.n_bytes is None else f"{self.name}:{self.n_bytes}"

    @property
    def is_repaired(self):
        """Whether another size or other operations do it (:mod:`mpillm.schedules.repair`)."""
        return self.n_bytes is not None or self.name == COMPOSED

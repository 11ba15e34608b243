"""What can go wrong, and how every rank learns of it.

Three kinds (docs/sharp-bits.rst): errors every rank sees by itself are raised before the first message;
errors of one rank at set-up, load or save go through :func:`agreed`; inside a step a rank that fails ends
the job (:func:`mpillm.comm.world.abort`), because its peers may already wait for it.
"""

from contextlib import ExitStack, contextmanager

OK, FAILURE, USAGE, VALIDATION, INPUT_OUTPUT, RESUME = 0, 1, 2, 17, 74, 85


class MpillmError(Exception):
    """Base of the errors that mpillm raises on purpose; ``exit_code`` is what the command line leaves with."""

    exit_code = FAILURE


class ConfigError(MpillmError, ValueError):
    """A configuration that is wrong or cannot run."""

    exit_code = USAGE


class DataError(MpillmError, OSError):
    """A file that is missing, unreadable, foreign or does not fit the run."""

    exit_code = INPUT_OUTPUT


class CheckpointError(DataError):
    """A checkpoint that is incomplete, damaged, or of another model."""


class LaunchError(MpillmError, RuntimeError):
    """A launch that is not what its environment says, such as N processes that each think they are alone."""


class NodeError(LaunchError):
    """A node of a launch on which MPI cannot start, whatever others can."""


class ScheduleError(MpillmError, ValueError):
    """A schedule that the checker refuses."""


class ShapeError(MpillmError, ValueError):
    """Tensors whose shapes or dtypes do not fit the operation."""


class NumbersError(MpillmError, ArithmeticError):
    """Numbers that no training should go on with."""


class CollectiveError(MpillmError, RuntimeError):
    """An error that every rank of a communicator raises, because at least one of them failed."""

    def __init__(self, message, exit_code=FAILURE):
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def agreed(comm, action):
    """Raise what fails in the block on every rank if it fails on any.

    Collective over ``comm``. The block itself must not communicate: a rank that fails would leave the others in it.

    Parameters
    ----------
    comm : Comm
        An mpi4py communicator or the one-rank stand-in.
    action : str
        What is being done, for the message.

    Raises
    ------
    CollectiveError
        On every rank, the same message on each, if the block raised an :class:`MpillmError` or :class:`OSError` on
        some. If it is the same on all, each raises its own. Any other exception is a bug and passes through at once,
        for :func:`mpillm.comm.world.launch` to end the job: the other ranks wait here.

    Notes
    -----
    Cost: one allgather of a short string.

    Examples
    --------
    >>> with agreed(comm, "data"):
    ...     text = Path("input.txt").read_text()
    """
    error = None
    try:
        yield
    except _AGREED as caught:
        error = _on_purpose(caught, action)
    mine = None if error is None else (f"{type(error).__name__}: {error}", error.exit_code)
    reports = comm.allgather(mine)
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if all(report == reports[0] for report in reports):
        raise error
    message, exit_code = reports[failed[0]]
    raise CollectiveError(
        f"{action}: failed on ranks {failed} of {comm.size}; first: rank {failed[0]}: {message}", exit_code
    ) from error


@contextmanager
def half_made(comm):
    """Give a constructor a stack for what it acquires: if it fails, that is given back, the newest first.

    Collective over ``comm``, if what is given back is: that is done after an :class:`MpillmError`, which all ranks of a
    set-up raise. After any other, a bug of this rank, the others are elsewhere and could not join in: the job is to end.

    Examples
    --------
    >>> with half_made(comm) as made:
    ...     self.mesh = Mesh(comm)
    ...     made.callback(self.mesh.free)
    ...     self.data = read()  # may raise
    """
    with ExitStack() as made:
        try:
            yield made
        except Exception as error:
            if comm.size > 1 and not isinstance(error, MpillmError):
                made.pop_all()
            raise
        made.pop_all()


def on_rank_0(comm, action, function, *arguments):
    """Return what ``function(*arguments)`` returns on rank 0, which alone calls it; or raise its error. On every rank.

    Collective over ``comm``; errors are those of :func:`agreed`. What is returned travels as an object.
    """
    error = result = None
    if comm.rank == 0:
        try:
            result = function(*arguments)
        except _AGREED as caught:
            error = _on_purpose(caught, action)
    error, result = comm.bcast((error, result))
    if error is not None:
        raise error
    return result


_AGREED = MpillmError, OSError


def _on_purpose(error, action):
    """Return the error to raise for one of :data:`_AGREED`."""
    return error if isinstance(error, MpillmError) else DataError(f"{action}: {error}")

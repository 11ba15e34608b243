"""What can go wrong, and how every rank learns of it.

Three kinds (docs/sharp-bits.rst): errors every rank sees by itself are raised before the first message;
errors of one rank at set-up, load or save go through :func:`agree`; inside a step a rank that fails ends
the job (:func:`mpillm.comm.world.abort`), because its peers may already wait for it.
"""

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


def agree(comm, error=None, action="set-up"):
    """Raise on every rank if any rank failed.

    Collective over ``comm``.

    Parameters
    ----------
    comm : Comm
        An mpi4py communicator or the one-rank stand-in.
    error : Exception or None
        What this rank caught, or ``None`` if it is fine.
    action : str
        What was being done, for the message.

    Raises
    ------
    CollectiveError
        On every rank, the same message on each, if ``error`` was given on some. If it is the same on all, each raises
        its own.

    Notes
    -----
    Cost: one allgather of a short string.
    """
    mine = None if error is None else (f"{type(error).__name__}: {error}", getattr(error, "exit_code", FAILURE))
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


def together(comm, work, action):
    """Do ``work()`` on every rank and return its result; raise on every rank if it failed on any.

    Collective over ``comm``; ``work`` itself must not communicate. Errors of files and on-purpose errors are agreed on
    (:func:`agree`), any other is a bug and passes through.
    """
    error, result = _attempt(work, action)
    agree(comm, error, action)
    return result


def on_rank_0(comm, work, action):
    """Do ``work()`` on rank 0 alone; return its result, or raise its error, on every rank.

    Collective over ``comm``; otherwise as :func:`together`. What is returned travels as an object.
    """
    error, result = comm.bcast(_attempt(work, action) if comm.rank == 0 else None)
    if error is not None:
        raise error
    return result


def _attempt(work, action):
    """Return the error that is to be agreed on, or None, and the result."""
    try:
        return None, work()
    except MpillmError as error:
        return error, None
    except OSError as error:
        return DataError(f"{action}: {error}"), None

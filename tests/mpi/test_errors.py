"""What ranks make of an error that some of them meet: all raise the same, and nobody is left waiting."""

import pytest
from helpers import assert_all

from mpillm.errors import INPUT_OUTPUT, USAGE, CollectiveError, ConfigError, DataError, agreed, on_rank_0

pytestmark = pytest.mark.mpi
two_and_three = pytest.mark.parametrize("comm", [2, 3], ids="{}-ranks".format, indirect=True)


def raised(comm, action, work, rank=None):
    """Return what ``work()``, on one rank or all, raises from an agreement, as type, message and exit code."""
    try:
        with agreed(comm, action):
            if rank in (None, comm.rank):
                work()
    except Exception as error:
        return type(error), str(error), getattr(error, "exit_code", None)
    return None


def refuse():
    raise ConfigError("steps = 0: at least 1")


def read():
    open("no such file")


@two_and_three
def test_what_one_rank_meets_all_raise(comm):
    for rank in range(comm.size):
        first = f"failed on ranks [{rank}] of {comm.size}; first: rank {rank}: "
        assert_all(raised(comm, "load", refuse, rank) == (
            CollectiveError, f"load: {first}ConfigError: steps = 0: at least 1", USAGE), rank, comm)
        found = raised(comm, "load", read, rank)
        assert_all(found == (CollectiveError, f"load: {first}DataError: load: [Errno 2] No such file or directory: "
                             "'no such file'", INPUT_OUTPUT), found, comm)
        assert_all(comm.allreduce(1) == comm.size, "somebody is still in the agreement", comm)


@two_and_three
def test_what_all_meet_alike_each_raises_as_it_is(comm):
    assert_all(raised(comm, "load", refuse) == (ConfigError, "steps = 0: at least 1", USAGE), "", comm)
    assert_all(raised(comm, "load", read)[0] == DataError, "", comm)
    found = raised(comm, "load", lambda: open(f"no file {comm.rank}"))
    assert_all(found[0] == CollectiveError and f"failed on ranks {list(range(comm.size))}" in found[1], found, comm)


@two_and_three
def test_a_block_may_return_and_what_went_well_stays(comm):
    def load():
        with agreed(comm, "load"):
            return comm.rank

    assert_all(load() == comm.rank, "", comm)
    error = DataError("gone")
    with pytest.raises(CollectiveError) as caught, agreed(comm, "load"):
        if comm.rank == comm.size - 1:
            raise error
    assert_all(caught.value.__cause__ is (error if comm.rank == comm.size - 1 else None), caught.value, comm)


@two_and_three
def test_a_bug_of_one_rank_passes_through_at_once(comm):
    """The others stay, for launch() to end the job; here they are let go by a collective in its place."""
    if comm.rank == 0:
        with pytest.raises(ZeroDivisionError), agreed(comm, "load"):
            1 / 0  # noqa: B018
        comm.allgather(("ZeroDivisionError", 1))
    else:
        with pytest.raises(CollectiveError, match=r"failed on ranks \[0\]"), agreed(comm, "load"):
            pass
    assert_all(True, "", comm)


@two_and_three
def test_what_rank_0_alone_does_all_have(comm):
    called = []

    def work(*values):
        called.append(values)
        return sum(values)

    assert_all(on_rank_0(comm, "sum", work, 1, 2) == 3 and len(called) == (comm.rank == 0), called, comm)
    with pytest.raises(ConfigError, match="steps = 0: at least 1"):
        on_rank_0(comm, "sum", refuse)
    with pytest.raises(DataError, match="^sum: .*no such file"):
        on_rank_0(comm, "sum", read)
    assert_all(comm.allreduce(1) == comm.size, "", comm)

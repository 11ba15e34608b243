"""For tests that all ranks of a launch run together: one report, nobody left waiting, sub-communicators."""

import sys
import time

import pytest
from mpi4py import MPI

WORLD = MPI.COMM_WORLD


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Leave the results file to rank 0."""
    if WORLD.rank > 0:
        config.option.xmlpath = None


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Leave the terminal to rank 0; last, because other plugins look for the reporter when they start."""
    if WORLD.rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    """Let rank 0 finish its report: with failures, the first rank to leave ends the launch."""
    sys.stdout.flush()
    wait_for_all()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """End the launch with a traceback when a test fails here that may not have failed on the other ranks.

    They may wait for this rank for ever, or take the messages of its next test for those they wait for.
    """
    report = yield
    if report.failed and WORLD.size > 1 and not getattr(call.excinfo.value, "collective", False):
        where = f"[rank {WORLD.rank}/{WORLD.size}] {report.when} of {item.nodeid}"
        sys.stderr.write(f"\n{where}\n{report.longreprtext}\n")
        sys.stderr.flush()
        time.sleep(0.5)  # for the launcher to pass it on: what it has not read when the job ends is lost
        WORLD.Abort(1)
    return report


def pytest_generate_tests(metafunc):
    """Run a test that names no sizes on the whole world, one marked ``parts`` also on two ranks of a larger one."""
    named = any("comm" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "comm" in metafunc.fixturenames and not named:
        parts = [2] if WORLD.size > 3 and metafunc.definition.get_closest_marker("parts") else []
        metafunc.parametrize("comm", [*parts, WORLD.size], ids="{}-ranks".format, indirect=True)


@pytest.fixture
def comm(request):
    """Return a communicator of the asked size; ranks outside it skip the test and wait."""
    if request.param > WORLD.size:
        pytest.skip(f"needs {request.param} ranks, this launch has {WORLD.size}")
    part = WORLD.Split(0 if WORLD.rank < request.param else MPI.UNDEFINED)
    request.addfinalizer(wait_for_all)
    if part == MPI.COMM_NULL:
        pytest.skip(f"idle: the test runs on the first {request.param} of {WORLD.size}")
    request.addfinalizer(part.Free)
    return part


@pytest.fixture
def comm_path(comm, tmp_path_factory):
    """Return an empty directory that the ranks of ``comm`` share."""
    return comm.bcast(tmp_path_factory.mktemp("comm") if comm.rank == 0 else None)


def wait_for_all():
    """Meet the other ranks without keeping a core busy: the ranks at work may need it."""
    request = WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


@pytest.fixture
def data_path(comm, comm_path):
    """A folder that all ranks share, with tokens."""
    from tiny import write_token_file

    if comm.rank == 0:
        write_token_file(comm_path / "tokens.h5")
    comm.Barrier()
    return comm_path

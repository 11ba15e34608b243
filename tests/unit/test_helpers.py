"""The tests' own safety net: a rank that fails ends the run with its traceback, and is reported once."""

import shutil
from pathlib import Path

import pytest
from helpers import run_mpi

TESTS = Path(__file__).parents[1]

PLANTED = """
import pytest
from helpers import assert_all
from mpi4py import MPI

WORLD = MPI.COMM_WORLD

@pytest.mark.mpi
def test_first():
    {body}
    WORLD.Barrier()

@pytest.mark.mpi
def test_second():
    WORLD.Barrier()
"""


@pytest.fixture
def planted(tmp_path):
    """Return a function that runs the planted test on three ranks."""
    shutil.copy(TESTS / "helpers.py", tmp_path)
    shutil.copy(TESTS / "mpi" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")

    def run(body, *options):
        (tmp_path / "test_planted.py").write_text(PLANTED.format(body=body))
        pytest_options = ["--only-mpi", "--color=no", *options]
        return run_mpi(3, ["-m", "mpi4py", "-m", "pytest", *pytest_options], timeout=40, cwd=tmp_path)

    return run


@pytest.mark.launches
@pytest.mark.parametrize("rank", [0, 2])
def test_a_failing_rank_ends_the_run_with_its_traceback(planted, rank):
    job = planted(f"assert WORLD.rank != {rank}, 'planted fault'")
    assert job.returncode != 0
    assert f"[rank {rank}/3] call of test_planted.py::test_first" in job.stderr
    assert "AssertionError: planted fault" in job.stderr
    assert "passed" not in job.stdout


@pytest.mark.launches
def test_a_failure_that_all_ranks_share_is_reported_once_and_the_session_goes_on(planted, tmp_path):
    job = planted("assert_all(WORLD.rank != 2, f'{WORLD.rank} is odd', WORLD)", "--junitxml=results.xml")
    assert job.returncode != 0
    assert job.stdout.count("1 failed, 1 passed") == 1
    assert "failed on ranks [2] of 3:" in job.stdout and "rank 2: 2 is odd" in job.stdout
    assert (tmp_path / "results.xml").read_text().count("<testcase") == 2


def test_run_mpi_without_launcher_ends_a_job_that_takes_too_long():
    from subprocess import TimeoutExpired

    with pytest.raises(TimeoutExpired):
        run_mpi(0, ["-c", "import time; time.sleep(60)"], timeout=0.5)

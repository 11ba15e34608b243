"""What doctor finds in made-up launches, and what it says of one whose ranks are each alone."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from helpers import run_mpi

from mpillm.cli import doctor
from mpillm.comm.single import SingleComm

RANK = {
    "rank": 0, "size": 4, "node": "n1", "launcher": "PMI_SIZE", "launched": 4, "mpi": "MPICH Version: 5.0.2",
    "mpi_versions": {"compiled_for": "mpich", "compiled_standard": [4, 1], "standard": [5, 0]},
    "thread_level": "multiple", "cores": [0], "core_quota": None, "threads": 1, "threads_set_by_user": True, "cpu": "x86_64",
    "gpus": [], "memory_bytes": 1 << 40, "memory_limit": "the node",
    "cuda_aware": None, "shm_free_bytes": 1 << 40, "hdf5": "2.0.0", "hdf5_is_parallel": False,
    "versions": {"mpillm": "0", "python": "3", "torch": "2", "mpi4py": "4", "numpy": "2", "h5py": "3"},
    "shares_folder": True,
}


@pytest.fixture
def ranks():
    """Two nodes of two ranks, each bound to a core of its own."""
    return [{**copy.deepcopy(RANK), "rank": rank, "node": f"n{1 + rank // 2}", "cores": [rank % 2]}
            for rank in range(4)]


def test_a_sound_launch(ranks):
    assert doctor.find_faults(ranks) == []
    assert doctor.to_text(ranks, []).endswith("\nsound")


@pytest.mark.parametrize("changes, fault, remedy", [
    ({3: {"threads": 2}}, "node n2: 2 ranks with 3 threads together share 2 cores", "OMP_NUM_THREADS"),
    ({3: {"threads": 2, "threads_set_by_user": False}}, "share 2 cores; OMP_NUM_THREADS is not set", "OMP_NUM_THREADS"),
    ({2: {"core_quota": 1.5}, 3: {"core_quota": 1.5}}, "2 ranks with 2 threads together share 1.5 cores",
     "fits the cores"),
    ({0: {"cores": [1]}, 2: {"node": "n1", "cores": [2, 3]}}, "several ranks are bound to core 1 alone",
     "--cpu-bind=cores"),
    ({2: {"shm_free_bytes": 1 << 20}}, "node n2: /dev/shm has 1 MiB free", "--shm-size"),
    ({3: {"shares_folder": False}}, r"ranks \[3\] do not see the folder", "file system that all nodes share"),
    ({rank: {"shares_folder": None} for rank in range(4)}, "rank 0 cannot write", "file system"),
    ({1: {"mpi": "MPICH Version: 4.0"}}, "different MPI libraries", "one environment"),
    ({1: {"versions": {}}}, "different package versions", "one environment"),
    ({rank: {"mpi": "Open MPI v5"} for rank in range(4)}, "compiled for mpich, MPI 4.1, and runs on Open MPI v5",
     "MPI4PY_LIBMPI"),
    ({rank: {"mpi_versions": {**RANK["mpi_versions"], "standard": [3, 1]}} for rank in range(4)},
     "compiled for mpich, MPI 4.1, and runs on MPICH Version: 5.0.2, MPI 3.1", "--no-binary mpi4py"),
    ({2: {"cuda_aware": False}, 1: {"cuda_aware": True}}, r"ranks \[2\]: the MPI library says",
     "MPICH_GPU_SUPPORT_ENABLED"),
    ({0: {"thread_level": "funneled"}}, "thread level funneled", "MPI_THREAD_SERIALIZED"),
])
def test_a_fault_is_found_and_has_a_remedy(ranks, changes, fault, remedy):
    for rank, change in changes.items():
        ranks[rank].update(change)
    (found,) = doctor.find_faults(ranks)
    assert re.search(fault, found["fault"]) and remedy in found["remedy"]
    assert doctor.to_text(ranks, [found]).endswith("not sound")


def test_a_library_of_the_same_binary_interface_will_do():
    for library, kind in (("Intel(R) MPI Library 2021.13", "mpich"), ("CRAY MPICH version 8.1.28", "impi"),
                          ("Open MPI v4.1.4", "openmpi"), ("Open MPI v4.1.4", "cpython-311-x86_64-linux-gnu")):
        assert not doctor.is_other_mpi(library, kind, [3, 1], [3, 1])


def test_without_a_gpu_no_library_is_tried():
    assert doctor.describe_rank(SingleComm())["cuda_aware"] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_each_alone(rank):
    """The first speaks, and ``--json`` is JSON."""
    env = os.environ | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank), "MPI4PY_LIBMPI": "/no/such"}
    job = subprocess.run([sys.executable, "-m", "mpillm", "doctor", "--json"], capture_output=True, text=True, env=env)
    assert job.returncode == 1 and "Traceback" not in job.stderr
    if rank:
        assert not job.stdout
    else:
        found = json.loads(job.stdout)
        assert not found["sound"] and "started 2 processes" in found["faults"][0]["remedy"]
        assert found["ranks"][0]["size"] == 1


def test_the_report_of_one_rank(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mpillm.comm.world.comm_world", SingleComm)
    done = CliRunner().invoke(doctor.command, ["--json"])
    found = json.loads(done.output)
    assert found["fast"].keys() == found["exact"].keys() and found["fast"]["float64"] == "plain"
    assert done.exit_code == (not found["sound"]) and len(found["ranks"]) == 1 and not list(tmp_path.iterdir())


@pytest.mark.launches
@pytest.mark.slow
def test_one_process_is_a_sound_launch():
    job = run_mpi(0, ["-m", "mpillm", "doctor", "--json"])
    found = json.loads(job.stdout)
    assert job.returncode == 0 and found["sound"] and found["faults"] == [], found
    rank, = found["ranks"]
    assert (rank["rank"], rank["size"], rank["threads"]) == (0, 1, 1)
    assert rank["cores"] == sorted(os.sched_getaffinity(0)) and rank["node"] == os.uname().nodename


@pytest.mark.launches
@pytest.mark.slow
def test_a_faulty_launch():
    job = run_mpi(2, ["-m", "mpillm", "doctor", "--json"], env={"OMP_NUM_THREADS": "9999"})
    found = json.loads(job.stdout)
    assert job.returncode == 1 and not found["sound"] and [rank["size"] for rank in found["ranks"]] == [2, 2], found
    assert any("2 ranks with" in one["fault"] and "OMP_NUM_THREADS" in one["remedy"] for one in found["faults"]), found

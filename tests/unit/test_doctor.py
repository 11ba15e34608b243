"""What the doctor says of a launch: sound, faulty, and one fault at a time."""

import json
import os
import re

import pytest
from helpers import run_mpi

from mpillm.cli.doctor import find_faults

SOUND = {"node": "n1", "cores": [0, 1], "threads": 1, "shm_free_bytes": 1 << 30, "shares_folder": True, "mpi": "MPICH",
         "versions": {"mpillm": "1"}, "thread_level": "multiple"}


@pytest.mark.launches
def test_a_sound_launch():
    job = run_mpi(0, ["-m", "mpillm", "doctor", "--json"])
    found = json.loads(job.stdout)
    assert job.returncode == 0 and found["sound"] and found["faults"] == [], found
    rank, = found["ranks"]
    assert (rank["rank"], rank["size"], rank["threads"]) == (0, 1, 1)
    assert rank["cores"] == sorted(os.sched_getaffinity(0)) and rank["node"] == os.uname().nodename


@pytest.mark.launches
def test_a_faulty_launch():
    job = run_mpi(2, ["-m", "mpillm", "doctor", "--json"], env={"OMP_NUM_THREADS": "9999"})
    found = json.loads(job.stdout)
    assert job.returncode == 1 and not found["sound"] and [rank["size"] for rank in found["ranks"]] == [2, 2], found
    assert any("2 ranks with" in one["fault"] and "OMP_NUM_THREADS" in one["remedy"] for one in found["faults"]), found


@pytest.mark.parametrize(("change", "fault"), [
    ({}, ""),
    ({"threads": 3}, "n1: 2 ranks with 4 threads"),
    ({"cores": [1]}, ""),
    ({"shares_folder": False}, r"ranks \[1\] do not see the folder"),
    ({"mpi": "Open MPI"}, "different MPI libraries"),
    ({"versions": {"mpillm": "2"}}, "different package versions"),
    ({"node": "n2", "threads": 3}, "n2: 1 ranks with 3 threads"),
])
def test_a_fault_of_one_rank(change, fault):
    found = find_faults([{**SOUND, "rank": 0}, {**SOUND, "rank": 1, **change}])
    assert [bool(re.search(fault, one["fault"]) and one["remedy"]) for one in found] == [True] * bool(fault), found


@pytest.mark.parametrize(("change", "fault"), [
    ({"cores": [1]}, "several ranks are bound to core 1 alone"),
    ({"shm_free_bytes": 1 << 20}, "/dev/shm has 1 MiB free for 2 ranks"),
    ({"thread_level": "funneled"}, "thread level funneled"),
    ({"shares_folder": None}, "rank 0 cannot write"),
])
def test_a_fault_of_all_ranks(change, fault):
    assert any(fault in one["fault"] for one in find_faults([{**SOUND, **change, "rank": rank} for rank in (0, 1)]))

"""What a job was given counts, not what the node has: control groups, limits of the process, Slurm; cores and shared memory."""

import math
import os
import platform
import resource
import subprocess
import sys
from unittest.mock import Mock

import pytest

from mpillm.comm import limits
from mpillm.comm.limits import MemoryLimit
from mpillm.comm.single import SingleComm

STEPS = """
import resource
import numpy as np
from mpillm.comm.limits import keep_freed_memory

def faults_of_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(1 << 17) for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults_of_step(), faults_of_step(), faults_of_step())
"""
NODE, GIB = os.uname().nodename.partition(".")[0], 1 << 30
MEMINFO = "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n"
STATUS = "VmSize: 2097152 kB\nVmData: 1048576 kB\nVmRSS: 524288 kB\n"
V2 = {"proc/self/cgroup": "0::/slurm/job_7/step_0\n",
      "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"}
# A container that sees the host's path, but its own group mounted as the top.
V1 = {"proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
      "proc/self/mountinfo": "35 31 0:32 /docker/abc /cg/memory rw - cgroup cgroup rw,memory\n"
                             "32 31 0:29 /docker/abc /cg/cpu rw,relatime shared:4 - cgroup cgroup rw,cpu,cpuacct\n"}


def tree(folder, files):
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/status": STATUS, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def least(root, environ=()):
    return min((bound.left_bytes - bound.taken_bytes, bound.source) for bound in limits.memory_bounds(root, dict(environ)))


@pytest.mark.parametrize(("files", "left_bytes", "source"), [
    ({}, 32 * GIB, "the node"),
    ({**V2, "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n"}, 32 * GIB, "the node"),
    ({**V2, "sys/fs/cgroup/slurm/job_7/step_0/memory.max": f"{4 * GIB}\n",
      "sys/fs/cgroup/slurm/job_7/step_0/memory.current": f"{3 * GIB}\n",
      "sys/fs/cgroup/slurm/job_7/step_0/memory.stat": f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB // 2}\n"},
     2 * GIB, "/sys/fs/cgroup/slurm/job_7/step_0"),
    ({**V2, "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n", "sys/fs/cgroup/slurm/memory.high": f"{3 * GIB}\n",
      "sys/fs/cgroup/slurm/job_7/memory.max": f"{8 * GIB}\n"}, 3 * GIB, "/sys/fs/cgroup/slurm"),
    ({**V1, "cg/memory/memory.limit_in_bytes": f"{6 * GIB}\n", "cg/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
      "cg/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n"}, 5 * GIB, "/cg/memory"),
    ({**V1, "cg/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 32 * GIB, "the node"),
], ids=["none", "v2 without", "v2", "v2 around it", "v1 in a container", "v1 without"])
def test_control_groups_limit_memory(tmp_path, monkeypatch, files, left_bytes, source):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert least(tree(tmp_path, files)) == (left_bytes, f"control group {source}" if "/" in source else source)


def test_limits_of_the_process_count_what_it_has_already(tmp_path, monkeypatch):
    soft = {resource.RLIMIT_AS: 6 * GIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft[kind], resource.RLIM_INFINITY))
    assert least(tree(tmp_path, {})) == (4 * GIB, "RLIMIT_AS")
    soft[resource.RLIMIT_DATA] = 4 * GIB
    assert least(tree(tmp_path, {})) == (3 * GIB, "RLIMIT_DATA")


@pytest.mark.parametrize(("environ", "membership", "asked"), [
    ({"SLURM_MEM_PER_NODE": "2048"}, "", ("SLURM_MEM_PER_NODE", 2 * GIB)),
    ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "6"}, "", ("SLURM_MEM_PER_CPU", 3 * GIB)),
    ({"SLURM_MEM_PER_CPU": "512"}, "", None),
    ({"SLURM_MEM_PER_GPU": "1024", "SLURM_GPUS_ON_NODE": "4"}, "", ("SLURM_MEM_PER_GPU", 4 * GIB)),
    ({"SLURM_MEM_PER_NODE": "0"}, "", None),  # all of the node
    ({"SLURM_MEM_PER_NODE": "2048", "SLURM_JOB_ID": ""}, "", None),
    ({"SLURM_MEM_PER_NODE": "2048", "SLURM_JOB_NODELIST": NODE}, "", ("SLURM_MEM_PER_NODE", 2 * GIB)),
    ({"SLURM_MEM_PER_NODE": "2048", "SLURM_JOB_NODELIST": "elsewhere[1-9]"}, "", None),
    ({"SLURM_MEM_PER_NODE": "2048", "SLURM_JOB_NODELIST": "n[1-9]", "SLURMD_NODENAME": "n3"}, "",
     ("SLURM_MEM_PER_NODE", 2 * GIB)),
    ({"SLURM_MEM_PER_NODE": "2048"}, "0::/system.slice/slurmstepd.scope/job_7/step_0\n", ("SLURM_MEM_PER_NODE", 2 * GIB)),
    ({"SLURM_MEM_PER_NODE": "2048"}, "0::/system.slice/slurmstepd.scope/job_8/step_0\n", None),
], ids=str)
def test_what_slurm_was_asked_for_counts_unless_an_ended_job_left_it(environ, membership, asked):
    assert limits.slurm_bytes({"SLURM_JOB_ID": "7", **environ}, membership) == asked


def test_what_a_rank_has_taken_counts_against_what_slurm_was_asked_for(tmp_path):
    found = least(tree(tmp_path, {}), {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "2048"})
    assert found == (1.5 * GIB, "SLURM_MEM_PER_NODE")


@pytest.mark.parametrize(("nodes", "inside", "outside"), [
    ("a1", ["a1"], ["a", "a11"]), ("a[01-03,7]-x,b", ["a02-x", "a7-x", "b"], ["a4-x", "a02", "c"]),
    ("r[1-2]n[0-9]", ["r2n5"], ["r3n5", "r1n10"]), ("host", ["host"], ["hos", ""]),
])
def test_lists_of_nodes_are_read_as_slurm_writes_them(nodes, inside, outside):
    assert all(limits.holds(nodes, name) for name in inside) and not any(limits.holds(nodes, name) for name in outside)


class Ranks(SingleComm):
    """This rank, the first, among others that say what they are said to."""

    def __init__(self, *others):
        self.others = others

    def allgather(self, value):
        return [value, *(other(value) for other in self.others)]


def test_ranks_share_what_names_one_source_on_one_node():
    bounds = [MemoryLimit("the node", 12.0), MemoryLimit("control group /a", 9.0),
              MemoryLimit("RLIMIT_AS", 5.0, is_shared=False), MemoryLimit("SLURM_MEM_PER_NODE", 10.0, taken_bytes=1.0)]
    assert limits.memory_of_rank(Ranks(), bounds) == (5.0, "RLIMIT_AS")
    comm = Ranks(lambda mine: mine, lambda mine: [("elsewhere", source) for _, source in mine])
    assert limits.memory_of_rank(comm, bounds) == (4.0, "SLURM_MEM_PER_NODE")
    comm = Ranks(lambda mine: [mine[1]], lambda mine: [mine[1]])  # of other jobs, in a group around all three
    assert limits.memory_of_rank(comm, bounds) == (3.0, "control group /a")
    assert limits.memory_of_rank(Ranks(), []) == (math.inf, "nothing")


@pytest.mark.parametrize(("here", "there", "cores", "of_node", "of_group"), [
    (("a", "n1"), ("a", "n1"), 4, 4.0, 4.0),
    (("a", "localhost"), ("b", "localhost"), 8, 8.0, 8.0),
    (("a", "pod-1"), ("a", "pod-2"), 4, 4.0, 8.0),  # which both call their control group /
])
def test_nodes_are_told_apart_by_their_kernels_not_their_names(monkeypatch, here, there, cores, of_node, of_group):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def found(place, comm):
        monkeypatch.setattr(limits, "node_id", lambda root="/": place[0])
        monkeypatch.setattr(os, "uname", lambda: Mock(nodename=place[1]))
        return [limits.cores_of_rank(comm, "/nowhere"), limits.memory_of_rank(comm, [MemoryLimit("the node", 8.0)])[0],
                limits.memory_of_rank(comm, [MemoryLimit("control group /", 8.0)])[0]]

    heard = []
    found(there, Ranks(lambda mine: heard.append(mine) or mine))
    assert found(here, Ranks(lambda mine: heard.pop(0))) == [cores, of_node, of_group]


def test_a_node_without_a_kernel_to_ask_has_its_name(tmp_path):
    assert limits.node_id(tree(tmp_path, {"proc/sys/kernel/random/boot_id": "2ab0\n"})) == "2ab0"
    assert limits.node_id(tmp_path / "nowhere") == os.uname().nodename


@pytest.mark.parametrize(("files", "cores"), [
    ({}, math.inf),
    ({**V2, "sys/fs/cgroup/slurm/cpu.max": "150000 100000\n", "sys/fs/cgroup/slurm/job_7/cpu.max": "max 100000\n"}, 1.5),
    ({**V1, "cg/cpu/cpu.cfs_quota_us": "300000\n", "cg/cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    ({**V1, "cg/cpu/cpu.cfs_quota_us": "-1\n", "cg/cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
])
def test_a_quota_of_cores_counts_for_threads(tmp_path, monkeypatch, files, cores):
    root = tree(tmp_path, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert limits.core_quota(root)[0] == cores and limits.usable_cores(root) == min(8, int(min(cores, 8)))
    assert limits.cores_of_rank(Ranks(lambda mine: mine), root) == max(1, int(min(8, cores) // 2))
    bound_elsewhere = Ranks(lambda mine: (mine[0], [9], mine[2]))  # shares the quota, not the cores
    assert limits.cores_of_rank(bound_elsewhere, root) == (8 if cores == math.inf else max(1, int(cores // 2)))


def test_shared_memory_is_a_part_of_the_memory_that_a_job_has(tmp_path):
    of_job = [MemoryLimit("control group /a", 4096.0), MemoryLimit("the node", 1e18)]
    assert limits.shared_memory_bytes(tmp_path, of_job) == 4096.0
    assert limits.shared_memory_bytes(tmp_path, []) == pytest.approx(
        os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_what_a_step_frees_is_there_for_the_next():
    job = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True)
    first, *others = map(int, job.stdout.split())
    assert max(others) * 8 < first

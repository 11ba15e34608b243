"""What ranks settle together at the start and at the end, whatever the environment and hardware of each."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import mpiexec, run_mpi

from mpillm.comm.devices import pick_device
from mpillm.comm.limits import cores_of_rank
from mpillm.comm.single import SingleComm
from mpillm.comm.world import launched_size, set_threads, user_threads
from mpillm.errors import USAGE, ConfigError

NODE = os.uname().nodename


class Ranks(SingleComm):
    """This rank among others that bring what they are said to bring; counts the collectives entered."""

    def __init__(self, rank=0, others=lambda mine: []):
        self.rank, self.others, self.entered = rank, others, 0

    def allgather(self, value):
        self.entered += 1
        found = self.others(value)
        return [*found[:self.rank], value, *found[self.rank:]]


@pytest.mark.parametrize("said", [(), ("OMP_NUM_THREADS",), ("MKL_NUM_THREADS",)], ids=str)
def test_every_rank_enters_the_collective_whatever_its_environment_says(monkeypatch, said):
    cores, used = len(os.sched_getaffinity(0)), []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name in said:
        monkeypatch.setenv(name, "1")
    comm = Ranks(others=lambda mine: [mine, ("elsewhere", mine[1]), (mine[0], [-1])])
    set_threads(comm)
    assert comm.entered == 1 and used == ([] if said else [max(1, cores // 2)])


@pytest.mark.parametrize(("name", "gpus", "wanted"), [
    ("cpu", 2, "cpu"), ("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cuda", 2, "cuda:1"), ("auto", 1, "cuda:0"),
])
def test_every_rank_enters_the_collective_whatever_it_computes_on(monkeypatch, name, gpus, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    comm = Ranks(2, lambda mine: [mine, (mine[0], 2, "elsewhere"), mine])  # of one name, as localhost
    assert str(pick_device(name, comm)) == wanted and comm.entered == 1


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_gpu_that_some_rank_lacks_is_an_error_on_every_rank(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match="cuda: torch sees no GPU on .*set train.device = auto or cpu") as caught:
        pick_device("cuda", Ranks(0, lambda mine: [(mine[0], gpus, mine[2]), ("bare", 0, "elsewhere")]))
    assert caught.value.exit_code == USAGE and "bare" in str(caught.value) and (NODE in str(caught.value)) == (not gpus)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
@pytest.mark.parametrize(("value", "counts"), [
    ("3", True), (" 3 ", True), ("4,2", True), ("03", True), ("", False), ("  ", False), ("0", False), ("-1", False),
    ("abc", False), ("4,", False), ("2x", False), ("$SLURM_CPUS_PER_TASK", False),
])
def test_a_variable_that_says_nothing_is_no_choice(monkeypatch, name, value, counts):
    """Empty counts as unset, as a batch script leaves it; what is no number does so with a warning on rank 0."""
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    assert user_threads() == ([name] if counts else [])
    if counts or not value.strip():
        set_threads(Ranks())
    else:
        with pytest.warns(UserWarning, match=f"{name} = .*is no number of threads"):
            set_threads(Ranks())
    assert used == ([] if counts else [cores_of_rank(Ranks())])


@pytest.mark.parametrize(("environ", "said"), [
    ({}, (None, 1)), ({"PMI_SIZE": "3"}, ("PMI_SIZE", 3)), ({"PMI_SIZE": ""}, (None, 1)),
    ({"OMPI_COMM_WORLD_SIZE": "abc"}, (None, 1)),
    ({"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4"}, ("OMPI_COMM_WORLD_SIZE", 4)),  # mpirun in the shell of srun --pty
    ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "8"}, ("PMI_SIZE", 2)),  # mpiexec in a step of eight
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "9"}, ("SLURM_STEP_NUM_TASKS", 8)),
])
def test_what_launchers_left_behind_hides_no_lonely_ranks(environ, said):
    assert launched_size(environ) == said


@pytest.mark.launches
@pytest.mark.slow
@pytest.mark.parametrize(("rc", "code", "said"), [
    ("rc.initialize = False", 0, "did work\n"), ("rc.finalize = False", 0, "did work\n"),  # and no segment has a name left
    ("rc.thread_level = 'funneled'", 1, "thread level funneled, and mpillm needs serialized"),
    ("import_ = __import__('mpi4py.MPI'); import_.MPI.Finalize()", 1, "has been finalized in this process"),
])
def test_settings_that_switch_mpi_off_are_made_up_for_or_refused(tmp_path, rc, code, said):
    (tmp_path / "script.py").write_text(f"""
from mpi4py import rc
{rc}
import mpillm
from mpillm.comm import comm_world
def main():
    comm = comm_world()
    comm.Barrier()
    if comm.rank == 0:
        print("did work", *[line for line in open("/proc/self/maps") if "mpich_shm" in line and "(deleted)" not in line])
mpillm.launch(main)
""")
    job = run_mpi(2, ["script.py"], cwd=tmp_path, timeout=200)
    assert job.returncode == code and said in job.stdout + job.stderr, job.stdout + job.stderr
    assert job.stderr.count("mpillm: error") == code and "Traceback" not in job.stderr, job.stderr


@pytest.mark.launches
@pytest.mark.slow
@pytest.mark.parametrize(("taken_late_kib", "free_kib"), [(0, 2064), (900, 1172)], ids=["for all", "for the second"])
def test_memory_that_is_too_small_for_mpi_is_refused(tmp_path, taken_late_kib, free_kib):
    """The second rank alone, too, where the first waits for it in ``MPI_Init``."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("it needs root and a mount namespace, to mount a file system")
    if b"HYDRA" not in subprocess.run([mpiexec(), "--version"], capture_output=True).stdout:
        pytest.skip("MPICH alone does not look for room")
    (tmp_path / "script.py").write_text(f"""
import os, time
import mpillm
if {taken_late_kib} and os.environ["PMI_RANK"] == "1":
    while not os.listdir("/dev/shm"):
        time.sleep(0.01)
    open("/dev/shm/other", "wb").write(bytes({taken_late_kib} << 10))
mpillm.launch(lambda: print("did work"))
""")
    script = f'mount -t tmpfs -o size={2072 if taken_late_kib else 2064}k tmpfs /dev/shm; "$@"'
    words = [mpiexec(), "-n", "2", sys.executable, "script.py"]
    job = subprocess.run(["unshare", "--mount", "bash", "-c", script, "bash", *words], cwd=tmp_path,
                         env=os.environ | {"MPIEXEC_TIMEOUT": "60"}, capture_output=True, text=True)
    assert job.returncode == 1 and job.stderr.count("mpillm: error") == 1 and not job.stdout, job.stdout + job.stderr
    assert f"/dev/shm has {free_kib} KiB free, and MPICH takes 2072 KiB for the ranks of this node (2)" in job.stderr


# What three ranks do, the code that the job leaves with, and what is said once, by whom.
ENDS = {
    "together": ("return", 0, None),
    "one late": ("time.sleep(4 if rank == 1 else 0)", 0, "main() and waits for rank 1"),
    "with one code": ("sys.exit(85) if rank else 1 / 1; return 85", 85, None),
    "with codes of their own": ("sys.exit(3 if rank == 1 else None)", 3, None),
    "with a reason": ("sys.exit('no data')", 1, "no data"),
    "refused": ("raise ConfigError('no such key')", 2, "mpillm: error: no such key"),
    "all fail": ("raise KeyError('x')", 1, "KeyError: 'x'"),
    "exit": ("wait() if rank == 0 else sys.exit(3)", 3, "exit with 3"),
    "return": ("wait() if rank < 2 else None; return 7", 7, "[rank 2/3"),
    "return too early": ("wait() if rank else None", 1, "came to the end of main(), and other ranks have not"),
    "interrupt": ("if rank: wait()\n    raise KeyboardInterrupt", 130, "[rank 0/3"),
    "no Exception": ("wait() if rank != 1 else None; raise GeneratorExit('planted')", 1, "GeneratorExit: planted"),
    "refused alone": ("wait() if rank != 1 else None; raise ConfigError('no such key')", 2, "ConfigError: no such key"),
    "exit with a thread": ("wait() if rank != 1 else threading.Thread(target=time.sleep, args=(900,)).start(); sys.exit(4)",
                           4, "[rank 1/3"),
    "all exit with a thread": ("threading.Thread(target=time.sleep, args=(900,)).start(); sys.exit(4)", 4, None),
    "killed": ("wait() if rank != 1 else os._exit(6)", None, None),  # the launcher sees it, and has codes of its own
}


@pytest.mark.launches
@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_any_way_to_leave_on_one_rank_ends_all_with_one_report(tmp_path, how):
    does, code, said = ENDS[how]
    (tmp_path / "script.py").write_text(f"""
import os, sys, threading, time
import mpillm
from mpillm.comm import comm_world, world
from mpillm.errors import ConfigError
world._EXIT_S = world._NOTICE_S = 1.0
wait = lambda: comm_world().Barrier()
def main():
    wait()
    rank = comm_world().rank
    {does}
mpillm.launch(main, patience_s={3 if 'early' in how else 300})
""")
    job = run_mpi(3, ["script.py"], cwd=tmp_path, timeout=60)  # which a rank that lives on would take
    assert job.returncode == code if code is not None else job.returncode, (job.returncode, job.stderr)
    if said:
        assert job.stderr.count(said) == (2 if said.startswith("[rank") else 1), job.stderr  # and that it ends the job
    else:
        assert "[rank" not in job.stderr and "mpillm: error" not in job.stderr, job.stderr

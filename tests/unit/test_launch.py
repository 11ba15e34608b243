"""What ranks settle together at the start, whatever the environment and hardware of each."""

import os

import pytest
import torch

from mpillm.comm.devices import pick_device
from mpillm.comm.single import SingleComm
from mpillm.comm.world import set_threads
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
    comm = Ranks(2, lambda mine: [mine, ("elsewhere", 2), mine])
    assert str(pick_device(name, comm)) == wanted and comm.entered == 1


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_gpu_that_some_rank_lacks_is_an_error_on_every_rank(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match="cuda: torch sees no GPU on .*set train.device = auto or cpu") as caught:
        pick_device("cuda", Ranks(0, lambda mine: [(mine[0], gpus), ("bare", 0)]))
    assert caught.value.exit_code == USAGE and "bare" in str(caught.value) and (NODE in str(caught.value)) == (not gpus)

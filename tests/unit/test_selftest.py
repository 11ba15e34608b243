"""The self-test of exact numerics, on kernels that keep the promise and on some that were made to break it."""

from pathlib import Path

import pytest
import torch
from helpers import run_mpi
from tiny import tiny

from mpillm.errors import USAGE, ConfigError
from mpillm.train import selftest
from mpillm.train.optimizers import update
from mpillm.train.selftest import check_exact

EXACT = {"train.numerics": "exact", "train.dtype": "float32", "train.exact_blocks": 4}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Let torch say that it has two threads, so that only what is changed here differs with them; it has one."""
    real, said = torch.get_num_threads(), [2]
    torch.set_num_threads(1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: said[-1])
        patched.setattr(torch, "set_num_threads", said.append)
        yield
    torch.set_num_threads(real)


def changed(monkeypatch, name, is_off):
    """Let a method of tensors return one more where ``is_off(tensor)``."""
    method = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda x, *arguments: method(x, *arguments) + int(is_off(x)))


def refused(config, operation, remedy):
    threads = torch.get_num_threads()
    with pytest.raises(ConfigError) as caught:
        check_exact(config)
    message = str(caught.value)
    assert message.startswith(f"train.numerics = exact: {operation} in float32 does not repeat bit for bit")
    assert torch.__version__ in message and message.endswith(f": {remedy}") and caught.value.exit_code == USAGE
    assert torch.get_num_threads() == threads


def test_kernels_that_keep_the_promise_pass():
    check_exact(tiny(EXACT, 1))
    assert torch.get_num_threads() == 2


def test_so_do_this_machine_s_with_threads():
    """A rank that has two cores for itself takes both, in exact numerics as well."""
    program = ("import sys, torch, tiny\nsys.path.append('unit')\nimport test_selftest\nfrom mpillm.train.selftest import check_exact\n"
               "check_exact(tiny.tiny(test_selftest.EXACT, 1))\nprint(torch.get_num_threads())")
    job = run_mpi(0, ["-c", program], cwd=Path(__file__).parents[1], env={"OMP_NUM_THREADS": "2"})
    assert job.stdout.strip() == "2", job.stderr


def is_moved(x):
    return x.data_ptr() % 16 != 0  # as what _moved returns


@pytest.mark.parametrize(("kernel", "is_off", "operation"), [
    ("__matmul__", is_moved, "a product"),
    ("sum", lambda x: x.dim() == 2 and is_moved(x), "a sum over tokens"),
    ("square", lambda x: x.dtype == torch.float64 and len(x) < 20, "a sum over columns"),
    ("exp", lambda x: len(x) < 20, "a softmax"),
])
def test_a_kernel_that_differs_is_named(monkeypatch, kernel, is_off, operation):
    changed(monkeypatch, kernel, is_off)
    refused(tiny(EXACT, 1), operation, "use train.numerics = fast")


@pytest.mark.parametrize(("kernel", "operation"), [("__matmul__", "a product"), ("exp", "a softmax")])
def test_a_kernel_that_differs_with_threads_is_named(monkeypatch, kernel, operation):
    changed(monkeypatch, kernel, lambda x: torch.get_num_threads() == 2)
    refused(tiny(EXACT, 1), f"{operation} with 2 threads", "set OMP_NUM_THREADS=1")


def test_an_optimiser_that_treats_shards_otherwise_is_named(monkeypatch):
    def by_number(train, lr, weight_decay, weights, *rest):
        update(train, lr, float(len(weights)), weights, *rest)

    monkeypatch.setattr(selftest, "update", by_number)
    refused(tiny(EXACT, 1), "the optimiser on a shard", "use train.numerics = fast")

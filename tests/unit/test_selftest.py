"""The self-test of exact numerics, on kernels that keep the promise and on some that were made to break it, and the ways
of products that it chooses from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import run_mpi
from tiny import tiny

from mpillm.comm import devices
from mpillm.comm.single import SingleComm
from mpillm.errors import USAGE, ConfigError
from mpillm.nn import products
from mpillm.nn.products import WAYS, add_product, by_size, fast_product, plain
from mpillm.train import selftest
from mpillm.train.optimizers import update
from mpillm.train.selftest import Report, check_exact, choose_way

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


class Ranks(SingleComm):
    """Rank 0 of two; what it reports of the first trials is changed for the other."""

    size = 2

    def __init__(self, **changes):
        self.changes = changes

    def allgather(self, value):
        if not isinstance(value, Report):
            return [value, value]
        changes, self.changes = self.changes, {}
        return [value, replace(value, **changes)]


def sound(left, right):
    """Multiply in float64, in memory of its own: the same on every processor."""
    return (left.double()[:, :, None] * right.double()).sum(1).to(left.dtype)


def off(is_off):
    """Return a product that is one more where ``is_off(its operands)``."""
    return lambda left, right: sound(left, right) + int(is_off(left, right))


def is_moved(x, *_):
    return x.data_ptr() % 16 != 0  # as what _moved returns


def has_two_threads(*_):
    return torch.get_num_threads() == 2


def lacking(error):
    """Return a product that this build of torch does not have."""

    def multiply(left, right):
        raise error("no such kernel")

    return multiply


def plant(monkeypatch, *products):
    """Let the ways of products be these, in their order."""
    for way, multiply in zip(WAYS, products, strict=True):
        monkeypatch.setitem(WAYS, way, multiply)


def changed(monkeypatch, name, is_off):
    """Let a method of tensors return one more where ``is_off(tensor)``."""
    method = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda x, *arguments: method(x, *arguments) + int(is_off(x)))


def refused(config, operation, remedy):
    threads = torch.get_num_threads()
    with pytest.raises(ConfigError) as caught:
        check_exact(config, SingleComm())
    message = str(caught.value)
    assert message.startswith(f"train.numerics = exact: {operation} in float32 does not repeat bit for bit")
    assert torch.__version__ in message and message.endswith(f": {remedy}") and caught.value.exit_code == USAGE
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_that_keep_the_promise_pass(dtype):
    """And every processor that mpillm runs on has some."""
    assert check_exact(tiny({**EXACT, "train.dtype": dtype}, 1), SingleComm()) in WAYS
    assert torch.get_num_threads() == 2


def test_so_do_this_machine_s_with_threads():
    """A rank that has two cores for itself takes both, in exact numerics as well."""
    program = ("import sys, torch, tiny\nsys.path.append('unit')\nimport test_selftest\n"
               "from mpillm.comm.single import SingleComm\nfrom mpillm.train.selftest import check_exact\n"
               "check_exact(tiny.tiny(test_selftest.EXACT, 1), SingleComm())\nprint(torch.get_num_threads())")
    job = run_mpi(0, ["-c", program], cwd=Path(__file__).parents[1], env={"OMP_NUM_THREADS": "2"})
    assert job.stdout.strip() == "2", job.stderr


@pytest.mark.parametrize("broken", [off(is_moved), lacking(RuntimeError), lacking(AttributeError)])
def test_the_first_way_that_keeps_the_promise_is_taken(monkeypatch, broken):
    ways = list(WAYS)
    for number, way in enumerate(ways):
        plant(monkeypatch, *[broken] * number, *[sound] * (len(ways) - number))
        assert check_exact(tiny(EXACT, 1), SingleComm()) == way


@pytest.mark.parametrize("changes", [
    {}, {"operation": "a product", "remedy": "use train.numerics = fast"}, {"bits": "of another processor"}])
def test_a_way_that_does_not_hold_on_all_ranks_is_taken_by_none(monkeypatch, changes):
    plant(monkeypatch, *[sound] * len(WAYS))
    assert choose_way(tiny(EXACT, 1), Ranks(**changes)) == list(WAYS)[bool(changes)]


def test_a_product_that_differs_in_every_way_is_named(monkeypatch):
    plant(monkeypatch, off(is_moved), lacking(RuntimeError), off(is_moved))
    refused(tiny(EXACT, 1), "a product", "use train.numerics = fast")


def test_threads_do_not_choose_the_way(monkeypatch):
    """Else layouts whose ranks have one thread would take another than those whose ranks have two."""
    plant(monkeypatch, off(is_moved), off(has_two_threads), sound)
    refused(tiny(EXACT, 1), "a product with 2 threads", "set OMP_NUM_THREADS=1")


@pytest.mark.parametrize(("kernel", "is_off", "operation"), [
    ("sum", lambda x: x.dim() == 2 and is_moved(x), "a sum over tokens"),
    ("square", lambda x: x.dtype == torch.float64 and len(x) < 20, "a sum over columns"),
    ("exp", lambda x: len(x) < 20, "a softmax"),
])
def test_a_kernel_that_differs_is_named(monkeypatch, kernel, is_off, operation):
    changed(monkeypatch, kernel, is_off)
    refused(tiny(EXACT, 1), operation, "use train.numerics = fast")


@pytest.mark.parametrize(("kernel", "operation"), [("exp", "a softmax"), ("square", "a sum over columns")])
def test_a_kernel_that_differs_with_threads_is_named(monkeypatch, kernel, operation):
    changed(monkeypatch, kernel, lambda x: has_two_threads() and x.dim() == 2)
    refused(tiny(EXACT, 1), f"{operation} with 2 threads", "set OMP_NUM_THREADS=1")


@pytest.mark.parametrize("masks", [False, True])
def test_attention_that_differs_with_threads_is_named(monkeypatch, masks):
    attention = selftest.scaled_dot_product_attention
    monkeypatch.setattr(selftest, "scaled_dot_product_attention",
                        lambda *args, attn_mask, **kwargs: attention(*args, attn_mask=attn_mask, **kwargs)
                        + int(has_two_threads() and masks == (attn_mask is not None)))
    refused(tiny({**EXACT, "data.mask_documents": masks}, 1), "attention with 2 threads", "set OMP_NUM_THREADS=1")


def test_an_optimiser_that_treats_shards_otherwise_is_named(monkeypatch):
    def by_number(train, lr, weight_decay, weights, *rest):
        update(train, lr, float(len(weights)), weights, *rest)

    monkeypatch.setattr(selftest, "update", by_number)
    refused(tiny(EXACT, 1), "the optimiser on a shard", "use train.numerics = fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_multiplies(way, dtype):
    """Forward, both gradients, and adding to what is there; also where a rank has no heads or no tokens."""
    multiply, generator = WAYS[way], torch.Generator().manual_seed(0)
    if not selftest._is_offered(multiply, torch.ones(1, 1, dtype=dtype)):
        assert way == "onednn"  # which has no kernels for float64, and may be left out of a build
        return
    for tokens, width, inner in ((24, 10, 40), (1, 257, 40), (7, 13, 3), (0, 10, 40), (24, 0, 40), (24, 10, 0)):
        x, weight, slope = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (
            (tokens, inner), (width, inner), (tokens, width)))
        for left, right in ((x, weight.t()), (slope, weight), (slope.t(), x), (selftest._moved(x), weight.t())):
            expected, found = left.double() @ right.double(), multiply(left, right)
            start = torch.full_like(found, torch.nan)
            results = [(found, expected), (add_product(start, left, right, multiply, is_new=True), expected),
                       (add_product(start.clone().fill_(2), left, right, multiply), expected + 2)]
            for result, right_one in results:
                assert result.dtype == dtype and torch.allclose(result.double(), right_one, rtol=0, atol=2e-5)


INTEL, AMD, ARM = "GenuineIntel", "AuthenticAMD", ""  # which /proc/cpuinfo of Arm does not tell


@pytest.mark.parametrize(("vendor", "capability", "has_mkl", "dtype", "way"), [
    (INTEL, "AVX512", True, "float32", plain), (INTEL, "AVX2", True, "float32", plain),
    (AMD, "AVX512", True, "float32", by_size), (AMD, "AVX2", True, "float32", plain),
    (AMD, "AVX512", True, "float64", plain), (AMD, "AVX512", True, "bfloat16", plain),
    (AMD, "AVX512", False, "float32", plain), (ARM, "SVE256", False, "float32", plain), ("", "AVX512", True, "float32", plain),
])
def test_what_fast_multiplies_by_is_the_processor_s_to_say(monkeypatch, vendor, capability, has_mkl, dtype, way):
    monkeypatch.setattr(devices, "_processor", {"vendor_id": vendor}.get)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    cpu, dtype = torch.device("cpu"), getattr(torch, dtype)
    assert fast_product(SingleComm(), cpu, dtype) is way
    assert fast_product(SingleComm(), torch.device("cuda"), dtype) is plain
    monkeypatch.setattr(SingleComm, "allgather", lambda comm, value: [value, False])
    assert fast_product(SingleComm(), cpu, dtype) is plain  # a rank elsewhere has another processor


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("parts_bytes", [1, 5_000, 1 << 22])
def test_fast_products_add_in_parts(monkeypatch, parts_bytes):
    """Small ones are PyTorch's to the bit, and larger ones right, whatever the number of parts."""
    monkeypatch.setattr(products, "SUM_BYTES", parts_bytes)
    generator = torch.Generator().manual_seed(0)
    for tokens, width, inner in ((24, 10, 40), (0, 10, 40), (3, 700, 513), (80, 130, 513), (80, 257, 513)):
        x, weight, slope = (torch.randn(shape, generator=generator) for shape in (
            (tokens, inner), (width, inner), (tokens, width)))
        for left, right in ((x, weight.t()), (slope, weight), (slope.t(), x)):
            start = torch.ones(left.shape[0], right.shape[1])
            right_one, found = left.double() @ right.double(), by_size(left, right)
            added, new = (add_product(start.clone(), left, right, by_size, is_new) for is_new in (False, True))
            for result, wanted in ((found, right_one), (added, right_one + 1), (new, right_one)):
                assert torch.allclose(result.double(), wanted, rtol=0, atol=2e-4)
            if tokens * width * inner < 10_000:
                assert torch.equal(found, left @ right) and torch.equal(added, start.addmm_(left, right))

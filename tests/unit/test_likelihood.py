"""Log-probabilities of given tokens: precise, and the same whatever rows, threads and blocks do."""

from types import SimpleNamespace

import pytest
import torch

from mpillm.comm.group import as_group
from mpillm.comm.single import SingleComm
from mpillm.inference.likelihood import log_probabilities
from mpillm.schedules.blocks import all_bounds

WIDTHS = 1, 7, 257, 40_003  # the last is shared among threads


def found(logits, tokens, blocks=1, vocab_size=None):
    """Return what this process finds as the only one, of logits in blocks."""
    split = SimpleNamespace(group=as_group(SingleComm()), blocks=blocks)
    parts = [(start, logits[:, start:stop].contiguous()) for start, stop in all_bounds(logits.shape[1], blocks)]
    return log_probabilities(parts, split, vocab_size or logits.shape[1], tokens)


@pytest.fixture(params=WIDTHS)
def rows(request):
    torch.manual_seed(request.param)
    logits = 5 * torch.randn(9, request.param)
    return logits, [int(row.argmax()) if i % 2 else i % request.param for i, row in enumerate(logits)]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-6)])
def test_they_are_those_of_a_softmax(rows, dtype, error):
    logits, tokens = rows[0].to(dtype), rows[1]
    wanted = logits.double().log_softmax(1)
    for blocks in (1, 3, 8):
        for i, (value, is_first) in enumerate(found(logits, tokens, blocks)):
            assert abs(value - float(wanted[i, tokens[i]])) < error
            assert is_first == (int(wanted[i].argmax()) == tokens[i])


def test_rows_beside_and_threads_make_no_difference(rows):
    logits, tokens = rows
    torch.set_num_threads(1)
    for blocks in (1, 3):
        wanted = found(logits, tokens, blocks)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for step in (1, 2, 4, 9):
                again = [each for i in range(0, len(tokens), step)
                         for each in found(logits[i:i + step], tokens[i:i + step], blocks)]
                assert again == wanted


def test_of_equals_the_first_is_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).repeat(4, 1)
    for blocks in (1, 2, 4):
        assert [is_first for _, is_first in found(logits, [0, 1, 2, 3], blocks)] == [False, True, False, False]


def test_padding_counts_for_nothing():
    logits = torch.randn(3, 12)
    wanted = found(logits[:, :5].contiguous(), [0, 4, 2])
    logits[:, 5:] = 100
    assert found(logits, [0, 4, 2], vocab_size=5) == wanted
    for value, (other, _) in zip(found(logits, [0, 4, 2], 4, vocab_size=5), wanted):
        assert abs(value[0] - other) < 1e-6


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_show(wrong):
    logits = torch.randn(2, 9)
    logits[0] = wrong
    for blocks in (1, 3):
        (broken, _), (sound, _) = found(logits, [0, 1], blocks)
        assert not abs(broken) < torch.inf and abs(sound) < 100

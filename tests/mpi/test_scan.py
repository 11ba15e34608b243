"""Scans, chains and their gradients over ranks, against loops on one."""

import pytest
import torch
from helpers import assert_all
from scans import NAMES, divisions, elements, equal, like, part, parts_of, sequential

from mpillm import check_adjoint
from mpillm.autograd import copy_to
from mpillm.comm import Group
from mpillm.comm.group import as_group
from mpillm.comm.single import SingleComm
from mpillm.errors import ShapeError
from mpillm.scan import AFFINE, AFFINE_DENSE, SOFTMAX, exclusive_scan, reduce, scan, softmax_partials

pytestmark = [pytest.mark.mpi, pytest.mark.parts]


@pytest.mark.parametrize("name", NAMES)
def test_scans_have_the_bits_of_one_rank_at_any_division(comm, name):
    for n in (0, 1, 2, 21):
        operator, x = elements(name, n)
        want, loop = scan(operator, x, SingleComm()), sequential(operator, x)
        for borders in divisions(n, comm.size):
            low, high = borders[comm.rank:comm.rank + 2]
            got = scan(operator, part(x, low, high), comm)
            assert_all(equal(got, part(want, low, high)), (n, borders, got), comm)
            assert_all(equal(got, part(loop, low, high), 1e-12), (n, borders, got), comm)
            if operator.identity is None:
                continue
            before = exclusive_scan(operator, part(x, low, high), comm)
            first = max(1 - low, 0)
            assert_all(equal(part(before, first, None), part(want, low + first - 1, high - 1)) or low == high,
                       (n, borders, before), comm)
            total = reduce(operator, part(x, low, high), comm)
            alone = reduce(operator, x, SingleComm())
            assert_all(equal(total, alone), (n, borders, total), comm)
            assert not n or equal(like(x, [p[None] for p in parts_of(total)]), part(loop, n - 1, n), 1e-12)


def test_a_scan_costs_one_allgather_and_backward_one_reduce_scatter(comm):
    group, n = Group(as_group(comm).comm), 64
    x = torch.ones(n, 2, dtype=torch.float64, requires_grad=True)
    y = scan(elements("add", 1)[0], x, group)
    y.sum().backward()
    kept = 1 + 2 * n.bit_length()
    if comm.size > 1:
        assert group.recorder.calls == {("world", "allgather"): 1, ("world", "reduce_scatter"): 1}
        assert group.recorder.sent_bytes["world", "allgather"] <= (comm.size - 1) * kept * 2 * 8
    places = comm.rank * n + torch.arange(n)
    assert_all(bool((x.grad[:, 0] == comm.size * n - places).all()), x.grad, comm)


def test_scans_of_linear_maps_pass_the_adjoint_test(comm):
    scale, matrix = torch.rand(9, 2, dtype=torch.float64), torch.rand(9, 3, 3, dtype=torch.float64)
    for n in (0, 1, 2, 9):
        check_adjoint(lambda b: scan(AFFINE, (scale[:len(b)], b), comm)[1], comm, (n, 2), "sharded(0)", "sharded(0)")
        check_adjoint(lambda b: exclusive_scan(AFFINE_DENSE, (matrix[:len(b)], b), comm)[1], comm, (n, 3), "sharded(0)",
                      "sharded(0)")
        check_adjoint(lambda b: reduce(AFFINE, (scale[:len(b)], b), comm)[1], comm, (n, 2), "sharded(0)", "replicated")


def test_the_adjoint_test_refuses_a_scan_that_forgets_the_other_ranks(comm):
    if comm.size == 1:
        return
    from mpillm.errors import CollectiveError

    def forgetful(x):
        before = exclusive_scan(elements("add", 1)[0], x.detach().sum(0, keepdim=True), comm)
        return before + x.cumsum(0)

    with pytest.raises(CollectiveError, match="not the adjoint"):
        check_adjoint(forgetful, comm, (9, 2), "sharded(0)", "sharded(0)")


@pytest.mark.parametrize("name", ["log_add", "affine", "affine_dense", "max_plus", "log_plus", "softmax"])
def test_gradients_are_those_of_a_loop(comm, name):
    for n in (1, 8):
        operator, x = elements(name, n)
        for combine in (scan, reduce):
            alone = like(x, [p.clone().requires_grad_() for p in parts_of(x)])
            loop = parts_of(sequential(operator, alone))
            loop = [p[-1:] for p in loop] if combine is reduce else loop
            sum((torch.where(p.isfinite(), p, 0) * torch.arange(1, p.numel() + 1).view_as(p)).sum() for p in loop).backward()
            for borders in divisions(n, comm.size):
                low, high = borders[comm.rank:comm.rank + 2]
                mine = like(x, [p[low:high].clone().requires_grad_() for p in parts_of(x)])
                found = parts_of(combine(operator, mine, comm))
                weights = [torch.arange(1, p.numel() + 1).view_as(p) for p in loop]
                if combine is scan:
                    weights = [w[low:high] for w in weights]
                sum((torch.where(p.isfinite(), p, 0) * w.view_as(p)).sum() for p, w in zip(found, weights)).backward()
                for mine_, alone_ in zip(parts_of(mine), parts_of(alone)):
                    if alone_.grad is not None:
                        assert_all(torch.allclose(mine_.grad, alone_.grad[low:high], rtol=1e-11, atol=1e-12),
                                   (n, borders, mine_.grad, alone_.grad), comm)


def test_attention_over_keys_that_are_spread(comm):
    generator = torch.Generator().manual_seed(0)
    for n in (3, 50):
        q, k, v = (torch.randn(2, s, 4, generator=generator, dtype=torch.float64) for s in (5, n, n))
        wants = [t.clone().requires_grad_() for t in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(*wants)
        want.cos().sum().backward()
        for borders in divisions(n, comm.size):
            low, high = borders[comm.rank:comm.rank + 2]
            mine = [t.clone().requires_grad_() for t in (q, k[:, low:high], v[:, low:high])]
            scores = copy_to(mine[0], comm) @ mine[1].mT / 2
            _, total, out = reduce(SOFTMAX, softmax_partials(scores, mine[2]), comm)
            (out / total).cos().sum().backward()
            assert_all(torch.allclose(out / total, want, rtol=0, atol=1e-12), borders, comm)
            for t, w, cut in zip(mine, wants, (slice(None), slice(low, high), slice(low, high))):
                assert_all(torch.allclose(t.grad, w.grad[:, cut], rtol=0, atol=1e-12), borders, comm)


def test_elements_that_do_not_fit_are_refused_by_all(comm):
    operator = elements("add", 1)[0]
    last = comm.rank == comm.size - 1
    for x, op in (
        (torch.zeros(3, 2 + last) if comm.size > 1 else torch.zeros(()), operator),
        ((torch.zeros(3), torch.zeros(3 + last)), operator),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.float64)), operator),
        (torch.zeros(3, 2, 2, dtype=torch.int64), elements("log_plus", 1)[0]),
        (torch.zeros(()), operator),
    ):
        with pytest.raises(ShapeError, match="^scan of"):
            scan(op, x, comm)
    with pytest.raises(ShapeError, match="no identity"):
        exclusive_scan(elements("first of", 1)[0], torch.zeros(3), comm)

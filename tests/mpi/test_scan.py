"""Scans, chains and their gradients over ranks, against loops on one."""

import numpy as np
import pytest
import torch
from chains import decode_in_sequence, draw
from helpers import assert_all
from scans import NAMES, divisions, elements, equal, like, part, parts_of, sequential

from mpillm import check_adjoint
from mpillm.autograd import copy_to
from mpillm.comm import Group
from mpillm.comm.group import as_group
from mpillm.comm.single import SingleComm
from mpillm.errors import CollectiveError, ShapeError
from mpillm.scan import (
    AFFINE,
    AFFINE_DENSE,
    SOFTMAX,
    blocks,
    crf_log_likelihoods,
    crf_log_partition,
    crf_marginals,
    crf_path_score,
    decoding,
    exclusive_scan,
    reduce,
    scan,
    softmax_partials,
    viterbi,
)
from mpillm.schedules.blocks import bounds

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


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_SHORTEST", 16)
    monkeypatch.setattr(blocks, "WARMUP", 3)


@pytest.mark.filterwarnings("ignore:viterbi")  # parts of few steps have no time to forget
@pytest.mark.parametrize("low", [-1, -40, -10**5])
def test_one_chain_has_the_path_of_a_loop_at_any_division(comm, short_blocks, low):
    for steps, states in ((1, 3), (3, 2), (50, 4), (500, 6)):
        scores = draw(steps, states, steps, low)
        want, best = decode_in_sequence(*scores)
        for borders in divisions(steps, comm.size):
            low_, high = borders[comm.rank:comm.rank + 2]
            path, score = viterbi(scores[0][low_:high], *scores[1:], comm)
            assert_all((path.numpy() == want[low_:high]).all() and score == best, (steps, borders, path, score), comm)
            # of other numbers: the same at any rank count
            reals = [np.sqrt(-score_ + 9.0) for score_ in scores]
            path, score = viterbi(reals[0][low_:high], *reals[1:], comm)
            alone, value = viterbi(*reals, SingleComm())
            assert_all(torch.equal(path, alone[low_:high]) and abs(score - value) <= 1e-12 * abs(value), (steps, borders), comm)


def test_no_steps_at_all_have_an_empty_path(comm):
    path, score = viterbi(np.zeros((0, 3)), np.zeros((3, 3)), np.zeros(3), comm)
    assert path.shape == (0,) and score == 0


def never_forgets(steps):
    """Return the scores of a chain in which a state is always followed by the next."""
    transitions = np.full((4, 4), -np.inf)
    transitions[range(4), [1, 2, 3, 0]] = 0
    return np.zeros((steps, 4)), transitions, np.array([0.0, 2, 1, 0])


def test_a_chain_that_never_forgets_is_right_after_as_many_exchanges_as_ranks(comm, short_blocks):
    scores = never_forgets(200)
    want, best = decode_in_sequence(*scores)
    for borders in divisions(200, comm.size):
        low, high = borders[comm.rank:comm.rank + 2]
        group = Group(as_group(comm).comm)
        with pytest.warns(RuntimeWarning, match="does not forget") if comm.rank == 0 else pytest.MonkeyPatch.context():
            path, score = viterbi(scores[0][low:high], *scores[1:], group)
        assert_all((path.numpy() == want[low:high]).all() and score == best, (borders, path), comm)
        sends = group.recorder.calls["world", "send"]
        assert_all(sends <= 2 * (comm.size + 1), sends, comm)


@pytest.mark.filterwarnings("ignore:viterbi")
def test_a_seam_between_ranks_that_is_not_repaired_would_be_seen(comm, monkeypatch):
    if comm.size == 1:
        return
    low, high = bounds(399, comm.size, comm.rank)
    for line_end, bonus in (("begin_otherwise", 0), ("end_otherwise", 10)):  # a late score decides on the first state, or not
        scores = never_forgets(399)
        scores[0][-1, (2 + 398) % 4] = bonus
        want, _ = decode_in_sequence(*scores)
        for is_planted in (False, True):
            with monkeypatch.context() as planted:
                if is_planted:
                    planted.setattr(blocks.Chain, line_end, lambda *_: False)
                path, _ = viterbi(scores[0][low:high], *scores[1:], comm)
            whole = np.concatenate(comm.allgather(path.numpy()))
            assert (whole != want).any() == is_planted, line_end


def test_the_bound_on_exchanges_holds_without_trust(comm, monkeypatch):
    """A rank that always says it changed must not hold the others for ever."""
    rounds = []
    monkeypatch.setattr(decoding._Line, "greatest", lambda self, value, old=decoding._Line.greatest: rounds.append(1) or
                        old(self, value))
    viterbi(draw(40, 3)[0], *draw(40, 3)[1:], comm)
    assert len(rounds) <= 2 * (comm.size + 2)


def test_one_crf_over_ranks_has_the_gradients_of_one_rank(comm):
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 9):
        shapes = (steps, 3), (3, 3), (3,)
        scores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        tags = torch.randint(0, 3, (steps,), generator=generator)
        alone = [score.clone().requires_grad_() for score in scores]
        want = crf_path_score(alone[0], tags, *alone[1:], SingleComm()) - crf_log_partition(*alone, SingleComm())
        want.backward()
        for borders in divisions(steps, comm.size):
            low, high = borders[comm.rank:comm.rank + 2]
            mine = [s.clone().requires_grad_() for s in (scores[0][low:high], *scores[1:])]
            found = crf_path_score(mine[0], tags[low:high], *mine[1:], comm) - crf_log_partition(*mine, comm)
            found.backward()
            assert torch.allclose(found, want, rtol=0, atol=1e-12)
            for one, other in zip(mine, (alone[0].grad[low:high], alone[1].grad, alone[2].grad)):
                assert_all(torch.allclose(one.grad if len(one) else one.detach(), other, rtol=0, atol=1e-12), borders, comm)
            found, want_ = crf_marginals(*(m.detach() for m in mine), comm), crf_marginals(*scores, SingleComm())
            assert_all(torch.allclose(found, want_[low:high], rtol=0, atol=1e-12), borders, comm)


def test_many_chains_of_unequal_lengths(comm):
    generator = torch.Generator().manual_seed(1)
    emissions = torch.randn(comm.size, 5, 3, generator=generator, dtype=torch.float64)
    lengths, tags = torch.arange(comm.size) % 5 + 1, torch.randint(0, 3, (comm.size, 5), generator=generator)
    shared = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 3), (3,))]
    alone = [s.clone().requires_grad_() for s in shared]
    want = [crf_path_score(emissions[b, :n], tags[b, :n], *alone, SingleComm())
            - crf_log_partition(emissions[b, :n], *alone, SingleComm()) for b, n in enumerate(lengths.tolist())]
    sum(want).backward()
    mine = [s.clone().requires_grad_() for s in shared]
    # one rank has two chains, the last none
    low, high = ([0] + [rank + 1 for rank in range(1, comm.size)] + [comm.size])[comm.rank:comm.rank + 2]
    found = crf_log_likelihoods(emissions[low:high], tags[low:high], lengths[low:high], *mine, comm)
    found.sum().backward()
    assert_all(torch.allclose(found, torch.stack([w.detach() for w in want])[low:high], rtol=0, atol=1e-12), found, comm)
    for one, other in zip(mine, alone):
        assert_all(torch.allclose(one.grad, other.grad, rtol=0, atol=1e-12), one.grad, comm)

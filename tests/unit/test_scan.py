"""Scans, chains, segments and trees on one rank, against loops and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from chains import decode_in_sequence, draw, every_path
from scans import NAMES, elements, equal, sequential

from mpillm.comm.single import SingleComm
from mpillm.errors import ConfigError, NumbersError, ShapeError
from mpillm.scan import (
    AFFINE_DENSE,
    best_segmentation,
    best_trees,
    blocks,
    companion,
    crf_log_likelihoods,
    crf_log_partition,
    crf_marginals,
    crf_path_score,
    reduce,
    scan,
    segmentation_log_partition,
    tree_log_partition,
    tree_marginals,
    viterbi,
)
from mpillm.scan.dyadic import pieces

ALONE = SingleComm()


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_SHORTEST", 16)
    monkeypatch.setattr(blocks, "WARMUP", 3)


def test_pieces_cover_a_part_once_and_are_few():
    for start, stop in itertools.combinations_with_replacement(range(40), 2):
        found = pieces(start, stop)
        covered = sorted(i for level, index in found for i in range(index << level, (index + 1) << level))
        assert covered == list(range(start, stop))
        assert len(found) <= 2 * max(stop - start, 1).bit_length()


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_associative(name):
    operator, x = elements(name, 9)
    loop = sequential(operator, x)
    assert equal(scan(operator, x, ALONE), loop, 1e-12)
    with pytest.raises(AssertionError):  # an order reversed is seen, where order matters
        assert equal(scan(operator, tuple(p.flip(0) for p in x) if isinstance(x, tuple) else x.flip(0), ALONE), loop, 1e-12)


def test_a_recurrence_of_third_order():
    coefficients, inputs = torch.randn(20, 3, dtype=torch.float64) / 3, torch.randn(20, dtype=torch.float64)
    h = [0.0] * 3
    for c, b in zip(coefficients.tolist(), inputs.tolist()):
        h.append(sum(c[o] * h[-1 - o] for o in range(3)) + b)
    found = scan(AFFINE_DENSE, companion(coefficients, inputs), ALONE)[1][:, 0]
    assert torch.allclose(found, torch.tensor(h[3:], dtype=torch.float64), rtol=0, atol=1e-12)


def test_nothing_reduces_to_the_identity():
    operator, x = elements("max_plus, integers", 0)
    assert reduce(operator, x, ALONE).diagonal().eq(0).all()
    with pytest.raises(ShapeError, match="no identity"):
        reduce(*elements("first of", 0), ALONE)


@pytest.mark.parametrize("steps, states", [(1, 1), (1, 3), (2, 2), (40, 3), (500, 5), (1003, 2)])
def test_viterbi_finds_the_path_of_the_loop(short_blocks, steps, states):
    for seed, low in enumerate((-1, -9, -5000, -10**6)):
        scores = draw(steps, states, seed, low)
        path, score = viterbi(*scores, ALONE)
        want, best = decode_in_sequence(*scores)
        assert (path.numpy() == want).all() and score == best and isinstance(score, int)
        path, score = viterbi(*(torch.tensor(s) / 7 for s in scores), ALONE)
        assert math.isclose(score, best / 7, rel_tol=1e-6)


def test_viterbi_is_the_best_of_all_paths_and_breaks_ties_downward():
    scores = draw(5, 3, seed=4, low=-1)
    all_paths = every_path(*scores)
    ties = [path for path, score in all_paths.items() if score == max(all_paths.values())]
    path, score = viterbi(*scores, ALONE)
    assert len(ties) > 1 and score == max(all_paths.values())
    assert tuple(path.tolist()) == min(ties, key=lambda path: path[::-1])


@pytest.mark.parametrize("kind", ["permutation", "islands"])
def test_chains_that_never_forget_are_computed_in_sequence(short_blocks, kind):
    transitions = np.full((4, 4), -np.inf)
    if kind == "permutation":
        transitions[range(4), [1, 2, 3, 0]] = 0
    if kind == "islands":
        transitions[:2, :2] = transitions[2:, 2:] = -1
    scores = np.round(np.random.default_rng(0).random((300, 4)) * 4), transitions, np.array([0.0, 2, 1, 0])
    with pytest.warns(RuntimeWarning, match="does not forget its past"):
        path, score = viterbi(*scores, ALONE)
    want, best = decode_in_sequence(*scores)
    assert (path.numpy() == want).all() and score == best


def test_where_every_path_is_forbidden_the_score_says_so(short_blocks):
    path, score = viterbi(np.zeros((300, 4)), np.full((4, 4), -np.inf), np.zeros(4), ALONE)
    assert score == -np.inf and path.eq(0).all()


@pytest.mark.parametrize("repair", ["_write", "_agree"])
def test_a_wrong_seam_would_be_seen(short_blocks, monkeypatch, repair):
    scores = draw(2000, 6, 1, -40)
    want, best = decode_in_sequence(*scores)
    assert (viterbi(*scores, ALONE)[0].numpy() == want).all()
    monkeypatch.setattr(blocks, "WARMUP", 1)
    monkeypatch.setattr(blocks.Chain, repair, lambda *_: False)
    assert (viterbi(*scores, ALONE)[0].numpy() != want).any()


def test_scores_that_do_not_fit_are_refused():
    steps, transitions, initial = draw(4, 3)
    with pytest.raises(ShapeError, match=r"must be \[T, K\]"):
        viterbi(steps, transitions[:2], initial, ALONE)
    with pytest.raises(NumbersError, match="transitions hold nan"):
        viterbi(steps, transitions * np.nan, initial, ALONE)
    with pytest.raises(ConfigError, match="apart"):
        viterbi(steps * 2**52, transitions, initial, ALONE)
    with pytest.raises(ShapeError, match="crf"):
        crf_log_partition(torch.zeros(3, 2), torch.zeros(2, 3), torch.zeros(2), ALONE)
    with pytest.raises(ShapeError, match="lengths 0"):
        crf_log_likelihoods(torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]), torch.zeros(2, 2),
                            torch.zeros(2), ALONE)
    with pytest.raises(ShapeError, match="segmentation"):
        best_segmentation(torch.zeros(3, 2, 2), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="parsing"):
        best_trees(torch.zeros(3, 2, 3))


def test_the_partition_function_sums_all_paths():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (3, 3), (3,))]
    scores[1][0, 2] = -torch.inf
    all_paths = every_path(*scores)
    total = torch.stack(list(all_paths.values())).logsumexp(0)
    assert torch.allclose(crf_log_partition(*scores, ALONE), total, rtol=0, atol=1e-12)
    marginals = torch.zeros(5, 3, dtype=torch.float64)
    for path, score in all_paths.items():
        marginals[range(5), path] += (score - total).exp()
        assert torch.allclose(crf_path_score(scores[0], torch.tensor(path), *scores[1:], ALONE), score, rtol=0, atol=1e-12)
    assert torch.allclose(crf_marginals(*scores, ALONE), marginals, rtol=0, atol=1e-12)
    scores[1][0, 2] = 0
    scores = [score.requires_grad_() for score in scores]
    assert torch.autograd.gradcheck(lambda *s: crf_log_partition(*s, ALONE), scores)


def segmentations(steps, longest, labels):
    """Yield every segmentation."""
    if not steps:
        yield ()
    for length in range(1, min(steps, longest) + 1):
        for rest, label in itertools.product(segmentations(steps - length, longest, labels), range(labels)):
            yield (*rest, (steps - length, steps, label))


def test_segmentations_are_the_best_and_the_sum_of_all():
    generator = torch.Generator().manual_seed(1)
    for steps, longest, labels in ((0, 1, 1), (1, 2, 2), (5, 3, 2), (4, 4, 1)):
        scores = torch.randn(steps, longest, labels, generator=generator, dtype=torch.float64).requires_grad_()
        transitions = torch.randn(labels, labels, generator=generator, dtype=torch.float64)

        def add(cuts, scores=scores, transitions=transitions):
            return sum((scores[a, b - a - 1, k] for a, b, k in cuts), scores.new_zeros(())) + sum(
                transitions[before[2], after[2]] for before, after in zip(cuts, cuts[1:]))

        every = {cuts: add(cuts) for cuts in segmentations(steps, longest, labels)}
        cuts, score = best_segmentation(scores, transitions)
        assert tuple(cuts) == max(every, key=lambda cuts: every[cuts].item())
        assert math.isclose(score, add(cuts).item(), abs_tol=1e-12)
        total, want = segmentation_log_partition(scores, transitions), torch.stack(list(every.values())).logsumexp(0)
        assert torch.allclose(total, want, rtol=0, atol=1e-12)
        if steps:
            for found, wanted in zip(torch.autograd.grad(total, scores), torch.autograd.grad(want, scores)):
                assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert best_segmentation(torch.full((3, 1, 1), -torch.inf), torch.zeros(1, 1)) == ([], -math.inf)


def projective_trees(words):
    """Yield the heads of every projective tree over words 1 to ``words``: heads of none, arcs that do not cross."""
    for heads in itertools.product(range(words + 1), repeat=words):
        arcs = [(min(h, m), max(h, m)) for m, h in enumerate(heads, 1)]
        crossing = any(a < c < b < d for (a, b), (c, d) in itertools.permutations(arcs, 2))
        if crossing or any(a == b for a, b in arcs):
            continue
        reached = {0}
        for _ in range(words):
            reached |= {m for m, h in enumerate(heads, 1) if h in reached}
        if len(reached) == words + 1:
            yield heads


def test_trees_are_the_best_and_the_sum_of_all_projective_ones():
    generator = torch.Generator().manual_seed(2)
    arcs = torch.randn(6, 6, 6, generator=generator, dtype=torch.float64)
    lengths = torch.arange(6)
    heads, scores = best_trees(arcs, lengths)
    totals, marginals = tree_log_partition(arcs, lengths), tree_marginals(arcs, lengths)
    assert [sum(1 for _ in projective_trees(n)) for n in range(6)] == [1, 1, 3, 12, 55, 273]
    for n in range(6):
        every = {heads: sum(arcs[n, h, m] for m, h in enumerate(heads, 1)) for heads in projective_trees(n)}
        best = max(every, key=lambda heads: float(every[heads]))
        assert heads[n].tolist() == [-1, *best, *[-1] * (5 - n)]
        assert math.isclose(float(scores[n]), float(every[best]), abs_tol=1e-12)
        values = torch.tensor([float(v) for v in every.values()], dtype=torch.float64)
        assert torch.allclose(totals[n], values.logsumexp(0), rtol=0, atol=1e-12)
        want = torch.zeros(6, 6, dtype=torch.float64)
        for tree, value in zip(every, (values - totals[n]).exp()):
            for m, h in enumerate(tree, 1):
                want[h, m] += value
        assert torch.allclose(marginals[n], want, rtol=0, atol=1e-12)
    small = arcs[:2, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(tree_log_partition, [small])

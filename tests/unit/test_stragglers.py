"""Which ranks hold up the others: the rule alone, on times made up."""

import random

import pytest

from mpillm.guard.stragglers import slow_ranks


def everybody(one, other):
    return True


def nobody(one, other):
    return one == other


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
def test_equal_ranks_are_not_slow(ranks):
    rng = random.Random(ranks)
    past = [[] for _ in range(ranks)]
    for window in range(200):  # noise of a fifth, and a machine that is as a whole three times as slow for a while
        now = [(3 if 50 < window < 100 else 1) * rng.uniform(0.8, 1.2) for _ in range(ranks)]
        assert slow_ranks(now, past, everybody) == slow_ranks(now, past, nobody) == {}
        for times, time in zip(past, now):
            times.append(time)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_that_is_slow_from_the_start_is_seen_beside_its_equals(ranks):
    now = [1.0] * (ranks - 1) + [2.0]
    assert slow_ranks(now, [[]] * ranks, everybody) == {ranks - 1: 2.0}
    assert slow_ranks(now, [[]] * ranks, nobody) == {}


def test_a_rank_that_becomes_slow_is_seen_alone():
    past = [[1.0, 1.1], [4.0, 4.2], [2.0, 2.0]]  # three stages of a pipeline, with work of their own
    assert slow_ranks([1.0, 4.0, 2.1], past, nobody) == {}
    assert slow_ranks([1.0, 4.0, 5.0], past, nobody) == {2: 2.5}


def test_two_of_four_on_a_slow_node_are_both_named():
    assert set(slow_ranks([1.0, 1.0, 2.0, 2.1], [[]] * 4, everybody)) == {2, 3}

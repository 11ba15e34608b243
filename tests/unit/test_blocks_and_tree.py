"""Block partitions, and the fixed tree of sums over them, against brute force.

Sums are written out as text, so that their order shows. The oracle goes down from the root by the definition (node
``i`` of level ``k`` has the items of block ``i`` of ``2**k``), never looking for a cut.
"""

import gc
import itertools
import random
import weakref

import numpy as np
import pytest

from mpillm.schedules.blocks import align, bounds, counts
from mpillm.schedules.tree import TreeAccumulator, split, tree_sum

SIZES = [0, 1, 2, 3, 7, 8, 9, 16, 37]


def written(left, right):
    return f"({left}+{right})"


def oracle(items, level=0, node=0):
    """The sum of node ``node`` of level ``level`` of the tree over ``items``; None if it has none of them."""
    low, high = node * len(items) // 2**level, (node + 1) * len(items) // 2**level
    if high - low < 2:
        return items[low] if high > low else None
    halves = [oracle(items, level + 1, 2 * node + side) for side in (0, 1)]
    present = [half for half in halves if half is not None]
    return written(*present) if len(present) == 2 else present[0] if present else None


def letters(total):
    return [f"x{i}" for i in range(total)]


@pytest.mark.parametrize("n", SIZES)
def test_blocks_cover_everything_once_and_evenly(n):
    for p in range(1, 12):
        cuts = [bounds(n, p, i) for i in range(p)]
        assert [item for low, high in cuts for item in range(low, high)] == list(range(n))
        assert counts(n, p) == [high - low for low, high in cuts]
        assert max(counts(n, p)) - min(counts(n, p)) <= 1


@pytest.mark.parametrize("n", SIZES)
def test_blocks_nest(n):
    for p, k in itertools.product(range(1, 6), range(1, 6)):
        for i in range(p):
            inner = [bounds(n, k * p, k * i + j) for j in range(k)]
            assert (inner[0][0], inner[-1][1]) == bounds(n, p, i)


def test_align():
    assert [align(n, 16) for n in (0, 1, 15, 16, 17)] == [0, 16, 16, 16, 32]


def test_the_oracle_by_hand():
    assert oracle(letters(3)) == "(x0+(x1+x2))"
    assert oracle(letters(5)) == "((x0+x1)+(x2+(x3+x4)))"
    assert oracle(letters(8)) == "(((x0+x1)+(x2+x3))+((x4+x5)+(x6+x7)))"


@pytest.mark.parametrize("total", SIZES)
def test_tree_sum_has_the_order_of_the_definition(total):
    assert tree_sum(letters(total), written) == oracle(letters(total))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 9])
def test_absent_items_count_as_nothing(total):
    for present in itertools.islice(itertools.product([False, True], repeat=total), 64):
        items = [item if here else None for item, here in zip(letters(total), present)]
        assert tree_sum(items, written) == oracle(items)


@pytest.mark.parametrize("total", [n for n in SIZES if n])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_branches_of_ranks_make_up_the_whole_sum(total, ranks):
    own = [bounds(total, ranks, rank) for rank in range(ranks)]
    branches = [tree_sum(letters(total)[low:high], written, total, low) for low, high in own]
    assert tree_sum(branches, written) == oracle(letters(total))


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6])
def test_accumulating_in_any_order_gives_the_same_sum(total):
    for order in itertools.permutations(range(total)):
        accumulator = TreeAccumulator(total, 0, total, written)
        for index in order:
            accumulator.push(index, f"x{index}")
        assert accumulator.value == oracle(letters(total)) and len(accumulator.partial) == 1


@pytest.mark.parametrize("total", [7, 9, 16, 37])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_accumulating_a_branch_in_random_order(total, ranks):
    shuffled = random.Random(total)
    for rank in range(ranks):
        low, high = bounds(total, ranks, rank)
        for _ in range(20):
            accumulator = TreeAccumulator(total, low, high, written)
            for index in shuffled.sample(range(low, high), high - low):
                accumulator.push(index, f"x{index}")
            assert accumulator.value == tree_sum(letters(total)[low:high], written, total, low)


def test_accumulating_in_order_holds_few_sums():
    accumulator = TreeAccumulator(64, 0, 64, written)
    held = []
    for index in range(64):
        accumulator.push(index, "x")
        held.append(len(accumulator.partial))
    assert max(held) == 6  # one a level: log2(64)


@pytest.mark.parametrize("total", [2, 3, 7, 8, 9, 37])
def test_split_cuts_every_branch_where_its_halves_meet(total):
    branches = [(0, total)]
    while branches:
        low, high = branches.pop()
        middle = split(total, low, high)
        assert (middle is None) == (high - low < 2)
        if middle is not None:
            assert low < middle < high
            branches += [(low, middle), (middle, high)]


def test_what_was_added_is_let_go():
    """With the collector off: what only a cycle held would be kept, tensors as large as activations among it."""
    gc.disable()
    try:
        items = [np.zeros(1) for _ in range(3)]
        left = [weakref.ref(item) for item in items]
        tree_sum(items, np.add)
        del items
        assert not any(ref() is not None for ref in left)
    finally:
        gc.enable()

"""The planner's small programs against brute force and finite differences.

Their time at full size is measured by tests/tools/solver_times.py.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.machine import PRESETS, Level, Machine
from mpillm.planner.balance import balance, price_speeds
from mpillm.planner.buckets import bucket_cuts
from mpillm.planner.collective_costs import FORMULAS
from mpillm.planner.hierarchy import INSIDE, Hierarchy, decide
from mpillm.planner.memory import UNITS, choose_modes
from mpillm.planner.search import make_plan
from mpillm.planner.stages import balanced_cuts
from mpillm.schedules.algorithm import COMPOSED, PIECES, WHOLE, Algorithm
from mpillm.schedules.repair import repair

SEEDS = range(25)


def parts(n, count):
    """All ways to cut ``n`` items into ``count`` parts that are not empty."""
    return itertools.combinations(range(1, n), count - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_stages_end_as_early_as_the_best_cuts(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    count, microbatches = int(rng.integers(1, n + 1)), int(rng.integers(1, 12))
    costs, speeds = rng.random(n) + 0.05, rng.random(count) + 0.2

    def end(cuts):
        times = [costs[low:high].sum() / speed for low, high, speed in zip((0, *cuts), (*cuts, n), speeds)]
        return sum(times) + (microbatches - 1) * max(times)

    found = balanced_cuts(costs, count, microbatches, speeds)
    assert end(found) == pytest.approx(min(map(end, parts(n, count))), rel=1e-9)


def solved(items, item_s, start_s, most, active):
    """Return the program of :func:`balance` for given ranks that take part, by HiGHS: its time and the ranks' duals."""
    item_s, start_s, n = item_s[active], start_s[active], len(active)
    found = linprog(np.r_[np.zeros(n), 1.0], A_ub=np.c_[np.diag(item_s), -np.ones(n)], b_ub=-start_s,
                    A_eq=[[1.0] * n + [0.0]], b_eq=[items], bounds=[*((0, most[r]) for r in active), (None, None)])
    return (found.fun, dict(zip(active, -found.ineqlin.marginals))) if found.success else (np.inf, {})


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_are_the_best_whole_ones_and_their_bound_the_best_of_all_active_sets(seed):
    rng = np.random.default_rng(seed)
    ranks, items = int(rng.integers(1, 5)), int(rng.integers(1, 8))
    item_s, start_s = rng.random(ranks) + 0.1, rng.random(ranks) * rng.choice([0.1, 3.0])
    most = rng.integers(2, 9, ranks) if ranks == 4 else np.full(ranks, items)
    found = balance(items, item_s, start_s, most)
    every = [x for x in itertools.product(*(range(m + 1) for m in most)) if sum(x) == items]
    best = min(max(s + t * x for s, t, x in zip(start_s, item_s, shares) if x) for shares in every)
    assert sum(found.shares) == items and all(x <= m for x, m in zip(found.shares, most))
    assert found.time_s == pytest.approx(best)
    bound_s, prices = min((solved(items, item_s, start_s, most, list(active)) for count in range(1, ranks + 1)
                           for active in itertools.combinations(range(ranks), count)), key=lambda one: one[0])
    assert found.bound_s == pytest.approx(bound_s) and found.bound_s <= found.time_s + 1e-12
    assert found.rank_prices == pytest.approx([prices.get(rank, 0.0) for rank in range(ranks)], abs=1e-9)


def test_a_message_is_split_over_the_routes_that_pay():
    """Of two links and one that is fast but far: 5 us and 10 GB/s, 5 us and 5 GB/s, 100 us and 50 GB/s."""
    beta, alpha = 1 / np.array([10e9, 5e9, 50e9]), np.array([5e-6, 5e-6, 100e-6])
    small, large = (balance(n_bytes, beta, alpha) for n_bytes in (30_000, 100_000_000))
    assert small.shares == (20_000, 10_000, 0) and small.rank_prices == pytest.approx((2 / 3, 1 / 3, 0))
    assert large.time_s == pytest.approx((100e6 + (5e-6 * 15e9 + 100e-6 * 50e9)) / 65e9)
    assert large.time_s < min(alpha + 100e6 * beta) and large.time_s - large.bound_s < beta.max()


def test_a_faster_rank_brings_what_its_price_says():
    speeds, step_s = np.array([1.0, 0.9, 0.5]), 2.0
    rows = price_speeds(16, speeds, step_s)
    for rank, row in enumerate(rows):
        faster = speeds * np.where(np.arange(3) == rank, 1.0001, 1)
        saved = 1 - balance(16, 1 / faster).bound_s / balance(16, 1 / speeds).bound_s
        assert row["price_s_per_unit"] * 1e-4 * row["limit"] == pytest.approx(step_s * saved, rel=1e-3)
    assert not price_speeds(16, [0.5, 0.5], step_s)


def test_shares_keep_to_what_ranks_hold_and_prices_are_true():
    item_s = np.array([1.0, 1.0, 4.0])
    found = balance(9, item_s, most=[3, 9, 9])
    assert found.shares == (3, 5, 1)
    dearer = balance(9, item_s * [1, 1, 1.001], most=[3, 9, 9]).bound_s - found.bound_s
    filled = found.bound_s / item_s[2]  # items that the slow rank has at the bound
    assert dearer == pytest.approx(found.rank_prices[2] * filled * 0.004, rel=0.01)
    assert balance(10, item_s, most=[3, 9, 9]).bound_s - found.bound_s == pytest.approx(found.item_price_s)
    with pytest.raises(ConfigError, match="ranks hold"):
        balance(9, item_s, most=[1, 1, 1])


def test_a_plan_for_unequal_ranks_says_what_each_costs():
    config = Config.from_dict({"model": {"vocab_size": 64, "hidden_size": 64, "ffn_size": 128, "num_layers": 6,
                                         "num_heads": 4},
                               "train": {"seq_len": 32, "global_batch": 8}})
    machine = replace(PRESETS["cpu-node"], speeds=(1.0, 0.5), num_ranks=2)
    by_data, by_stage = (make_plan(config.with_values({key: 2}), machine, 2)
                         for key in ("layout.data", "layout.pipeline"))
    priced = {one["what"]: one["price_s_per_unit"] for one in by_data.binding}
    assert [priced[f"speed of data rank {rank}"] for rank in (0, 1)] == pytest.approx(
        [2 / 3 * by_data.predicted["pipeline_s"], 2 / 3 * by_data.predicted["pipeline_s"]])  # 2/3 over 1, 1/3 over 0.5
    assert any(one["what"].startswith("speed of rank") and one["price_s_per_unit"] > 0 for one in by_stage.binding)


@pytest.mark.parametrize("seed", SEEDS)
def test_buckets_arrive_as_early_as_the_best_ones(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    ready_s, n_bytes = np.sort(rng.random(n)), rng.integers(1, 100, n)

    def time_s(x):
        return np.minimum(0.05 + 0.002 * x, 0.15 + 0.001 * x)

    def end(cuts):
        now = 0.0
        for low, high in zip((0, *cuts), (*cuts, n)):
            now = max(now, ready_s[high - 1]) + time_s(n_bytes[low:high].sum())
        return now

    cuts, end_s = bucket_cuts(ready_s, n_bytes, time_s)
    assert end(cuts) == pytest.approx(end_s)
    assert end_s == pytest.approx(min(end(c) for count in range(1, n + 1) for c in parts(n, count)))


@pytest.mark.parametrize("seed", SEEDS)
def test_modes_are_the_best_that_fit(seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 7))
    time_s, n_bytes = rng.random((3, layers)), rng.integers(0, 9, (3, layers)) * 1000.0
    limit = float(rng.integers(int(n_bytes.min(0).sum()), int(n_bytes.max(0).sum()) + 1000))
    found = choose_modes(time_s, n_bytes, limit)
    every = [(sum(time_s[m, i] for i, m in enumerate(modes)), sum(n_bytes[m, i] for i, m in enumerate(modes)))
             for modes in itertools.product(range(3), repeat=layers)]
    assert found.n_bytes <= limit
    # Needs are rounded up to units: it beats whatever fits with that much less.
    rounding = layers * limit / UNITS
    assert min(t for t, b in every if b <= limit) <= found.time_s + 1e-12
    assert found.time_s <= min((t for t, b in every if b <= limit - rounding), default=np.inf) + 1e-12
    assert found.bound_s <= found.time_s + 1e-9
    more = choose_modes(time_s, n_bytes, limit * (1 + 1e-6)).bound_s
    assert found.bound_s - more == pytest.approx(found.price_s_per_byte * limit * 1e-6, rel=0.01, abs=1e-9)


def test_what_cannot_fit_is_refused():
    with pytest.raises(ConfigError, match="at least 6"):
        choose_modes([[1.0, 1.0], [2.0, 2.0]], [[5, 5], [3, 3]], 5)


def test_collectives_over_levels_equal_all_their_compositions():
    levels = (Level("core", 2, 1e-7, 1e-11), Level("node", 6, 1e-6, 1e-10), Level("network", 24, 1e-5, 1e-9))
    hierarchy = Hierarchy((2, 3, 4), levels)

    def every(op, n_bytes, low, high):
        ranks, link = int(np.prod(hierarchy.sizes[low:high])), levels[high - 1]
        for formula in FORMULAS[op].values():
            rounds, share = formula(ranks)
            yield rounds * link.alpha_s + share * n_bytes * link.beta_s_per_byte
        if high - low > 1 and op in INSIDE:
            before, is_split, after = INSIDE[op]
            part = n_bytes / hierarchy.sizes[low] if is_split else n_bytes
            lists = [list(every(other, n_bytes, low, low + 1)) for other in (*before, *after)]
            for chosen in itertools.product(*lists, list(every(op, part, low + 1, high))):
                yield sum(chosen)

    for op in FORMULAS:
        for n_bytes in (100, 10**5, 10**8):
            assert hierarchy.best(op, n_bytes).time_s == pytest.approx(min(every(op, n_bytes, 0, 3)))


def test_tables_change_with_size_and_with_the_network():
    machine = Machine("two levels", "made up", (Level("node", 4, 1e-6, 1e-10), Level("network", 64, 1e-5, 1e-8)),
                      ((32, 1e9),), 1e9, 1e10)
    table, inside = decide(machine, 16), decide(machine, 4)
    assert table.choose("allreduce", "data", "float32", 1 << 30) == "two_level"
    assert inside.choose("allreduce", "data", "float32", 256) == "recursive_doubling"
    assert inside.choose("allreduce", "data", "float32", 1 << 30) in ("ring", "halving_doubling")
    assert table.from_dict(table.to_dict()) == table


def cost_of(choice, op, n_bytes, measured):
    """Return the seconds of a choice of :func:`repair`, from the times that were measured."""
    if choice == COMPOSED:
        return measured["reduce_scatter"][n_bytes][1] + measured["allgather"][n_bytes][1]
    algorithm = Algorithm.parse(choice)
    size = algorithm.n_bytes or n_bytes
    whole = measured[op][size][1]
    if algorithm.n_bytes and op == "allreduce":
        whole = min(whole, cost_of(COMPOSED, op, size, measured))
    return whole * (math.ceil(n_bytes / size) if algorithm.name == PIECES else 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_repaired_table_equals_all_nested_replacements(seed, monkeypatch):
    monkeypatch.setattr("mpillm.schedules.repair._GAIN", 1.0)
    rng = np.random.default_rng(seed)
    sizes = sorted(rng.choice(np.arange(1, 200), 7, replace=False).tolist())
    measured = {op: {n: ("mpi", float(rng.uniform(1, 50))) for n in sizes}
                for op in ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall")}
    for op, chosen in repair(measured).items():
        least = {n: measured[op][n][1] for n in sizes}
        for _ in range(20 if op in WHOLE else 0):  # replace until nothing changes any more
            for n, m in itertools.product(sizes, sizes):
                least[n] = min(least[n], least[m] * math.ceil(n / m))
                if op == "allreduce":
                    least[n] = min(least[n], cost_of(COMPOSED, op, n, measured))
        for n in sizes:
            assert cost_of(chosen[n], op, n, measured) == pytest.approx(least[n])
        as_long = {n: Algorithm.parse(text).n_bytes for n, text in chosen.items()}
        assert not any(as_long[other] for other in as_long.values() if other)  # a table that can be obeyed


def test_a_published_erratic_table_is_repaired():
    # OSU allreduce, Open MPI 5.0.8 on 144 ranks of a cloud, microseconds: 32 KiB take 20 times as long as 64 KiB.
    published = {4096: 19.48, 8192: 96.30, 16384: 349.82, 32768: 3214.49, 65536: 160.17, 131072: 3674.69,
                 262144: 3692.61}
    chosen = repair({"allreduce": {n: ("mpi", us * 1e-6) for n, us in published.items()}})["allreduce"]
    assert chosen == {4096: "mpi", 8192: "pieces:4096", 16384: "pieces:4096", 32768: "pieces:4096", 65536: "mpi",
                      131072: "pieces:65536", 262144: "pieces:65536"}
    del published[4096], published[8192]
    chosen = repair({"allreduce": {n: ("mpi", us * 1e-6) for n, us in published.items()}})["allreduce"]
    assert chosen[16384] == chosen[32768] == "padded:65536"


def test_a_repair_that_saves_little_is_left():
    measured = {"allreduce": {8: ("mpi", 1.0), 16: ("mpi", 0.9)}, "reduce_scatter": {8: ("mpi", 0.5), 16: ("mpi", 0.3)},
                "allgather": {8: ("mpi", 0.4), 16: ("ring", 0.3)}}
    assert repair(measured)["allreduce"] == {8: "padded:16", 16: "reduce_scatter+allgather"}
    measured["allgather"][16] = "ring", 0.5
    assert repair(measured)["allreduce"] == {8: "mpi", 16: "mpi"}

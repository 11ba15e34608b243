"""The search over layouts: what it leaves open and what not, its prices, what binds, and the plan it writes."""

import math
import re
from dataclasses import replace
from itertools import combinations, permutations, product

import pytest
from click.testing import CliRunner

from mpillm import Config
from mpillm.cli.plan import command
from mpillm.errors import ConfigError
from mpillm.machine import PRESETS, Level, Machine
from mpillm.model.description import SHAPES
from mpillm.plan import Plan
from mpillm.planner import layout_costs, mixtures
from mpillm.planner.balance import balance
from mpillm.planner.keys import describe
from mpillm.planner.mixtures import mix
from mpillm.planner.search import Candidate, Pricer, layouts, make_plan, predicted_timeline, price_layout
from mpillm.planner.timeline import Transfer
from mpillm.schedules.check import check
from mpillm.schedules.formats import named_or_read
from mpillm.schedules.pipeline import make_schedule

SMALL = Config.from_dict({
    "model": {"vocab_size": 64, "hidden_size": 64, "ffn_size": 128, "num_layers": 6, "num_heads": 4, "max_seq_len": 32},
    "train": {"seq_len": 32, "global_batch": 8},
})
MACHINE = Machine("test", "made up", (Level("node", 4, 1e-6, 1e-9), Level("network", 64, 1e-5, 1e-8)),
                  ((32, 1e9), (128, 2e9)), 1e9, 1e10, 1e-5)
LARGE = Config.from_dict({
    "model": {**SHAPES["gpt"], "vocab_size": 51200, "hidden_size": 12288, "ffn_size": 49152, "num_layers": 96,
              "num_heads": 96, "max_seq_len": 2048},
    "train": {"seq_len": 2048, "global_batch": 1536, "dtype": "bfloat16"},
})
# Numbers that SMALL has in a layer, in the embedding and in the head; in its last norm.
LAYER, TABLE, NORM = 64 * (4 * 64 + 3 * 128) + 2 * 64, 64 * 64, 64


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_every_layout_can_be_resolved(ranks):
    found = list(layouts(SMALL, ranks, MACHINE))
    assert len(set(found)) == len(found) > 0
    pricer = Pricer(SMALL, MACHINE, ranks)
    for one in found:
        assert one.data * one.pipeline * one.tensor == ranks
        sizes = pricer.stage_sizes(one)
        assert sum(sizes) == 6 and min(sizes) > 0 and len(sizes) == one.pipeline * one.chunks
        plan = Plan(ranks, 1, model={}, layout=plan_keys(one, sizes))
        resolved = plan.applied_to(SMALL).resolve(ranks)
        assert (resolved.layout.schedule, resolved.train.microbatch) == (one.schedule, one.microbatch)


def plan_keys(layout, sizes):
    cuts = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return {**vars(layout), "stage_cuts": cuts, "order": ["data", "pipeline", "tensor"]}


def test_fixed_keys_stay_fixed():
    config = SMALL.with_values({"layout.pipeline": 2, "layout.schedule": "zb-h1", "train.microbatch": 2,
                                "layout.recompute": "full"})
    found = list(layouts(config, 4, MACHINE))
    assert {(one.pipeline, one.schedule, one.microbatch, one.recompute) for one in found} == {(2, "zb-h1", 2, "full")}
    assert {(one.data, one.tensor) for one in found} == {(1, 2), (2, 1)}


def test_the_plan_is_the_cheapest_that_fits():
    pricer = Pricer(SMALL, MACHINE, 4)
    prices = [pricer.played(pricer.price(one)) for one in layouts(SMALL, 4, MACHINE)]
    plan = make_plan(SMALL, MACHINE, 4, top=3)
    assert plan.predicted["step_s"] == min(price.step_s for price in prices)
    costs = [other["step_s"] for other in plan.alternatives]
    assert len(costs) == 3 and costs == sorted(costs) and costs[0] >= plan.predicted["step_s"]
    assert plan.predicted["lower_bound_s"] <= plan.predicted["step_s"]
    tight = replace(MACHINE, memory_bytes=sorted(price.memory_bytes for price in prices)[len(prices) // 4])
    squeezed = make_plan(SMALL, tight, 4)
    assert squeezed.predicted["step_s"] <= min(p.step_s for p in prices if p.memory_bytes <= tight.memory_bytes)
    assert squeezed.predicted["memory_bytes_per_rank"] <= tight.memory_bytes


SLOW_LINK = replace(MACHINE, levels=(Level("node", 1, 0.0, 0.0), Level("network", 64, 1e-5, 1e-6)))


def test_a_slow_link_gets_a_schedule_of_its_own(tmp_path):
    config = SMALL.with_values({"layout.pipeline": 2, "layout.data": 1, "layout.tensor": 1, "train.microbatch": 1})
    pricer = Pricer(config, SLOW_LINK, 2)
    textbook = min((pricer.played(pricer.price(one)) for one in layouts(config, 2, SLOW_LINK)), key=lambda p: p.step_s)
    plan = make_plan(config, SLOW_LINK, 2)
    made = named_or_read(plan.layout["schedule"], 2, 8)
    check(made, 6)
    assert describe(plan.layout) == "data=1 pipeline=2 tensor=1 microbatch=1 synthesised"
    assert plan.predicted["step_s"] < layout_costs.CLEARLY * textbook.step_s
    assert predicted_timeline(plan).total_s == plan.predicted["pipeline_s"]
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.applied_to(config).resolve(2).layout.schedule == made.to_text()
    assert price_layout(loaded.applied_to(config), SLOW_LINK, 2).predicted["step_s"] == plan.predicted["step_s"]
    tight = replace(SLOW_LINK, memory_bytes=plan.predicted["memory_bytes_per_rank"] - 1)
    squeezed = make_plan(config, tight, 2)
    assert squeezed.predicted["memory_bytes_per_rank"] <= tight.memory_bytes
    assert squeezed.predicted["step_s"] >= plan.predicted["step_s"]
    for key, value in (("layout.schedule", "zb-h1"), ("layout.chunks", 2)):
        assert "\n" not in make_plan(config.with_values({key: value}), SLOW_LINK, 2).layout["schedule"]


def test_messages_that_processors_drive_hold_up_what_they_compute():
    """A rank in the middle of a pipeline drives two each way; gradients are driven where backward hides them."""
    busy = replace(SLOW_LINK, levels=tuple(replace(level, busy_s_per_byte=1e-6) for level in SLOW_LINK.levels))
    layout, n_bytes = Candidate(1, 3, 1, 1, "1f1b", 1, 0, False, "none"), 32 * 64 * 4
    (f, i, w), (f_busy, i_busy, w_busy) = (Pricer(SMALL, machine, 3).stage_times(layout)[0] for machine in (SLOW_LINK, busy))
    assert w == w_busy
    for before, after in ((f, f_busy), (i, i_busy)):
        assert [b - a for a, b in zip(before, after)] == pytest.approx([n * n_bytes * 1e-6 for n in (1, 2, 1)])
    layout = Candidate(2, 1, 1, 1, "1f1b", 1, 1, False, "none")
    idle, driven = (pricer.played(pricer.price(layout)) for pricer in (Pricer(SMALL, m, 2) for m in (SLOW_LINK, busy)))
    parameters = fullest([6])
    assert 0 < driven.step_s - idle.step_s < 2 * parameters * 4 / 2 * 1e-6


def test_ranks_that_wait_for_each_other_split_less():
    waiting = replace(MACHINE, levels=tuple(replace(level, skew_s=1e-3) for level in MACHINE.levels))
    prices = []
    for machine in (MACHINE, waiting):
        pricer = Pricer(SMALL, machine, 4)
        prices.append([pricer.price(Candidate(4 // t, 1, t, 1, "1f1b", 1, 1, False, "none")) for t in (1, 4)])
    (data, tensor), (data_after, tensor_after) = prices
    meetings = 8 * (6 * 4 + 3 + 1)  # microbatches, layers, the head's, and the embedding's
    assert data_after.step_s == data.step_s
    assert tensor_after.step_s - tensor.step_s == pytest.approx(meetings * 1e-3)


def test_what_fits_nowhere_names_the_nearest():
    with pytest.raises(ConfigError, match=r"the least is .* GB with data=.*up to 4096 ranks do not help"):
        make_plan(SMALL, replace(MACHINE, memory_bytes=1000.0), 4)
    small = replace(MACHINE, memory_bytes=8e5)
    with pytest.raises(ConfigError, match=r"take \d+ ranks, .* GB with data=") as error:
        make_plan(SMALL, small, 2)
    ranks = int(re.search(r"take (\d+) ranks", str(error.value))[1])
    assert make_plan(SMALL, small, ranks).predicted["memory_bytes_per_rank"] <= small.memory_bytes
    with pytest.raises(ConfigError, match="the least is"):
        make_plan(SMALL, small, ranks // 2)


@pytest.mark.parametrize("batch", [8, 12, 9])
def test_what_is_not_searched_could_not_win(batch):
    """Whatever fits is found where memory prunes; a replicated optimiser never beats a sharded one."""
    config = SMALL.with_values({"train.global_batch": batch})
    pricer = Pricer(config, MACHINE, 4)
    every = [pricer.price(one) for one in layouts(config, 4, MACHINE)]
    for price in every:
        if price.layout.data > 1:
            other = pricer.price(replace(price.layout, zero=0))
            assert price.layout.zero == 1 and price.step_s < other.step_s and price.memory_bytes < other.memory_bytes
    bytes_ = sorted(price.memory_bytes for price in every)
    for limit in bytes_[::len(bytes_) // 9]:
        found = list(layouts(config, 4, MACHINE, lambda one: pricer.price(one).memory_bytes <= limit))
        assert {price.layout for price in every if price.memory_bytes <= limit} <= set(found)
        assert limit > bytes_[0] or len(found) < len(every) / 4


def test_a_batch_that_does_not_divide_is_planned():
    config = SMALL.with_values({"train.global_batch": 9, "layout.data": 2})
    found = list(layouts(config, 2, MACHINE))
    assert {one.microbatch for one in found} == {1, 2, 3, 5}  # 5, 3, 2 and 1 microbatches of the fullest rank
    pricer = Pricer(config, MACHINE, 2)
    for one in found:
        resolved = Plan(2, 1, layout=plan_keys(one, [6])).applied_to(config).resolve(2)
        assert pricer.num_microbatches(one) == max(map(len, resolved.microbatch_bounds()))
    assert make_plan(config, MACHINE, 2).layout["data"] == 2


def test_full_pipelines_have_their_closed_form():
    """With free messages and enough microbatches the price of textbook schedules is that of the played ones."""
    free = replace(MACHINE, levels=(Level("node", 4, 0.0, 0.0), Level("network", 64, 0.0, 0.0)))
    config = SMALL.with_values({"train.global_batch": 64, "train.microbatch": 1})
    pricer = Pricer(config, free, 4)
    for one in layouts(config, 4, free):
        price = pricer.price(one)
        limit = 0.1 if one.chunks > 1 else 0.05  # stages are uneven: the form takes the longest
        assert price.step_s == pytest.approx(pricer.played(price).step_s, rel=limit), one
    few = SMALL.with_values({"train.microbatch": 2, "layout.pipeline": 6, "layout.chunks": 1, "model.vocab_size": 2})
    pricer = Pricer(few, free, 6)
    for one in layouts(few, 6, free):  # four microbatches do not fill six stages
        price = pricer.price(one)
        assert price.step_s == pytest.approx(pricer.played(price).step_s, rel=0.15), one


@pytest.mark.parametrize("ranks", [1, 4, 6])
def test_layers_alike_are_priced_as_if_each_had_its_own_way(ranks):
    pricer = Pricer(SMALL, MACHINE, ranks)
    for one in layouts(SMALL, ranks, MACHINE):
        if one.recompute == "none":
            price, listed = pricer.price(one), pricer.price(replace(one, recompute=("none",) * 6))
            assert (listed.step_s, listed.memory_bytes) == pytest.approx((price.step_s, price.memory_bytes), rel=1e-12)


def test_what_is_fixed_is_kept():
    cuts = SMALL.with_values({"layout.stage_cuts": [1, 2, 5], "layout.recompute": "none"})
    for plan in (make_plan(cuts, MACHINE, 4), price_layout(cuts.with_values({"layout.pipeline": 4}), MACHINE, 4)):
        assert plan.layout["stage_cuts"] == [1, 2, 5] and plan.layout["pipeline"] * plan.layout["chunks"] == 4
        first, second, third, _ = plan.predicted["stages"]["forward_s"]
        assert first > second == pytest.approx(third / 3)
    shares = SMALL.with_values({"layout.shares": [6, 2], "train.microbatch": 2})
    for machine in (MACHINE, replace(MACHINE, speeds=(1.0, 1.0), num_ranks=2)):
        for plan in (make_plan(shares, machine, 2), price_layout(shares, machine, 2)):
            assert (plan.layout["data"], plan.layout["shares"]) == (2, [6, 2])
            assert plan.predicted["stages"]["microbatches"] == 3
    for order in permutations(("data", "pipeline", "tensor")):
        config = SMALL.with_values({"layout.order": list(order)})
        plan = make_plan(config, MACHINE, 8)
        assert plan.layout["order"] == list(order) == list(plan.applied_to(config).layout.order)
        with pytest.raises(ConfigError, match="layout.order"):
            plan.applied_to(SMALL.with_values({"layout.order": list(order[::-1])}))


def fullest(sizes):
    """Return the numbers of the fullest rank with so many layers on each."""
    if len(sizes) == 1:
        return sizes[0] * LAYER + 2 * TABLE + NORM
    return TABLE + max(max(sizes[:-1]) * LAYER, sizes[-1] * LAYER + NORM)


@pytest.mark.parametrize("order, inside", [(("data", "pipeline", "tensor"), "pipeline"),
                                           (("pipeline", "data", "tensor"), "data")])
def test_the_outermost_axis_crosses_nodes(order, inside):
    """Eight ranks on two nodes: messages and sums take the link that their axis has in this order."""
    pricer = Pricer(SMALL, MACHINE, 8)
    data, pipeline = (2, 4) if inside == "pipeline" else (4, 2)
    layout = Candidate(data, pipeline, 1, 1, "1f1b", 1, 1, False, "none", order)
    node, network = (1e-6, 1e-9), (1e-5, 1e-8)
    alpha, beta = node if inside == "pipeline" else network
    assert pricer.stage_times(layout)[1] == pytest.approx(alpha + 32 * 64 * 4 * beta)
    alpha, beta = node if inside == "data" else network
    n_bytes = 4 * fullest(pricer.stage_sizes(layout))
    bare = replace(SMALL, layout=replace(SMALL.layout, bucket_cuts=()))
    found, alone = (Pricer(bare, MACHINE, 8).price(one) for one in (layout, replace(layout, data=1)))
    way_s = math.log2(data) * alpha + n_bytes * (data - 1) / data * beta  # by halves
    own_s = n_bytes / data / MACHINE.memory_bytes_per_s
    assert found.gradients_s == pytest.approx(way_s + 3 * own_s)
    assert found.update_s == pytest.approx((7 + 2 * data) * own_s + way_s)  # AdamW, and zeros
    assert alone.gradients_s == pytest.approx(3 * n_bytes / MACHINE.memory_bytes_per_s)  # its norm and its clipping


def test_the_order_of_axes_over_nodes_is_searched():
    config = SMALL.with_values({"layout.data": 4, "layout.pipeline": 2, "layout.tensor": 1})
    plan = make_plan(config, MACHINE, 8)
    orders = [["data", "pipeline", "tensor"], ["pipeline", "data", "tensor"]]
    steps = [make_plan(config.with_values({"layout.order": order}), MACHINE, 8).predicted["step_s"] for order in orders]
    assert plan.layout["order"] == orders[1] and plan.predicted["step_s"] == min(steps) < max(steps)
    assert {one.order for one in layouts(config, 8, replace(MACHINE, levels=MACHINE.levels[1:]))} == {tuple(orders[0])}


@pytest.mark.parametrize("keys", [{"layout.schedule": "interleaved", "layout.chunks": 5}, {"layout.chunks": 5},
                                  {"layout.schedule": "gpipe", "layout.chunks": 3}, {"layout.schedule": "zb-h2"},
                                  {"layout.schedule": "interleaved", "layout.chunks": 1}])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_fixed_schedule_is_planned_as_it_is(keys, pipeline):
    config = SMALL.with_values({"model.num_layers": 12, "layout.pipeline": pipeline, "layout.tensor": 1} | keys)
    for plan in (make_plan(config, MACHINE, 2), price_layout(config.with_values({"train.microbatch": 1}), MACHINE, 2)):
        for key, value in keys.items():
            assert plan.layout[key.removeprefix("layout.")] == value
        played = predicted_timeline(plan)
        assert played.total_s == pytest.approx(plan.predicted["pipeline_s"])


def test_a_schedule_from_a_file_is_priced_by_playing(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(replace(make_schedule("zb-h2", 2, 4), name="mine").to_text())
    named, mine = (SMALL.with_values({"layout.schedule": name, "layout.data": 1, "layout.tensor": 1,
                                      "train.microbatch": 2}) for name in ("zb-h2", str(path)))
    plan = make_plan(mine, MACHINE, 2)
    expected = make_plan(named, MACHINE, 2).predicted
    assert plan.layout["schedule"] == str(path)
    assert {key: plan.predicted[key] for key in ("step_s", "bubble_fraction", "memory_bytes_per_rank")} == {
        key: pytest.approx(expected[key]) for key in ("step_s", "bubble_fraction", "memory_bytes_per_rank")}
    assert price_layout(mine, MACHINE, 2).predicted["step_s"] == plan.predicted["step_s"]
    open_ = mine.with_values({"layout.data": "auto"})
    assert {(one.data, one.pipeline, one.microbatch) for one in layouts(
        replace(open_, train=replace(open_.train, microbatch=None)), 4, MACHINE)} == {(2, 2, 1)}
    for pipeline in (1, 2):
        with pytest.raises(ConfigError, match='"1f1bb": neither one of gpipe'):
            make_plan(SMALL.with_values({"layout.schedule": "1f1bb", "layout.pipeline": pipeline}), MACHINE, 2)
        with pytest.raises(ConfigError, match="zb-h1.* with chunks = 2"):
            make_plan(SMALL.with_values({"layout.schedule": "zb-h1", "layout.chunks": 2, "layout.pipeline": pipeline}),
                      MACHINE, 2)


def test_prices_of_what_binds_are_differences():
    plan = make_plan(SMALL, MACHINE, 4)
    fixed = SMALL.with_values({f"layout.{key}": plan.layout[key] for key in
                               ("data", "pipeline", "tensor", "chunks", "schedule", "zero", "sequence_parallel",
                                "recompute")} | {"train.microbatch": plan.layout["microbatch"]})
    for one in plan.binding:
        if one["what"] == "memory_bytes":  # of which there is enough
            assert one["price_s_per_unit"] == 0
            continue
        raised = price_layout(fixed, MACHINE.scaled(one["what"], 1.001), 4).predicted["step_s"]
        expected = plan.predicted["step_s"] - one["price_s_per_unit"] * one["limit"] * 0.001
        assert raised == pytest.approx(expected, rel=1e-4)
        assert raised < plan.predicted["step_s"]


@pytest.mark.slow
def test_a_trillion_parameters_on_3072_ranks_are_planned():
    layers, hidden, heads, *_, batch, _, _ = MEGATRON[-1]
    config = LARGE.with_values({
        "model.num_layers": layers, "model.hidden_size": hidden, "model.ffn_size": 4 * hidden,
        "model.num_heads": heads, "model.num_kv_heads": heads, "model.head_dim": hidden // heads,
        "train.global_batch": batch})
    plan = make_plan(config, PRESETS["dgx-a100"], 3072)
    assert math.prod(plan.layout[axis] for axis in ("data", "pipeline", "tensor")) == 3072
    assert plan.predicted["lower_bound_s"] < plan.predicted["step_s"]


@pytest.mark.slow
def test_175_billion_parameters_are_planned_with_every_preset(tmp_path):
    for name in PRESETS:
        plan = make_plan(LARGE, Machine.load(name), 1024)
        assert plan.layout["data"] * plan.layout["pipeline"] * plan.layout["tensor"] == 1024
        assert plan.predicted["memory_bytes_per_rank"] <= PRESETS[name].memory_bytes
        path = tmp_path / f"{name}.json"
        PRESETS[name].save(path)
        assert Machine.load(path) == PRESETS[name]


# Narayanan et al. 2021, Table 1: layers, hidden, heads, tensor, pipeline, data, microbatch, batch, chunks, TFLOP/s a
# GPU with full recompute; 2048 tokens, 51,200 words, A100.
MEGATRON = [
    (24, 2304, 24, 1, 1, 32, 16, 512, 1, 137), (30, 3072, 32, 2, 1, 32, 16, 512, 1, 138),
    (36, 4096, 32, 4, 1, 32, 16, 512, 1, 142), (40, 6144, 48, 8, 1, 32, 8, 1024, 1, 135),
    (48, 8192, 64, 8, 2, 32, 4, 1536, 1, 138), (60, 10240, 80, 8, 4, 32, 2, 1792, 3, 140),
    (80, 12288, 96, 8, 8, 24, 2, 2304, 2, 148), (96, 16384, 128, 8, 16, 15, 1, 2160, 2, 155),
    (105, 20480, 128, 8, 35, 9, 1, 2520, 3, 163), (128, 25600, 160, 8, 64, 6, 1, 3072, 1, 163),
]
# Korthikanti et al. 2022, Table 5: layers, hidden, heads, pipeline, microbatch, batch, chunks, seconds with full
# recompute, seconds with selective recompute and sequence parallelism; tensor 8.
SELECTIVE = [(48, 6144, 64, 1, 4, 4, 1, 1.42, 1.10), (96, 12288, 96, 8, 1, 64, 3, 18.13, 13.75)]


def test_published_iterations_from_published_rates_alone():
    errors = []

    def error(layers, hidden, heads, layout, batch, measured_s):
        config = LARGE.with_values({
            "model.num_layers": layers, "model.hidden_size": hidden, "model.ffn_size": 4 * hidden,
            "model.num_heads": heads, "model.num_kv_heads": heads, "model.head_dim": hidden // heads,
            "train.global_batch": batch, "layout.bucket_cuts": []})  # they reduced gradients after backward
        ranks = layout.data * layout.pipeline * layout.tensor
        errors.append(abs(Pricer(config, PRESETS["dgx-a100"], ranks).price(layout).step_s / measured_s - 1))

    for layers, hidden, heads, t, p, d, size, batch, v, tflops in MEGATRON:
        flops = 96 * batch * 2048 * layers * hidden ** 2 * (1 + 2048 / 6 / hidden + 51200 / 16 / layers / hidden)
        layout = Candidate(d, p, t, v, "interleaved" if v > 1 else "1f1b", size, 0, False, "full")
        error(layers, hidden, heads, layout, batch, flops / (t * p * d * tflops * 1e12))
    for layers, hidden, heads, p, size, batch, v, full_s, selective_s in SELECTIVE:
        name = "interleaved" if v > 1 else "1f1b"
        error(layers, hidden, heads, Candidate(1, p, 8, v, name, size, 0, False, "full"), batch, full_s)
        error(layers, hidden, heads, Candidate(1, p, 8, v, name, size, 0, True, "selective"), batch, selective_s)
    assert sum(errors) / len(errors) < 0.05 and max(errors) < 0.13


def test_a_product_takes_whole_waves_of_tiles():
    plain = replace(MACHINE, matmul=((256, 1e12),))
    waves = replace(plain, wave=(4, 256, 128))
    assert plain.product_s(256, 64, 512) == pytest.approx(2 * 256 * 64 * 512 / 1e12)
    one = 4 * 2 * 256 * 128 * 64 / 1e12
    for rows, columns, count in ((256, 512, 1), (512, 256, 1), (256, 513, 2), (1, 1, 1), (128, 1024, 1), (257, 512, 2)):
        assert waves.product_s(rows, 64, columns) == pytest.approx(count * one)


def test_plans_of_earlier_versions_are_for_the_models_that_they_meant():
    sizes = ("hidden_size", "num_layers", "num_heads", "ffn_size", "vocab_size", "num_kv_heads", "head_dim", "max_seq_len")
    plan = make_plan(SMALL, MACHINE, 4)
    old = {key: plan.model[key] for key in sizes}
    gpt = SMALL.with_values({f"model.{key}": value for key, value in SHAPES["gpt"].items()})
    for kind, own, other in (("llama", SMALL, gpt), ("gpt", gpt, SMALL)):
        made = replace(plan, model={"kind": kind, **old})
        assert made.applied_to(own).layout.data == plan.layout["data"]
        with pytest.raises(ConfigError, match="model.norm = .*model.positions = "):
            made.applied_to(other)
    with pytest.raises(ConfigError, match="the plan: model.kind = mamba"):
        replace(plan, model={"kind": "mamba", **old}).applied_to(SMALL)


def test_plans_are_refused_for_other_models_and_layouts(tmp_path):
    plan = make_plan(SMALL, MACHINE, 4)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.applied_to(SMALL).layout.data == plan.layout["data"]
    for overrides, text in (({"model.hidden_size": 128, "model.head_dim": 16}, "model.hidden_size = 128"),
                            ({"layout.data": 3}, "layout.data = 3"), ({"train.microbatch": 7}, "train.microbatch = 7")):
        with pytest.raises(ConfigError, match=text):
            loaded.applied_to(SMALL.with_values(overrides))
    for overrides, text in (({"model.norm": "layer"}, "model.norm = layer .the plan: rms"),
                            ({"model.window": 5}, "model.window = 5 .the plan: None")):
        with pytest.raises(ConfigError, match=text):
            loaded.applied_to(SMALL.with_values(overrides))
    with pytest.raises(ConfigError, match="measured with 2 ranks"):
        make_plan(SMALL, replace(MACHINE, num_ranks=2), 4)
    with pytest.raises(ConfigError, match="dgx-a100"):
        Machine.load(tmp_path / "no such file")


def test_the_command_explains_and_draws(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.to_toml())
    figure = tmp_path / "plan.png"
    words = [str(path), "--machine", "cpu-node", "--ranks", "4", "-o", str(tmp_path / "plan.json"), "--explain",
             "--figure", str(figure)]
    found = CliRunner().invoke(command, words)
    assert found.exit_code == 0, found.exception
    for text in ("where the step goes", "the longest way to the end of backward", "what limits it", "next best", "s a step"):
        assert text in found.output
    assert figure.read_bytes().startswith(b"\x89PNG")
    plan = Plan.load(tmp_path / "plan.json")
    played = predicted_timeline(plan)
    assert played.total_s == pytest.approx(plan.predicted["pipeline_s"])


def test_plans_for_a_job_that_comes_back_smaller(tmp_path):
    path, output = tmp_path / "small.toml", tmp_path / "plan.json"
    path.write_text(SMALL.to_toml())
    words = [str(path), "--machine", "cpu-node", "--ranks", "4", "-o", str(output), "--tolerate", "2"]
    assert CliRunner().invoke(command, words).exit_code == 0
    for ranks in (4, 3, 2):
        assert Plan.load(output, ranks).num_ranks == ranks
    with pytest.raises(ConfigError, match="for 4 ranks.*launch has 1"):
        Plan.load(output, 1).check(1, 1)


def test_a_count_of_ranks_without_a_plan_is_told_and_the_others_are_written(tmp_path):
    path, output = tmp_path / "small.toml", tmp_path / "plan.json"
    path.write_text(SMALL.with_values({"layout.pipeline": 2}).to_toml())
    words = [str(path), "--machine", "cpu-node", "--ranks", "4", "-o", str(output), "--tolerate", "3"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0 and "s a step" in done.output
    assert [count for count in (1, 3) if f"no plan for {count} ranks: " in done.output] == [1, 3]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["plan.2-ranks.json", "plan.json", "small.toml"]
    assert Plan.load(output, 2).num_ranks == 2


def test_unequal_ranks_get_unequal_work():
    machine = replace(MACHINE, speeds=(1.0, 0.5), num_ranks=2)
    by_data = make_plan(SMALL.with_values({"layout.data": 2}), machine, 2)
    assert by_data.layout["shares"] == [6, 2]  # as long as 6 sequences; 5 and 3 take no less
    even = make_plan(SMALL.with_values({"layout.data": 2}), replace(machine, speeds=(0.5, 0.5)), 2)
    assert "shares" not in even.layout and even.predicted["step_s"] > by_data.predicted["step_s"]
    cuts = make_plan(SMALL.with_values({"layout.pipeline": 2, "layout.chunks": 1}), machine, 2).layout["stage_cuts"]
    assert cuts == [4]
    by_data, even = (make_plan(SMALL.with_values({"layout.data": 2, "train.microbatch": 1, **shares}),
                               replace(machine, speeds=(2.0, 1.0)), 2).predicted["pipeline_s"]
                     for shares in ({}, {"layout.shares": [4, 4]}))
    assert by_data == pytest.approx(even * 3 / 4)


def test_the_bound_holds_for_ranks_that_are_faster_than_the_rate(monkeypatch):
    config = SMALL.with_values({"model.vocab_size": 1})
    machine = Machine("test", "made up", (Level("node", 2, 0.0, 0.0),), ((32, 1e9),), 1e12, 1e15, speeds=(3.0, 1.0),
                      num_ranks=2)
    predicted = make_plan(config, machine, 2).predicted
    assert 0 < predicted["lower_bound_s"] <= predicted["step_s"] < 1.5 * predicted["lower_bound_s"]
    asked = []
    monkeypatch.setattr(layout_costs, "balance", lambda *what, **more: asked.append(1) or balance(*what, **more))
    make_plan(config, machine, 2)
    assert len(asked) == 3  # one program for the ranks, however many layouts, and one for a faster one of each


@pytest.mark.parametrize("fixed", [{"layout.data": 1, "layout.pipeline": 1}, {"layout.pipeline": 2, "layout.tensor": 1},
                                   {"layout.pipeline": 2, "layout.chunks": 2, "layout.data": 1}])
def test_layers_are_mixed_where_memory_binds(fixed):
    """The mixture beats every way that is alike in all layers, no split of a rank's layers that fits beats it, and the
    price of memory is what the time of one layer less costs over its bytes."""
    ranks = 2
    config = SMALL.with_values({**fixed, "train.microbatch": 1})
    pricer = Pricer(config, replace(MACHINE, memory_bytes=1e12), ranks)
    alike = {}
    for one in layouts(config, ranks, MACHINE):
        alike.setdefault(replace(one, recompute=""), {})[one.recompute] = pricer.price(one)
    ways = next(ways for ways in alike.values() if ways["none"].step_s == min(w["none"].step_s for w in alike.values()))
    lean, fast = ways["full"], ways["none"]
    for part in (0.2, 0.5, 0.8):
        limit = lean.memory_bytes + part * (fast.memory_bytes - lean.memory_bytes)
        mixed = mix(pricer, fast.layout, limit)
        assert mixed.memory_bytes <= limit and fast.step_s <= mixed.step_s <= lean.step_s
        plan = make_plan(config, replace(MACHINE, memory_bytes=limit), ranks, top=0)
        assert plan.predicted["step_s"] <= pricer.played(mixed).step_s + 1e-12
        assert plan.predicted["memory_bytes_per_rank"] <= limit
        layers = len(mixed.layout.recompute)
        for modes in product(("none", "selective", "full"), repeat=layers):
            other = pricer.price(replace(fast.layout, recompute=modes))
            assert other.memory_bytes > limit or other.step_s >= mixed.step_s * (1 - 1e-9)


@pytest.mark.slow
def test_the_price_of_memory_is_what_one_per_cent_more_saves():
    """At most limits it buys nothing; where another layout, or a layer more as it is, just does not fit, it does."""
    pricer = Pricer(SMALL, MACHINE, 4)
    every = sorted(pricer.price(one).memory_bytes for one in layouts(SMALL, 4, MACHINE))
    worth = []
    for limit in [bytes_ * share for bytes_ in every[::len(every) // 12] for share in (0.995, 1.0)][1:]:
        machine = replace(MACHINE, memory_bytes=limit)
        plan, more = make_plan(SMALL, machine, 4), make_plan(SMALL, machine.scaled("memory_bytes", 1.01), 4)
        price = next(one["price_s_per_unit"] for one in plan.binding if one["what"] == "memory_bytes")
        worth.append(price)
        saved_s = plan.predicted["step_s"] - more.predicted["step_s"]
        assert saved_s == pytest.approx(price * 0.01 * limit, rel=1e-6, abs=1e-15)
    assert min(worth) == 0 < max(worth)


def test_a_tight_plan_mixes_layers(tmp_path):
    config = SMALL.with_values({"layout.data": 1, "layout.pipeline": 1, "train.microbatch": 1})
    pricer = Pricer(config, MACHINE, 1)
    none, selective, _ = (pricer.price(one) for one in layouts(config, 1, MACHINE))
    limit = (none.memory_bytes + selective.memory_bytes) / 2
    make_plan(config, replace(MACHINE, memory_bytes=limit), 1).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    modes = plan.applied_to(config).layout.recompute
    assert len(modes) == 6 and set(modes) == {"none", "selective"}
    for place in (place for place, mode in enumerate(modes) if mode == "selective"):  # another as it is does not fit
        other = pricer.price(replace(none.layout, recompute=modes[:place] + ("none",) + modes[place + 1:]))
        assert other.memory_bytes > limit and other.step_s < plan.predicted["step_s"]


NETWORK = replace(MACHINE, levels=(Level("node", 1, 1e-6, 1e-9), Level("network", 64, 1e-5, 1e-8)))


@pytest.mark.parametrize("keys", [{"layout.data": 2}, {"layout.data": 4}, {"layout.data": 2, "layout.pipeline": 2},
                                  {"layout.data": 2, "layout.pipeline": 2, "layout.schedule": "zb-h1"}])
def test_buckets_are_planned_where_gradients_cross_nodes(keys):
    """Every choice of cuts is played by hand: the plan's is the best of them, and each is priced as it was played."""
    ranks = keys["layout.data"] * keys.get("layout.pipeline", 1)
    config = SMALL.with_values({"layout.tensor": 1, "layout.chunks": 1, "train.microbatch": 2, "layout.zero": 1,
                                "layout.recompute": "none", "layout.schedule": "1f1b"} | keys
                               | {"layout.pipeline": keys.get("layout.pipeline", 1)})
    plan = make_plan(config, NETWORK, ranks)
    timeline = predicted_timeline(plan)
    starts = [0, *plan.layout["stage_cuts"], 6]
    layer_s, head_s, embedding_s = (work[1:] for work in Pricer(config, NETWORK, ranks)._works(64, 1, 1, "none", False))
    is_split = plan.layout["schedule"] == "zb-h1"

    def arrival(cuts):
        arrived = 0.0
        for stage in range(len(starts) - 1):
            end = timeline.ends_s[stage][-1]
            layers = [(place, 4 * LAYER, sum(layer_s[is_split:])) for place in range(starts[stage], starts[stage + 1])][::-1]
            if starts[stage + 1] == 6:
                layers.insert(0, (6, 4 * (TABLE + NORM), sum(head_s[is_split:])))
            if stage == 0:
                layers.append((-1, 4 * TABLE, sum(embedding_s[is_split:])))
            now, free, waiting = end - sum(duration for *_, duration in layers), 0.0, 0
            for place, n_bytes, duration in layers:
                now, waiting = now + duration, waiting + n_bytes
                if place in cuts or (place, n_bytes, duration) == layers[-1]:
                    d = keys["layout.data"]
                    free, waiting = max(now, free) + math.log2(d) * 1e-5 + waiting * (d - 1) / d * 1e-8, 0
            arrived = max(arrived, free)
        return arrived

    own = fullest([stop - start for start, stop in zip(starts, starts[1:])])
    own_s = own / keys["layout.data"] * 4 / NETWORK.memory_bytes_per_s
    update_s, clip_s = 7 * own_s + own * 8 / NETWORK.memory_bytes_per_s, 3 * own_s
    there_s = plan.predicted["pipeline_s"] + plan.predicted["gradients_s"] - clip_s
    assert timeline.reduced_s == pytest.approx(there_s) and all(timeline.transfers)
    last = timeline.critical_path()[-1]
    assert isinstance(last.what, Transfer) and last.end_s == timeline.reduced_s
    best = min(arrival(cuts) for count in range(8) for cuts in combinations(range(7), count))
    for cuts in (None, (), (3,), tuple(range(7))):
        fixed = config if cuts is None else config.with_values({"layout.bucket_cuts": list(cuts)})
        found = price_layout(fixed, NETWORK, ranks)
        wanted = best if cuts is None else arrival(cuts)
        assert cuts is None or found.layout["bucket_cuts"] == list(cuts)
        there_s = found.predicted["pipeline_s"] + found.predicted["gradients_s"]
        assert there_s == pytest.approx(wanted + clip_s, rel=1e-6)
        assert found.predicted["update_s"] == pytest.approx(update_s + pass_s(found), rel=1e-6)


def pass_s(plan):
    """One way round the data ranks, for the weights of the fullest rank."""
    d = plan.layout["data"]
    layers = [stop - start for start, stop in zip([0, *plan.layout["stage_cuts"]], [*plan.layout["stage_cuts"], 6])]
    n_bytes = 4 * fullest(layers)
    return math.log2(d) * 1e-5 + n_bytes * (d - 1) / d * 1e-8


@pytest.mark.parametrize("keys", [
    {"layout.zero": 0}, {"train.numerics": "exact", "train.microbatch": 1}, {"train.dtype": "bfloat16"}, {}], ids=str)
@pytest.mark.parametrize("machine", [NETWORK, replace(MACHINE, shares_memory=True)], ids=["network", "node"])
def test_what_is_gathered_is_what_a_step_sends(keys, machine):
    """The times of what goes back are those of the bytes that :mod:`mpillm.planner.volume` counts, gradients and
    weights."""
    config = SMALL.with_values({"layout.data": 2, "layout.pipeline": 1, "layout.tensor": 1, "layout.zero": 1,
                                "train.microbatch": 4} | keys)
    pricer, plan = Pricer(config, machine, 2), make_plan(config, machine, 2)
    layout = next(iter(layouts(config, 2, machine)))
    sent = {one["operation"]: one["bytes"] for one in plan.predicted["volume"] if one["axis"] == "data"}
    parameters = pricer.parameters(layout, pricer.ends(layout)[0])
    link = machine.levels[-1 if machine is NETWORK else 0]
    found = sum(max(0.0, way(layout, parameters) - link.alpha_s) for way in (
        pricer.reduction.gathered_s, pricer.reduction.weights_s))
    assert found == pytest.approx(sent.get("allgather", 0) / 2 * link.beta_s_per_byte, rel=1e-3)


def test_buckets_of_unequal_ranks_are_complete_in_their_time():
    """A rank half as fast takes twice as long from bucket to bucket; its last one is complete when its action ends."""
    config = SMALL.with_values({"layout.data": 2, "layout.pipeline": 2, "layout.tensor": 1, "layout.zero": 1,
                                "layout.schedule": "1f1b", "layout.chunks": 1, "train.microbatch": 2,
                                "layout.stage_cuts": [3], "layout.bucket_cuts": [1, 2]})
    slow = replace(NETWORK, speeds=(0.5, 1.0, 0.5, 1.0), num_ranks=4)
    (even, first), (uneven, second) = ((plan, predicted_timeline(plan)) for plan in (
        price_layout(config, machine, 4) for machine in (NETWORK, slow)))
    left = [[one["left_s"] for one in plan.predicted["buckets"] if one["stage"] == 0] for plan in (even, uneven)]
    assert left[1] == pytest.approx([2 * one for one in left[0]]) and left[0][0] > left[0][-1] == 0
    assert second.transfers[0][-1].start_s == pytest.approx(second.ends_s[0][-1])
    assert first.ends_s[0][-1] < second.ends_s[0][-1]


def test_a_matrix_of_both_ends_has_a_bucket_of_its_own():
    config = SMALL.with_values({"layout.data": 2, "layout.pipeline": 1, "layout.tensor": 1, "layout.zero": 1,
                                "layout.bucket_cuts": [], "model.tie_embeddings": True})
    buckets = price_layout(config, NETWORK, 2).predicted["buckets"]
    assert [one["n_bytes"] for one in buckets] == [4 * (TABLE + NORM), 4 * 6 * LAYER, 4 * TABLE]


def test_inside_a_node_a_stage_has_one_bucket():
    assert make_plan(SMALL.with_values({"layout.data": 4}), MACHINE, 4).layout["bucket_cuts"] == []
    exact = SMALL.with_values({"layout.data": 4, "train.numerics": "exact", "train.microbatch": 1})
    assert make_plan(exact, NETWORK, 4).layout["bucket_cuts"] == []


def test_every_bucket_has_its_bytes_and_the_algorithm_that_the_table_has_for_them():
    config = SMALL.with_values({"layout.data": 4, "layout.pipeline": 2, "layout.tensor": 1, "layout.zero": 1,
                                "layout.stage_cuts": [3], "layout.bucket_cuts": [1, 5]})
    rows = (("reduce_scatter", "*", "*", 400_000, "recursive_halving"), ("reduce_scatter", "*", "*", None, "ring"))
    buckets = price_layout(config, replace(NETWORK, table=rows), 8).predicted["buckets"]
    wanted = [2 * LAYER, LAYER + TABLE, TABLE + NORM + LAYER, 2 * LAYER]  # of the first stage, then of the second
    assert [one["n_bytes"] for one in buckets] == [4 * size for size in wanted] and 4 * LAYER == 164_352
    assert [one["algorithm"] for one in buckets] == ["recursive_halving"] * 4
    rows = (("reduce_scatter", "*", "*", 200_000, "recursive_halving"), ("reduce_scatter", "*", "*", None, "ring"))
    buckets = price_layout(config, replace(NETWORK, table=rows), 8).predicted["buckets"]
    assert [one["algorithm"] for one in buckets] == ["ring", "recursive_halving", "recursive_halving", "ring"]
    alone = config.with_values({"layout.data": 1, "layout.bucket_cuts": []})
    assert price_layout(alone, NETWORK, 2).predicted["buckets"] == []


UNEQUAL = replace(MACHINE, speeds=(1.0, 1.0, 1.0, 0.2), num_ranks=4)


def test_no_data_rank_is_left_without_a_sequence():
    config = SMALL.with_values({"train.global_batch": 4, "layout.data": 4})
    assert make_plan(config, UNEQUAL, 4).layout.get("shares", [1, 1, 1, 1]) == [1, 1, 1, 1]
    larger = SMALL.with_values({"train.global_batch": 16, "layout.data": 4})
    assert make_plan(larger, UNEQUAL, 4).layout["shares"] == [5, 5, 5, 1]


def test_exact_numerics_share_alike_whatever_the_ranks_sustain():
    config = SMALL.with_values({"train.global_batch": 16, "layout.data": 4, "train.numerics": "exact", "train.microbatch": 1})
    plan = make_plan(config, UNEQUAL, 4)
    assert "shares" not in plan.layout
    even = make_plan(config, replace(UNEQUAL, speeds=(0.2,) * 4), 4)
    assert plan.predicted["pipeline_s"] == pytest.approx(even.predicted["pipeline_s"])  # the slowest decides


def test_where_no_mixture_fits_the_search_goes_on(monkeypatch):
    """Its stages are those of nothing recomputed, whose fullest may not fit whatever is."""
    config = SMALL.with_values({"layout.data": 1, "layout.pipeline": 1, "layout.tensor": 1, "train.microbatch": 4})
    prices = [make_plan(config.with_values({"layout.recompute": mode}), MACHINE, 1, top=0).predicted
              for mode in ("none", "full")]
    tight = replace(MACHINE, memory_bytes=sum(price["memory_bytes_per_rank"] for price in prices) / 2)
    assert isinstance(make_plan(config, tight, 1).layout["recompute"], list)

    def refuse(self, layout, limit_bytes):
        raise ConfigError("layers keep more than the limit")

    monkeypatch.setattr(mixtures, "mix", refuse)
    assert isinstance(make_plan(config, tight, 1).layout["recompute"], str)

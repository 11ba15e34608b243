"""The configuration: what is accepted, what is filled in, and what every error says."""

import itertools
import math
from dataclasses import fields, replace

import pytest
from tiny import MODEL, asked_at_random, tiny

from mpillm.cli.options import parse_overrides
from mpillm.config import AXES, Config
from mpillm.errors import INPUT_OUTPUT, USAGE, ConfigError, DataError, ScheduleError
from mpillm.planner.volume import step_volume
from mpillm.schedules import make_schedule

TOML = """
[model]
hidden_size = 40
num_layers = 7
num_heads = 5
ffn_size = 54
[train]
lr = 1
betas = [0.9, 0.99]
[layout]
order = ["tensor", "data", "pipeline"]
"""


def refusal(overrides, ranks=None):
    with pytest.raises(ConfigError) as caught:
        tiny(overrides, ranks)
    assert caught.value.exit_code == USAGE and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_read_and_written_back_equal(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    config = Config.load(path)
    assert (config.model.head_dim, config.model.num_kv_heads, config.model.vocab_size) == (8, 5, None)
    assert config.train.lr == 1.0 and config.train.betas == (0.9, 0.99)
    for again in (config, config.resolve(3), config.with_values({"model.vocab_size": 300, "data.path": 'a "b" \\c'})):
        path.write_text(again.to_toml())
        assert Config.load(path) == again


def test_overrides_win_and_read_as_toml_or_as_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    words = ["--train.steps", "50", "--layout.recompute=full", "--train.lr", "1e-3", "--data.path", "a=b.h5",
             "--layout.order", '["data", "tensor", "pipeline"]', "--data.mask_documents=true"]
    config = Config.load(path, parse_overrides(words))
    assert (config.train.steps, config.train.lr, config.data.path) == (50, 1e-3, "a=b.h5")
    assert config.layout.recompute == "full" and config.data.mask_documents
    assert config.layout.order == ("data", "tensor", "pipeline")


@pytest.mark.parametrize("words", [["train.steps", "5"], ["--steps", "5"], ["--train.steps"]])
def test_words_that_are_no_override(words):
    with pytest.raises(ConfigError, match=words[0]):
        parse_overrides(words)


def test_configurations_are_frozen():
    with pytest.raises(AttributeError):
        tiny().train.steps = 3


@pytest.mark.parametrize(("overrides", "said"), [
    ({"train.stepz": 5}, ["train.stepz", "unknown key", "did you mean steps"]),
    ({"model.layers": 5}, ["model.layers", "unknown key"]),
    ({"modell.num_layers": 5}, ["modell", "unknown key", "did you mean model"]),
    ({"train.qqqqqq": 5}, ["train.qqqqqq", "known: run_dir"]),
    ({"train.steps": "many"}, ["train.steps", '"many"', "integer"]),
    ({"train.steps": 0}, ["train.steps = 0", "greater than 0"]),
    ({"train.steps": 2.5}, ["train.steps = 2.5"]),
    ({"train.lr": float("nan")}, ["train.lr"]),
    ({"train.lr": -1.0}, ["train.lr = -1.0"]),
    ({"train.optimizer": "lion"}, ["train.optimizer", '"lion"', "adamw"]),
    ({"train.dtype": "float16"}, ["train.dtype", '"float16"', "bfloat16"]),
    ({"train.betas": [0.9, 1.0]}, ["train.betas.1 = 1.0", "less than 1"]),
    ({"train.momentum": 1.0}, ["train.momentum = 1.0", "less than 1"]),
    ({"train.lr": 1e-3, "train.min_lr": 2e-3}, ["min_lr 0.002", "lr 0.001"]),
    ({"train.numerics": "exact", "train.microbatch": None}, ["exact needs microbatch", "for example to 2"]),
    ({"train.exact_blocks": 6}, ["exact_blocks 6", "power of two"]),
    ({"model.num_heads": 3}, ["hidden_size 40", "num_heads 3", "head_dim"]),
    ({"model.head_dim": 7}, ["head_dim 7", "even"]),
    ({"model.num_kv_heads": 2}, ["num_heads 5", "num_kv_heads 2", "multiple"]),
    ({"train.freeze": ["embeding.*"]}, ["train.freeze", "'embeding.*'", "nearest is embedding.weight"]),
    ({"train.freeze": ["layers.7.*"]}, ["train.freeze", "'layers.7.*'"]),
    ({"train.freeze": ["*"]}, ["train.freeze = ['*']", "nothing is left to train"]),
    ({"train.freeze": ["layers.*", "*embedding*", "*norm*", "head.*"]}, ["nothing is left to train"]),
    ({"train.lr_factors": {"heads.*": 2.0}}, ["train.lr_factors", "'heads.*'", "nearest is head.weight"]),
    ({"train.lr_factors": {"layers.*": 2.0, "layers.3.*": 1.0}}, ["'layers.3.*'", "put the narrower one first"]),
    ({"train.lr_factors": {"head.*": 0.0}}, ["train.lr_factors.head.*", "greater than 0"]),
    ({"layout.order": ["data", "data", "tensor"]}, ["order ['data', 'data', 'tensor']", "each"]),
    ({"layout.zero": 3}, ["layout.zero", "3"]),
    ({"layout.recompute": "some"}, ["layout.recompute", '"some"', "selective"]),
    ({"layout.data": 0}, ["layout.data", "0"]),
])
def test_a_wrong_value_is_named_with_its_key(overrides, said):
    message = refusal(overrides)
    assert all(word in message for word in said), message


@pytest.mark.parametrize(("key", "value"), [
    ("train.steps", '"50"'), ("train.steps", 50.0), ("train.steps", True), ("model.vocab_size", '"300"'),
    ("train.lr", '"1e-3"'), ("train.lr", True), ("train.betas", [0.9, "0.95"]), ("train.betas", 0.9),
    ("train.trace", "yes"), ("train.trace", 1), ("data.mask_documents", "on"), ("train.run_dir", 5),
    ("layout.data", 2.0), ("layout.sequence_parallel", 1), ("layout.stage_cuts", [1, 2.0]), ("layout.shares", ["4", 5]),
])
def test_a_value_of_another_type_is_refused(key, value):
    assert key in refusal({key: value})


def test_a_whole_number_is_a_number_too():
    assert tiny({"train.lr": 1, "train.grad_clip": 0, "train.betas": [0, 0]}).train.betas == (0.0, 0.0)


def test_a_missing_section_and_key_are_named():
    with pytest.raises(ConfigError, match=r"model: required"):
        Config.from_dict({})
    with pytest.raises(ConfigError, match=r"model\.ffn_size: required"):
        Config.from_dict({"model": {key: value for key, value in MODEL.items() if key != "ffn_size"}})


def test_files_that_are_missing_or_no_toml(tmp_path):
    with pytest.raises(DataError, match="absent.toml") as caught:
        Config.load(tmp_path / "absent.toml")
    assert caught.value.exit_code == INPUT_OUTPUT
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"bad.toml: not valid TOML"):
        Config.load(tmp_path / "bad.toml")


@pytest.mark.parametrize(("overrides", "ranks", "said"), [
    ({"layout.data": 2, "layout.pipeline": 2, "layout.tensor": 1}, 3, ["needs 4 ranks", "has 3", "mpiexec -n 4"]),
    ({"layout.pipeline": 8}, 8, ["8 stages", "7 layers", "at most 7"]),
    ({"layout.pipeline": 4, "layout.chunks": 2}, 4, ["8 stages", "7 layers", "at most 3"]),
    ({"layout.tensor": 6}, 6, ["layout.tensor=6", "num_heads=5", "tensor <= 5"]),
    ({"layout.data": 6}, 6, ["train.global_batch=9", "layout.data=6"]),
    ({"layout.schedule": "fast"}, 1, ['schedule "fast"', "zb-h1", "file"]),
    ({"layout.pipeline": 2, "layout.chunks": 2, "layout.schedule": "1f1b"}, 2, ['"1f1b"', "chunks = 2", "interleaved"]),
    ({"layout.pipeline": 3, "layout.stage_cuts": [2]}, 3, ["stage_cuts = [2]", "3 stages need 2"]),
    ({"layout.pipeline": 3, "layout.stage_cuts": [4, 2]}, 3, ["stage_cuts = [4, 2]", "growing"]),
    ({"layout.pipeline": 3, "layout.stage_cuts": [4, 7]}, 3, ["stage_cuts = [4, 7]", "between 1 and 6"]),
    ({"layout.bucket_cuts": [3, 2]}, 1, ["bucket_cuts = [3, 2]", "between 0 and 7"]),
    ({"layout.bucket_cuts": [0, 8]}, 1, ["bucket_cuts = [0, 8]", "between 0 and 7"]),
    ({"layout.recompute": ["full", "none"]}, 1, ["2 modes", "7 layers"]),
    ({"layout.data": 2, "layout.shares": [4, 4]}, 2, ["shares = [4, 4]", "global_batch=9"]),
    ({"train.seq_len": 4096}, 1, ["seq_len=4096", "max_seq_len=2048"]),
    ({"train.numerics": "exact", "layout.tensor": 3}, 3, ["exact_blocks=8", "tensor=3", "power of two"]),
    ({"train.numerics": "exact", "layout.data": 3}, 3, ["data=3", "power of two"]),
])
def test_a_layout_that_cannot_run_is_refused_with_the_values_that_can(overrides, ranks, said):
    message = refusal(overrides, ranks)
    assert all(word in message for word in said), message


def test_a_schedule_file_must_fit_every_data_rank_and_run(tmp_path):
    path = tmp_path / "mine.txt"
    layout = {"layout.pipeline": 2, "layout.schedule": str(path)}
    path.write_text(str(make_schedule("gpipe", 2, 5)))
    assert tiny(layout, 2).layout.schedule == str(path)
    assert "5 microbatches" in refusal({**layout, "train.microbatch": 3}, 2)
    assert "needs 2, 2 and" in refusal({**layout, "layout.data": 2}, 4)  # two data ranks, of two and three microbatches
    path.write_text("schedule=mine ranks=2 stages=2 microbatches=1\nrank 0: 0B0 0F0\nrank 1: 1F0 1B0\n")
    with pytest.raises(ScheduleError, match="0B0"):
        tiny({**layout, "train.global_batch": 2}, 2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12, 36])
def test_left_out_degrees_are_filled_to_the_rank_count(ranks):
    config = tiny(ranks=ranks)
    assert math.prod(config.layout.sizes().values()) == ranks
    assert "auto" not in [getattr(config.layout, key) for key in (*AXES, "chunks", "schedule", "zero")]
    assert config.resolve(ranks) == config


def test_given_degrees_are_kept():
    for axis, degree in itertools.product(AXES, (1, 2)):
        assert tiny({f"layout.{axis}": degree}, 4).layout.sizes()[axis] == degree


def test_the_microbatch_is_filled():
    config = Config.from_dict({"model": MODEL, "train": {"global_batch": 9}})
    assert config.resolve(1).train.microbatch == 2 and config.resolve(4).train.microbatch == 1


@pytest.mark.parametrize("batch", [1, 7, 8, 9])
@pytest.mark.parametrize("microbatch", [1, 2, 3])
@pytest.mark.parametrize("data", [1, 2, 3, 4])
def test_microbatches_cover_the_batch_in_order_on_every_layout(batch, microbatch, data):
    overrides = {"train.global_batch": batch, "train.microbatch": microbatch, "layout.data": data}
    if -(-batch // microbatch) < data:
        assert f"layout.data={data}" in refusal(overrides, data)
        return
    own = tiny(overrides, data).microbatch_bounds()
    cuts = [cut for part in own for cut in part]
    assert len(own) == data and all(own)
    assert [sample for low, high in cuts for sample in range(low, high)] == list(range(batch))
    assert cuts == tiny({**overrides, "layout.data": 1}, 1).microbatch_bounds()[0]


def test_shares_are_kept():
    config = tiny({"layout.data": 2, "layout.shares": [6, 3]}, 2)
    assert config.microbatch_bounds() == [[(0, 2), (2, 4), (4, 6)], [(6, 8), (8, 9)]]


def test_seeds_have_63_bits():
    assert tiny({"train.seed": (1 << 63) - 1}).train.seed == (1 << 63) - 1
    with pytest.raises(ConfigError, match="seed"):
        tiny({"train.seed": 1 << 63})


def ways(config, ranks):
    """Every way to fill degrees, chunks and microbatch, a fixed configuration each."""
    layout, divisors = config.layout, [n for n in range(1, ranks + 1) if ranks % n == 0]
    for degrees in itertools.product(divisors, repeat=3):
        if math.prod(degrees) == ranks:
            given = dict(zip(AXES, degrees))
            sizes = [config.train.microbatch] if config.train.microbatch else range(1, config.train.global_batch + 1)
            chunks = [layout.chunks] if layout.chunks != "auto" else range(1, config.model.num_layers + 1)
            if all(layout.sizes()[axis] in ("auto", degree) for axis, degree in given.items()):
                for size, count in itertools.product(sizes, chunks):
                    yield replace(config, layout=replace(layout, **given, chunks=count),
                                  train=replace(config.train, microbatch=size))


def runs(config, ranks):
    try:
        return config.resolve(ranks)
    except (ConfigError, ScheduleError):
        return None


def usual(config, ranks):
    """What is left of the ranks goes to data, then pipeline, then tensor ranks, whether that works or not."""
    sizes, left = config.layout.sizes(), ranks
    for size in sizes.values():
        left //= 1 if size == "auto" else size
    whole = config.train.global_batch // (config.train.microbatch or 1)
    limits = {"data": max(1, whole), "pipeline": config.model.num_layers, "tensor": config.model.num_heads}
    for axis in AXES:
        if sizes[axis] == "auto":
            sizes[axis] = max(d for d in range(1, max(1, left) + 1) if max(1, left) % d == 0 and d <= limits[axis])
            left //= sizes[axis]
    chunks = 2 if config.layout.schedule == "interleaved" and sizes["pipeline"] > 1 else 1
    chunks = chunks if config.layout.chunks == "auto" else config.layout.chunks
    size = config.train.microbatch or max(1, config.train.global_batch // (4 * sizes["data"]))
    return replace(config, layout=replace(config.layout, **sizes, chunks=chunks),
                   train=replace(config.train, microbatch=size))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_auto_is_whatever_works_decided_once(ranks):
    worked = 0
    for seed in range(60):
        config = asked_at_random(seed, ranks)
        resolved = runs(config, ranks)
        if resolved is None:
            assert not any(runs(way, ranks) for way in ways(config, ranks)), config
            continue
        worked += 1
        layout, asked = resolved.layout, config.layout
        assert "auto" not in [getattr(layout, key.name) for key in fields(layout)]
        assert resolved.resolve(ranks) == resolved.resolve(ranks, num_nodes=ranks) == resolved
        assert Config.from_dict(resolved.to_dict()) == resolved
        assert all(getattr(asked, key.name) in ("auto", getattr(layout, key.name)) for key in fields(layout))
        assert config.train.microbatch in (None, resolved.train.microbatch)
        cuts = [cut for own in resolved.microbatch_bounds() for cut in own]
        assert [sample for low, high in cuts for sample in range(low, high)] == list(range(config.train.global_batch))
        assert layout.shares == tuple(own[-1][1] - own[0][0] for own in resolved.microbatch_bounds())
        assert len(layout.stage_cuts) == layout.pipeline * layout.chunks - 1
        step_volume(resolved, False)
        before = runs(usual(config, ranks), ranks)
        assert before in (None, resolved), "another choice than the usual one, which works"
    assert worked > 15


def test_where_no_choice_works_the_error_is_that_of_the_usual_one_and_says_so():
    message = refusal({"train.numerics": "exact", "train.exact_blocks": 1, "model.num_layers": 2}, 6)
    assert "layout.data=" in message or "stages" in message or "exact_blocks" in message
    assert "other choices for what is left open" in message
    assert "other choices" not in refusal({"layout.data": 6}, 6)


@pytest.mark.parametrize(("overrides", "ranks", "sizes", "chunks"), [
    ({"train.numerics": "exact", "train.microbatch": 1}, 6, (2, 3, 1), 1),
    ({"train.numerics": "exact", "train.microbatch": 1, "model.num_layers": 2, "train.global_batch": 3}, 8, (2, 2, 2), 1),
    ({"layout.shares": [5, 4]}, 4, (2, 2, 1), 1),
    ({"layout.stage_cuts": [2, 4]}, 6, (2, 3, 1), 1),
    ({"layout.stage_cuts": [1, 2, 3], "layout.pipeline": 2}, 2, (1, 2, 1), 2),
    ({"layout.chunks": 4, "train.global_batch": 1, "train.microbatch": 1}, 4, (1, 1, 4), 4),
    ({"layout.schedule": str(make_schedule("gpipe", 2, 5))}, 4, (1, 2, 2), 1),
], ids=["exact", "exact on every axis", "shares", "cuts", "cuts of chunks", "chunks", "schedule"])
def test_what_is_fixed_decides_what_is_left_open(overrides, ranks, sizes, chunks):
    layout = tiny(overrides, ranks).layout
    assert (tuple(layout.sizes().values()), layout.chunks) == (sizes, chunks)


def test_the_microbatch_is_what_a_given_schedule_needs():
    config = Config.from_dict({"model": MODEL, "train": {"global_batch": 9}, "layout": {
        "pipeline": 2, "schedule": str(make_schedule("gpipe", 2, 3))}})
    assert config.resolve(2).train.microbatch == 3


def test_buckets_follow_the_layers_where_data_ranks_are_on_nodes_of_their_own():
    layout, every = {"layout.data": 2, "layout.tensor": 2}, tuple(range(8))
    assert tiny(layout).resolve(4).layout.bucket_cuts == ()
    assert tiny(layout).resolve(4, num_nodes=2).layout.bucket_cuts == every
    assert tiny({**layout, "layout.order": ["tensor", "pipeline", "data"]}).resolve(4, num_nodes=2).layout.bucket_cuts == ()
    assert tiny({**layout, "train.numerics": "exact"}).resolve(4, num_nodes=2).layout.bucket_cuts == ()
    assert tiny({"layout.tensor": 4}).resolve(4, num_nodes=4).layout.bucket_cuts == ()


def test_stages_stay_open_until_the_vocabulary_is_known():
    config = Config.from_dict({"model": {key: value for key, value in MODEL.items() if key != "vocab_size"},
                               "layout": {"pipeline": 2}})
    assert config.resolve(2).layout.stage_cuts == "auto" and config.resolve(4).layout.data == 2
    known = config.resolve(2).with_values({"model.vocab_size": 257}).resolve(2)
    assert known == config.with_values({"model.vocab_size": 257}).resolve(2) and len(known.layout.stage_cuts) == 1


@pytest.mark.parametrize(("key", "text"), [
    ("train.run_dir", "20240501"), ("data.path", "1e3"), ("train.run_dir", "true"), ("train.init_from", "[a]"),
    ("data.path", "2024-05-01"), ("layout.schedule", "5"),
])
def test_a_key_that_is_text_takes_text(key, text):
    section, name = key.split(".")
    assert getattr(getattr(tiny(parse_overrides([f"--{key}", text])), section), name) == text
    assert getattr(getattr(tiny(parse_overrides([f"--{key}", f'"{text}"'])), section), name) == text

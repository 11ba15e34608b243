"""What the planner sums from the table of parameters: for any description the same as parameter by parameter and rank by
rank; FLOPs, messages and rows as they follow from who holds and sees what."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from mpillm.config import Config
from mpillm.model.description import Model
from mpillm.model.parameters import held, is_frozen, parameters, trained_from
from mpillm.planner.counts import (
    head_flops,
    held_sizes,
    layer_flops,
    layer_rows,
    step_flops,
    trained_sizes,
)
from mpillm.planner.volume import Volume, step_volume
from mpillm.schedules.blocks import align

CHOICES = {
    "norm": ["rms", "layer"], "norm_placement": ["pre", "post", "output"], "positions": ["rotary", "learned", "none"],
    "qk_norm": ["none", "head", "whole"], "attention_bias": [False, True], "output_bias": [False, True],
    "ffn": ["swiglu", "gelu"], "ffn_bias": [False, True], "embedding_norm": [False, True], "head": ["words", "masked"],
    "head_bias": [False, True], "tie_embeddings": [False, True],
}


def described(seed):
    """A model of odd sizes, every key drawn at random."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3, 5])
    values = {key: rng.choice(options) for key, options in CHOICES.items()}
    return Model(hidden_size=rng.choice([24, 40]), num_layers=rng.randint(1, 5), num_heads=kv_heads * rng.randint(1, 4),
                 num_kv_heads=kv_heads, head_dim=rng.choice([4, 6]), ffn_size=rng.choice([31, 54]), vocab_size=257,
                 max_seq_len=rng.choice([17, 32]), **values)


def stage_of(name, cuts, model):
    """The stages that hold a parameter, of stages that begin at these layers."""
    first, last = name.startswith(("embedding", "positions")), not name.startswith(("embedding", "positions", "layers"))
    if first:
        return {0, len(cuts) - 1} if name == "embedding.weight" and model.tie_embeddings else {0}
    return {len(cuts) - 1} if last else {max(i for i, cut in enumerate(cuts) if cut <= int(name.split(".")[1]))}


def own_size(parameter, own):
    return (own.stop - own.start) * math.prod(parameter.shape[1:])


@pytest.mark.parametrize("seed", range(40))
def test_sizes_are_those_of_the_table_on_the_fullest_rank(seed):
    model = described(seed)
    table = parameters(model)
    whole = held_sizes(model)
    assert whole.first + model.num_layers * whole.layer + whole.last - whole.shared == sum(p.size for p in table.values())
    for tensor in (2, 3, 4, 7):
        for is_exact in (False, True):
            sizes = [sum(own_size(p, held(p, tensor, rank, is_exact, False)) for p in table.values())
                     for rank in range(tensor)]
            found = held_sizes(model, tensor, is_exact)
            assert found.first + model.num_layers * found.layer + found.last - found.shared == max(sizes)


PATTERNS = ["embedding.*", "layers.0.*", "*norm*", "*.bias", "*.ffn.*", "layers.*.attention.[qk]*", "head.*", "layers.*"]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_trained_is_what_no_pattern_names(seed):
    model, rng = described(seed), random.Random(seed)
    freeze = tuple(rng.sample(PATTERNS, rng.randint(0, 3)))
    for tensor in (1, 3):
        sizes = [sum(own_size(p, held(p, tensor, rank, False, False)) for name, p in parameters(model).items()
                     if not is_frozen(name, freeze)) for rank in range(tensor)]
        found = trained_sizes(model, freeze, tensor)
        assert len(found.layers) == model.num_layers
        assert found.first + sum(found.layers) + found.last - found.shared == max(sizes)
    first = next((name for name in parameters(model) if not is_frozen(name, freeze)), None)
    place = int(first.split(".")[1]) if first and first.startswith("layers") else None
    if place is not None:
        assert trained_from(model, freeze) == place
    elif first:
        is_behind = first.startswith(("norm", "head"))
        assert trained_from(model, freeze) == (model.num_layers if is_behind else -1)


def test_frozen_weights_spare_the_flops_of_their_gradients_and_of_what_goes_into_them():
    model = Model(hidden_size=40, num_layers=3, num_heads=5, ffn_size=54, vocab_size=257)
    layer, head, ffn, attention = layer_flops(model, 16), head_flops(model), 2 * 3 * 40 * 54, 2 * 40 * 16 * 1
    products = layer - attention
    assert products == ffn + 2 * 4 * 40 * 40
    for freeze, wanted in (
        ((), 9 * layer + 3 * head), (("embedding.*", "layers.*", "norm.*"), 3 * layer + 2 * head),
        (("layers.*.ffn.*",), 9 * layer - 3 * ffn + 3 * head),
        (("embedding.*", "layers.0.*"), layer + (layer + products) + 3 * layer + 3 * head),
    ):
        assert step_flops(model, 16, 7, freeze) == 7 * wanted, freeze


@pytest.mark.parametrize("seed", range(40))
def test_gradients_travel_once_for_every_parameter_that_a_rank_holds(seed):
    """By sums over the whole table: data ranks get what is held, tensor ranks add up what is partial."""
    model, rng = described(seed), random.Random(seed)
    tensor, is_exact = rng.choice([2, 3, 4]), rng.random() < 0.4
    pipeline = rng.randint(1, min(2, model.num_layers))
    config = Config.from_dict({"model": {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8}}, {
        "train.global_batch": 2, "train.microbatch": 1, "train.seq_len": 16, "layout.data": 2, "layout.tensor": tensor,
        "layout.sequence_parallel": rng.random() < 0.5, "layout.bucket_cuts": []})
    config = replace(config, model=model)
    cuts = [0, rng.randint(1, model.num_layers - 1)] if pipeline == 2 else [0]
    config = replace(config, layout=replace(config.layout, pipeline=pipeline, chunks=1, zero=0, stage_cuts=tuple(cuts[1:])),
                     train=replace(config.train, numerics="exact" if is_exact else "fast"))
    table = parameters(model)
    for stage in range(pipeline):
        for rank in range(tensor):
            sizes, partial = [], 0
            for name, parameter in table.items():
                own = held(parameter, tensor, rank, is_exact, config.layout.sequence_parallel)
                places = [stage] * (stage in stage_of(name, cuts, model))
                if name == "embedding.weight" and model.tie_embeddings:  # in a buffer of its own, and of each end
                    places = [stage] * ((stage == 0) + (stage == pipeline - 1))
                    sizes += [align(own_size(parameter, own), 32)] * len(places)
                else:
                    sizes += [own_size(parameter, own)] * len(places)
                    partial += align(own_size(parameter, own), 16) * own.is_partial_grad * len(places)
            tied = [n for n in sizes if model.tie_embeddings and n == align(own_size(
                table["embedding.weight"], held(table["embedding.weight"], tensor, rank, is_exact, False)), 32)]
            own = align(sum(align(n, 16) for n in sizes) - sum(tied), 32) + sum(tied)
            sent = Volume(config, False, stage, rank).sent([], 0)
            assert sent["data", "reduce_scatter"] == sent["data", "allgather"] == own // 2 * 4
            assert sent["tensor", "allreduce"] == (0 if is_exact else allreduced(partial * 4, tensor))
    rows = sum(p.size // p.row_size for p in table.values()) if is_exact else 1
    assert sent["world", "allreduce"] == allreduced(8 * rows, 2 * pipeline * tensor)


def allreduced(n_bytes, ranks):
    return 2 * (n_bytes - n_bytes // ranks)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tensor", [1, 2, 4, 6])
@pytest.mark.parametrize("is_exact", [False, True])
def test_rows_are_those_of_the_heads_that_a_rank_computes(seed, tensor, is_exact):
    model = described(seed)
    group = model.num_heads // model.num_kv_heads
    fullest = Counter()
    for rank in range(tensor):
        if is_exact or tensor <= model.num_kv_heads:
            own = range(rank * model.num_kv_heads // tensor, (rank + 1) * model.num_kv_heads // tensor)
            heads, keys = len(own) * group, len(own)
        else:
            own = range(rank * model.num_heads // tensor, (rank + 1) * model.num_heads // tensor)
            heads, keys = len(own), len({head // group for head in own})
            keys = model.num_kv_heads if model.qk_norm == "whole" else keys
        fullest |= Counter({"query": heads * model.head_dim, "output": heads * model.head_dim,
                            "key": keys * model.head_dim, "value": keys * model.head_dim})
    ffn = {f"ffn.{part}.weight": math.ceil(model.ffn_size / tensor) for part in ("up", "down")}
    ffn |= {"ffn.gate.weight": ffn["ffn.up.weight"]} if model.ffn == "swiglu" else {}
    assert layer_rows(model, tensor, is_exact) == {f"attention.{part}.weight": n for part, n in fullest.items()} | ffn


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_attention_is_counted_for_the_positions_that_are_seen(window, attention):
    """But for half of a position's own pair, as the field counts."""
    model, seq_len = replace(described(3), window=window, attention=attention, head="masked"), 16
    seen = sum((j <= i or attention == "bidirectional") and abs(i - j) < (window or seq_len)
               for i in range(seq_len) for j in range(seq_len))
    width, products = model.num_heads * model.head_dim, layer_flops(model, 1) - of_one_position(model)
    found = (layer_flops(model, seq_len) - products) * seq_len / (4 * width)
    assert abs(found - seen) <= seq_len


def of_one_position(model):
    return 2 * (1 if model.attention == "causal" else 2) * model.num_heads * model.head_dim


@pytest.mark.parametrize("seed", range(20))
def test_every_matrix_but_a_table_that_is_looked_up_is_a_product(seed):
    model = described(seed)
    matrices = {name: p.size for name, p in parameters(model).items() if len(p.shape) > 1}
    del matrices["positions.weight" if model.positions == "learned" else "embedding.weight"]
    if model.positions == "learned" and not model.tie_embeddings:
        del matrices["embedding.weight"]
    elif model.tie_embeddings:
        matrices["embedding.weight"] = parameters(model)["embedding.weight"].size
    attention = of_one_position(model)
    found = model.num_layers * (layer_flops(model, 1) - attention) + head_flops(model)
    assert found == 2 * sum(matrices.values())


BASE = {"model": {"hidden_size": 40, "num_layers": 3, "num_heads": 4, "ffn_size": 54, "vocab_size": 257, "head_dim": 6,
                  "max_seq_len": 16},
        "train": {"seq_len": 16, "global_batch": 2, "microbatch": 2, "dtype": "float64"},
        "layout": {"data": 1, "pipeline": 1, "sequence_parallel": False}}
TOKENS, WIDE, WIDTH = 32, 8, 40


def tensor_bytes(tensor, changes):
    """Bytes by operation that a step sends between tensor ranks."""
    config = Config.from_dict(BASE, {"layout.tensor": tensor, **changes}).resolve(tensor)
    return Counter({one["operation"]: one["bytes"] for one in step_volume(config, False) if one["axis"] == "tensor"})


@pytest.mark.parametrize("tensor", [2, 3])
@pytest.mark.parametrize(("changes", "sums", "vectors"), [
    # Of a layer's sums of activations; of its sums of a number a token, or two, for queries and keys.
    ({}, 4, []), ({"model.residual": "parallel"}, 3, []),
    ({"model.norm_placement": "output"}, 4, []), ({"model.norm_placement": "post"}, 4, []),
    ({"model.qk_norm": "whole"}, 4, [2, 2]),
    ({"layout.recompute": "full"}, 5, []), ({"layout.recompute": "full", "model.residual": "parallel"}, 3, []),
    ({"layout.recompute": "full", "model.norm_placement": "output"}, 6, []),
    ({"layout.recompute": "full", "model.norm_placement": "post"}, 6, []),
    ({"layout.recompute": "full", "model.qk_norm": "whole"}, 5, [2, 2, 2]),
    ({"model.qk_norm": "whole", "model.num_kv_heads": 1}, 4, [1, 1]),
])
def test_a_layer_sends_what_its_description_says(tensor, changes, sums, vectors):
    wanted = (3 * sums + 2) * allreduced(TOKENS * WIDTH * WIDE, tensor)
    wanted += 3 * sum(allreduced(TOKENS * count * WIDE, tensor) for count in vectors)
    wanted += sum(allreduced(TOKENS * count * WIDE, tensor) for count in (1, 2))  # of the loss
    if model_kv := changes.get("model.num_kv_heads"):  # every rank has them: matrices and norms' weights
        wanted += allreduced(3 * (2 * align(model_kv * 6 * WIDTH, 16) + align(model_kv * 6, 16)) * WIDE, tensor)
    assert tensor_bytes(tensor, changes) == {"allreduce": tensor * wanted}


@pytest.mark.parametrize(("changes", "gathers", "scatters"), [
    ({}, 4, 4), ({"model.residual": "parallel"}, 3, 3), ({"model.norm_placement": "output"}, 4, 4),
    ({"layout.recompute": "full"}, 6, 5), ({"layout.recompute": "full", "model.residual": "parallel"}, 5, 3),
    ({"layout.recompute": "full", "model.norm_placement": "output"}, 6, 6),
])
def test_tokens_that_are_sharded_are_gathered_and_summed_as_often_as_a_layer_says(changes, gathers, scatters):
    found = tensor_bytes(2, {"layout.sequence_parallel": True, **changes})
    assert found["allgather"] == (3 * gathers + 2) * TOKENS * WIDTH * WIDE
    assert found["reduce_scatter"] == (3 * scatters + 2) * TOKENS * WIDTH * WIDE

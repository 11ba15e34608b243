"""The description of a model: what it refuses and fills in; its table of parameters: who holds what, and where it starts; and
how fast rotary positions turn."""

import hashlib
from itertools import product

import numpy as np
import pytest
from tiny import FAMILIES, tiny

from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.model.description import SHAPES, Model
from mpillm.model.parameters import TILE, Parameter, held, initial_values, parameters
from mpillm.model.rotary import rotary_rates

LINEAR = {"kind": "linear", "factor": 2.0}
MODELS = {"llama": {}, **FAMILIES}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    own = {key: value for key, value in request.param.items() if key.startswith("model.")}
    return tiny({"model.num_layers": 2, **own}).model


@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": 41}, "hidden_size 41 is not a multiple of num_heads 5: set model.head_dim"),
    ({"num_kv_heads": 2}, "num_heads 5 is not a multiple of num_kv_heads 2"),
    ({"head_dim": 7}, "head_dim 7 is odd: rotary positions turn pairs, make it even"),
    ({"rope_fraction": 0.2}, "head_dim 8 times rope_fraction 0.2 is 1, no even number above 0: .* or change rope_fraction"),
    ({"rope_fraction": 0.1}, "is 0, no even number above 0"),
    ({"positions": "learned", "rope_fraction": 0.5}, "rope_fraction is given, but positions learned turn nothing"),
    ({"positions": "none", "rope_scaling": LINEAR}, "rope_scaling is given, but positions none turn nothing"),
    ({"residual": "parallel", "norm_placement": "post"}, "residual parallel with norm_placement post: .* to pre"),
    ({"norm": "layer", "norm_offset": True}, "norm_offset is for norm rms"),
    ({"attention": "bidirectional"}, "attention bidirectional with head words: .* set head to masked, or attention to causal"),
    ({"inputs": "patches", "head": "tags", "num_labels": 2}, "inputs patches needs patch_size"),
    ({"inputs": "patches", "patch_size": 3}, "inputs patches with head words: patches are no words"),
    ({"patch_size": 3}, "patch_size is given, but inputs are tokens"),
    ({"class_position": True}, "class_position is given, but inputs are tokens"),
    ({"head": "tags", "tie_embeddings": True}, "tie_embeddings with head tags: it has no matrix of words to share"),
    ({"head": "classes", "pooling": "none"}, "pooling none with head classes: a class is one answer a sequence"),
    ({"head": "tags", "pooling": "mean"}, "pooling mean with head tags: it answers at every position"),
    ({"head": "tags", "pooler": True}, "pooler with head tags and pooling none: it stands before one answer a sequence"),
    ({"norm_placement": "sandwich"}, "norm_placement = \"sandwich\": input should be 'pre', 'post' or 'output'"),
    ({"window": 0}, "window = 0: input should be greater than 0"),
    ({"rope_scaling": {**LINEAR, "kind": "longrope"}}, "rope_scaling.kind = \"longrope\": .* 'linear', 'llama3' or 'yarn'"),
    ({"rope_scaling": {**LINEAR, "factor": 0.5}}, "rope_scaling.factor = 0.5: input should be greater than or equal to 1"),
    ({"rope_scaling": {**LINEAR, "betas": 1.0}}, "rope_scaling.betas: unknown key, did you mean beta_"),
    ({"rope_scaling": {**LINEAR, "xyz": 1.0}}, "rope_scaling.xyz: unknown key; known: kind, factor, original_max_seq_len"),
    ({"rope_theta": 1.0, "rope_scaling": {**LINEAR, "kind": "yarn", "original_max_seq_len": 8}},
     "rope_theta 1 with rope_scaling yarn: .* it must be more than 1"),
    ({"rope_scaling": {**LINEAR, "kind": "yarn"}}, "rope_scaling.kind yarn needs rope_scaling.original_max_seq_len"),
    ({"rope_scaling": {**LINEAR, "kind": "llama3", "original_max_seq_len": 8, "low_freq_factor": 4.0}},
     "low_freq_factor 4.0 must be less than high_freq_factor 4.0"),
    ({"kind": "rwkv"}, "model.kind = rwkv: it stood for llama or gpt"),
    ({"kind": "llama", "norms": "rms"}, "norms: unknown key, did you mean norm"),
])
def test_a_description_that_is_none_is_refused_with_its_reason(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny({f"model.{key}": value for key, value in changes.items()})
    assert "\n" not in str(caught.value)


def test_a_description_is_written_and_read_back(model):
    config = Config.from_dict({"model": {key: value for key, value in vars(model).items() if not key.startswith("_")}})
    assert config.model == model


@pytest.mark.parametrize("kind", SHAPES)
def test_kind_of_version_0_1_is_read_as_the_keys_it_stood_for(kind):
    assert tiny({"model.kind": kind}).model == tiny({f"model.{key}": value for key, value in SHAPES[kind].items()}).model
    assert tiny({"model.kind": kind, "model.ffn": "relu"}).model.ffn == "relu"


def test_what_is_left_out_follows_from_the_rest():
    model = tiny({"model.rope_fraction": 0.5}).model
    assert (model.head_dim, model.num_kv_heads, model.rotary_dim, model.pooling) == (8, 5, 4, "none")
    assert tiny({"model.positions": "none"}).model.rotary_dim == 0
    labels = {"model.head": "classes", "model.num_labels": 3}
    assert tiny(labels).model.pooling == "last" and tiny(labels).model.head_size == 3
    assert tiny({**labels, "model.attention": "bidirectional"}).model.pooling == "first"
    values = tiny({"model.head": "values"}).model
    assert (values.pooling, values.num_labels, values.head_size) == ("none", 1, 1)
    assert tiny(FAMILIES["values"]).model.head_size == 6
    assert [tiny({"model.window": 5}).model.has_band(positions) for positions in (5, 6)] == [False, True]


@pytest.mark.parametrize("is_exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_hold_every_row_once_or_all_of_them(model, ranks, is_exact):
    for name, parameter in parameters(model).items():
        parts = [held(parameter, ranks, rank, is_exact, False) for rank in range(ranks)]
        if parts[0].is_replicated:
            assert set(parts) == {parts[0]} and parts[0][:2] == (0, parameter.shape[0]), name
            continue
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])], name
        assert parts[-1].stop == parameter.shape[0] and not any(part.is_partial_grad for part in parts), name
        assert all(part.start % parameter.unit == part.stop % parameter.unit == 0 for part in parts), name


@pytest.mark.parametrize("ranks, is_exact, by_tokens", [*product((2, 4), (False, True), (False, True))])
def test_gradients_are_partial_where_ranks_share_the_work_on_what_all_hold(ranks, is_exact, by_tokens):
    """By hand: of 3 key/value heads 4 ranks have all, 2 have some, and in exact any number."""
    model = tiny({"model.num_layers": 1, **FAMILIES["qwen3"], "model.attention_bias": True}).model
    partial = {name for name, parameter in parameters(model).items()
               if held(parameter, ranks, 0, is_exact, by_tokens).is_partial_grad}
    wanted = {f"layers.0.attention.{part}_norm.weight" for part in ("query", "key")}
    if ranks == 4 and not is_exact:
        wanted |= {f"layers.0.attention.{part}.{kind}" for part in ("key", "value") for kind in ("weight", "bias")}
    if by_tokens:
        wanted |= {"layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"}
    assert partial == wanted


def test_query_heads_lie_where_the_key_heads_are_that_they_ask(model):
    """In every layout of whole groups."""
    group, table = model.num_heads // model.num_kv_heads, parameters(model)
    for ranks, rank in ((2, 0), (2, 1), (4, 0), (4, 3)):
        queries, keys = (held(table[f"layers.0.attention.{part}.weight"], ranks, rank, True, False)
                         for part in ("query", "key"))
        assert (queries.start, queries.stop) == (group * keys.start, group * keys.stop)


def test_names_are_unique_and_alike_in_every_layer(model):
    table = parameters(model)
    assert all(name == parameter.name for name, parameter in table.items())
    layers = [[name.split(".", 2)[2] for name in table if name.startswith(f"layers.{i}.")] for i in range(2)]
    assert layers[0] == layers[1] and len(set(layers[0])) == len(layers[0]) >= 7


def test_a_row_is_never_divided(model):
    """Nor is the part of a head in a vector: exact adds up the norm of gradients by rows."""
    for name, parameter in parameters(model).items():
        for rank in range(4):
            part = held(parameter, 4, rank, False, False)
            numbers = (part.stop - part.start) * parameter.size // parameter.shape[0]
            assert numbers % parameter.row_size == 0, name


@pytest.mark.parametrize("cut", [1, TILE - 1, TILE, TILE + 1, 2 * TILE + 7])
def test_initial_values_do_not_depend_on_the_cut(cut):
    parameter = Parameter("a", (3 * TILE + 11,), mean=0.5)
    whole = initial_values(parameter, 3, 0, parameter.size)
    parts = [initial_values(parameter, 3, 0, cut), initial_values(parameter, 3, cut, parameter.size)]
    assert np.array_equal(np.concatenate(parts), whole) and len(initial_values(parameter, 3, cut, cut)) == 0
    assert abs(whole.mean() - 0.5) < 0.001 and abs(whole.std() - 0.02) < 0.001
    assert not np.array_equal(whole, initial_values(parameter, 4, 0, parameter.size))
    assert not np.array_equal(whole, initial_values(Parameter("b", parameter.shape, mean=0.5), 3, 0, parameter.size))


def test_norms_begin_as_the_identity_and_biases_as_zero(model):
    for name, parameter in parameters(model).items():
        values = set(initial_values(parameter, 0, 0, min(4, parameter.size)))
        if name.endswith("bias"):
            assert values == {0.0}, name
        elif "norm" in name:
            assert values == {0.0 if model.norm_offset else 1.0}, name
        else:
            assert len(values) == min(4, parameter.size), name


@pytest.mark.parametrize("changes, digest", [
    ({}, "b8d5cc19c282374f212a293a88a2f1e744af1207277c7cb1439ee8b7cfc4c1a0"),
    ({"num_kv_heads": 1, "tie_embeddings": True}, "38f2a690d12698443a8f73ab1945152b274294a393183f95035e913588e679db"),
])
def test_a_llama_begins_with_the_bits_of_version_0_1(changes, digest):
    """Of names, shapes and values of seed 3, in their order."""
    found = hashlib.sha256()
    for name, parameter in parameters(Model(40, 2, 5, 54, vocab_size=257, **changes)).items():
        found.update(f"{name} {parameter.shape} ".encode())
        found.update(initial_values(parameter, 3, 0, parameter.size).tobytes())
    assert found.hexdigest() == digest


def rates(**changes):
    return rotary_rates(tiny({"model.rope_theta": 100.0, **{f"model.{key}": value for key, value in changes.items()}}).model)


def test_rates_of_rotary_positions():
    """By hand, of heads of 8 numbers: 1, 1/3.16, 1/10, 1/31.6 a position; of a half of them 1 and 1/10."""
    plain = 10.0 ** -np.arange(0, 2, 0.5)
    assert rates()[0] == pytest.approx(plain) and rates()[1] == 1
    assert rates(rope_fraction=0.5)[0] == pytest.approx([1, 0.1])
    assert rates(rope_scaling=LINEAR)[0] == pytest.approx(plain / 2)
    length = {"factor": 8.0, "original_max_seq_len": 62}  # in which they make 9.9, 3.1, 0.99 and 0.31 turns
    found, scale = rates(rope_scaling={"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 5.0, **length})
    turns = 62 / (2 * np.pi) * plain[1]
    share = (turns - 1) / 4
    assert found[[0, 3]] == pytest.approx(plain[[0, 3]] / [1, 8]) and scale == 1
    assert found[1] == pytest.approx(plain[1] * (share + (1 - share) / 8))
    found, scale = rates(rope_scaling={"kind": "yarn", "beta_fast": 10.0, "beta_slow": 1.0, **length})
    assert found == pytest.approx(plain / (1, 16 / 9, 8, 8)) and scale == pytest.approx(1 + 0.1 * np.log(8))
    assert rates(rope_scaling={"kind": "yarn", "attention_factor": 1.5, **length})[1] == 1.5

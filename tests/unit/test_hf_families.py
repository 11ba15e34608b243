"""Every family of Hugging Face models beside ``transformers`` itself: the same logits, losses and gradients, and back again."""

import json

import numpy as np
import pytest
import torch
from families import CASES, HEADS, PAD, in_float64, make_folder, make_labels, make_tokens, reference_of, relative

from mpillm import hf
from mpillm.checkpoint.reading import Checkpoint
from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.hf.families import FAMILIES
from mpillm.hf.family import REQUIRED
from mpillm.hf.reading import HFFolder
from mpillm.hf.tensors import tensors_of
from mpillm.model.parameters import parameters

transformers = pytest.importorskip("transformers")

EXACT, ROUNDED = 1e-10, 1e-5  # in float64, and in float32


def targets_of(reference, labels):
    """Return inputs' share, and targets, as mpillm takes them: the next token stands where it is predicted."""
    return (slice(-1), labels[:, 1:]) if reference.model.head == "words" else (slice(None), labels)


@pytest.mark.parametrize("case", {**CASES, **HEADS})
def test_logits_loss_and_gradients(tmp_path, case):
    tokens = make_tokens()
    model = make_folder(tmp_path / "hf", case, torch.float64)
    labels = make_labels(model, tokens)
    with in_float64():
        wanted = model(input_ids=tokens, labels=labels)
        wanted.loss.backward()
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    reference = reference_of(tmp_path / "run", torch.float64)
    assert wanted.logits.abs().max() > 0.1
    assert relative(reference.logits(tokens), wanted.logits) < EXACT
    place, targets = targets_of(reference, labels)
    loss = reference.loss(tokens[:, place], targets)
    assert abs(loss.item() - wanted.loss.item()) < EXACT
    loss.backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    if "embed_out.weight" not in theirs and model.get_output_embeddings() is not None:  # as files name that of GPT-NeoX
        theirs["embed_out.weight"] = model.get_output_embeddings().weight.grad
    family = FAMILIES[model.config.model_type].of_class(model.config.architectures)
    table = parameters(reference.model)
    seen = set()
    for name, tensor in tensors_of(family, reference.model).items():
        for part in tensor.parts:
            grad = tensor.rows(theirs[name], part.name, 0, part.shape[0])
            assert relative(reference.parameters[part.name].grad, grad) < EXACT, part.name
            seen.add(part.name)
    assert seen == table.keys()


@pytest.mark.parametrize("case", HEADS)
def test_sequences_that_end_early(tmp_path, case):
    """What is filled up at the end is not read; answers for whole sequences stand at their ends."""
    tokens = make_tokens()
    lengths = torch.tensor([tokens.shape[1], 9])
    is_there = torch.arange(tokens.shape[1]) < lengths[:, None]
    model = make_folder(tmp_path / "hf", case, torch.float64)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    tokens = tokens.masked_fill(~is_there, PAD)
    with in_float64(), torch.no_grad():
        wanted = model(input_ids=tokens, attention_mask=is_there.long()).logits
    reference = reference_of(tmp_path / "run", torch.float64)
    found = reference.logits(tokens, lengths_B=lengths)
    if reference.model.pooling == "none":
        found, wanted = found[is_there], wanted[is_there]
    assert found.shape == wanted.shape and relative(found, wanted) < EXACT


@pytest.mark.parametrize("case", {**CASES, **HEADS})
def test_float32(tmp_path, case):
    tokens = make_tokens()
    model = make_folder(tmp_path / "hf", case)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    with torch.no_grad():
        assert (reference_of(tmp_path / "run", torch.float32).logits(tokens) - model(tokens).logits).abs().max() < ROUNDED


@pytest.mark.parametrize("case", {**CASES, **HEADS})
def test_out_and_in_again(tmp_path, case):
    """The weights keep their bits through ``transformers``; its class computes the same with what is written."""
    model = make_folder(tmp_path / "hf", case, file_size="20KB")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    hf.to_hf(tmp_path / "run", tmp_path / "out", model.config.model_type, file_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    loaded, report = type(model).from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = loaded(make_tokens()).logits
        assert (logits - model(make_tokens()).logits).abs().max() < (ROUNDED if "bert" in case else 1e-30)
    loaded.save_pretrained(tmp_path / "again")
    hf.from_hf(tmp_path / "last", tmp_path / "again")
    first, last = Checkpoint(tmp_path / "run"), Checkpoint(tmp_path / "last")
    assert first.model() == last.model()
    for name in first.names():
        assert first.read(name).tobytes() == last.read(name).tobytes(), name


@pytest.mark.parametrize("case", {**CASES, **HEADS})
def test_without_a_name_the_first_family_that_computes_the_same(tmp_path, case):
    model = make_folder(tmp_path / "hf", case)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    family = hf.to_hf(tmp_path / "run", tmp_path / "out")
    same_as = {"mistral-no-window": "llama", "phi3": "mistral", "phi3-classes": "llama"}
    assert family.model_type == same_as.get(case, model.config.model_type)
    loaded = getattr(transformers, family.architectures[0]).from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        assert (loaded(make_tokens()).logits - model(make_tokens()).logits).abs().max() < ROUNDED


@pytest.mark.parametrize("case", ["llama-3.2", "phi3", "gpt2", "gpt_neox", "bert"])
def test_any_range_of_any_parameter(tmp_path, case):
    make_folder(tmp_path / "hf", case, file_size="20KB")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    folder, whole, draw = HFFolder(tmp_path / "hf"), Checkpoint(tmp_path / "run"), np.random.default_rng(0)
    for name, parameter in parameters(folder.model).items():
        for start, stop in (0, 1), (parameter.size - 1, parameter.size), sorted(draw.integers(0, parameter.size + 1, 2)):
            assert np.array_equal(folder.read(name, start, stop).numpy(), whole.read(name, start=start, stop=stop)), name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """What a file leaves out is what its class takes for it."""
    theirs = getattr(transformers, family.architectures[0]).config_class()
    for key, meaning in family.keys.items():
        if meaning.default is not REQUIRED and key not in ("head_dim", "num_key_value_heads", "n_inner"):
            assert getattr(theirs, key) == meaning.default, key
    if family.rope:
        assert theirs.rope_parameters["rope_theta"] == 10000.0
        assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == family.rope.default_fraction


def change_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "leave out"}))


REFUSED = [
    ("mistral", "attention_bias", True), ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2-window", "max_window_layers", 1), ("gemma", "use_bidirectional_attention", True),
    ("phi3", "rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "activation_function", "quick_gelu"),
    ("gpt_neox", "rope_theta", 77.0), ("bert", "is_decoder", True), ("bert", "position_embedding_type", "relative_key"),
    ("bert", "tie_word_embeddings", False), ("llama", "sliding_window", 7), ("llama", "new_kind_of_norm", 1),
    ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
    ("llama", "rope_parameters", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}),
    ("llama", "rope_parameters", {"full_attention": {"rope_type": "default"}}), ("llama", "rope_parameters", [1]),
    ("llama", "rope_parameters", {"rope_type": "yarn", "factor": "4"}), ("llama", "partial_rotary_factor", 0.5),
    ("llama", "hidden_act", ["silu"]), ("olmo2", "hidden_act", "relu"),
]


@pytest.mark.parametrize("case,key,value", REFUSED)
def test_what_would_change_numbers_is_refused_by_name(tmp_path, case, key, value):
    make_folder(tmp_path / "hf", case)
    change_config(tmp_path / "hf", **{"layer_types": "leave out", key: value})
    named = "rope" if "rope" in key else key
    with pytest.raises(ConfigError, match=f"config.json: .*{named}"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "run").exists()


def test_keys_that_change_nothing(tmp_path):
    make_folder(tmp_path / "hf", "llama")
    change_config(tmp_path / "hf", unknown_but_unset=None, attention_dropout=0.1, _name_or_path="elsewhere", use_cache=False,
                  **{"transformers.js_config": {}})
    hf.from_hf(tmp_path / "run", tmp_path / "hf")


def test_no_family_computes_it(tmp_path):
    make_folder(tmp_path / "hf", "llama")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    for family, key in (("qwen3", "qk_norm"), ("gpt2", "norm = "), ("bert", "head"), ("nonsense", "--family nonsense")):
        with pytest.raises(ConfigError, match=key):
            hf.to_hf(tmp_path / "run", tmp_path / "out", family)
    assert not (tmp_path / "out").exists()
    assert FAMILIES["llama"].differences(Config.load(tmp_path / "run" / "config.toml").model) == []

"""Folders of Hugging Face weights: types, files and names, tokenizers, what is refused, and the command."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import make_folder, make_model
from safetensors.torch import load_file, save_file

from mpillm import hf
from mpillm.checkpoint import reading, saving
from mpillm.cli.convert import command
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Model
from mpillm.data.settings import Settings
from mpillm.data.tokenizers import END_OF_DOCUMENT, ByteTokenizer, load_tokenizer, train_bpe
from mpillm.errors import CheckpointError, ConfigError, DataError
from mpillm.hf.folder import INDEX
from mpillm.model.parameters import initial_values, parameters

transformers = pytest.importorskip("transformers")


def tiny_model(**changes):
    return Model(**{"vocab_size": 59, "hidden_size": 40, "num_layers": 2, "num_heads": 4, "ffn_size": 56,
                    "max_seq_len": 32, **changes})


def make_run(folder, model, dtype="float32", tokenizer=None):
    """Write a run with its initial weights."""
    config = Config.from_dict({"model": asdict(model), "train": {"run_dir": str(folder), "seq_len": 16}})
    shards = []
    for name, parameter in parameters(model).items():
        flat = initial_values(parameter, 1, 0, parameter.size).astype(dtype)
        shards += [(name, parameter.shape, 0, {"weight": flat[:7]}), (name, parameter.shape, 7, {"weight": flat[7:]})]
    saving.save(folder / "checkpoints", 3, shards, {"model": asdict(model)}, SingleComm())
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return folder


def weights(path):
    source = reading.Checkpoint(path)
    return {name: (source.shape(name), source.read(name)) for name in source.names()}


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert list(a) == list(b)
    for name, (shape, values) in a.items():
        assert shape == b[name][0]
        assert values.dtype == b[name][1].dtype
        assert values.tobytes() == b[name][1].tobytes(), name


def change_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "leave out"}))


def change_tensors(folder, change):
    """Write what ``change`` makes of all tensors."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("save_as,kept,computed", [
    (torch.float64, "float64", "float64"), (torch.float32, "float32", "float32"),
    (torch.bfloat16, "float32", "bfloat16"), (torch.float16, "float32", "float32"),
], ids=str)
@pytest.mark.parametrize("case", ["llama", "gpt_neox", "bert"])
def test_types(tmp_path, case, save_as, kept, computed):
    model = make_folder(tmp_path / "hf", case, save_as)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    found = weights(tmp_path / "run")
    assert all(values.dtype == kept for _, values in found.values())
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h",
            "bert": "bert.encoder.layer.1.output.dense"}[case]
    want = model.get_parameter(f"{name}.weight").detach().T.to(torch.float64).numpy().reshape(-1)
    assert np.array_equal(found["layers.1.ffn.down.weight"][1].astype(np.float64), want)
    assert Config.load(tmp_path / "run" / "config.toml").train.dtype == computed


def test_files_are_open_to_those_who_may_enter_the_folder(tmp_path):
    run, target = make_run(tmp_path / "run", tiny_model()), tmp_path / "hf"
    target.mkdir(mode=0o750)
    hf.to_hf(run, target)
    assert (target / "model.safetensors").stat().st_mode == (target / "config.json").stat().st_mode


def test_float64_keeps_its_bits(tmp_path):
    run = make_run(tmp_path / "run", tiny_model(), "float64")
    hf.to_hf(run, tmp_path / "hf")
    hf.from_hf(tmp_path / "again", tmp_path / "hf")
    assert_same_bits(run, tmp_path / "again")
    assert Config.load(tmp_path / "again" / "config.toml").train.dtype == "float64"


def test_tokenizer_travels(tmp_path):
    text = "what one document says, another may say as well\n"
    tokenizer = train_bpe([text * 20], 300)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    run = make_run(tmp_path / "run", model, tokenizer=tokenizer)
    hf.to_hf(run, tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert loaded.decode(loaded(text)["input_ids"]) == text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.bos_token_id == config.eos_token_id == tokenizer.end == loaded.convert_tokens_to_ids(END_OF_DOCUMENT)
    hf.from_hf(tmp_path / "again", tmp_path / "hf")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_tokens_that_are_bytes_stay_at_home(tmp_path):
    run = make_run(tmp_path / "run", tiny_model(vocab_size=257), tokenizer=ByteTokenizer())
    hf.to_hf(run, tmp_path / "hf")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256


@pytest.mark.parametrize("case,changes,theta,fraction", [
    ("llama", {"rope_scaling": None, "rope_theta": 123.0}, 123.0, 1.0), ("llama", {}, 10000.0, 1.0),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 123.0}, 123.0, 1.0),
    ("phi3-partial", {"partial_rotary_factor": 0.75}, 10000.0, 0.75),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 77}, 77, 0.5), ("gpt_neox", {}, 10000.0, 0.25),
    ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rope_theta": 10000}, 10000.0, 0.5),
])
def test_rotary_keys_of_older_releases(tmp_path, case, changes, theta, fraction):
    make_folder(tmp_path / "hf", case)
    change_config(tmp_path / "hf", **{"rope_parameters": "leave out", **changes})
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    model = Config.load(tmp_path / "run" / "config.toml").model
    assert (model.rope_theta, model.rope_fraction) == (theta, fraction)
    assert (model.rope_scaling is not None) == bool(changes.get("rope_scaling"))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters
    assert (theirs["rope_theta"], theirs.get("partial_rotary_factor", 1.0)) == (theta, fraction)


def test_a_folder_of_the_class_without_a_head(tmp_path):
    """Its names have no beginning, and the one head is the embedding's matrix, as in the files of GPT-2 of 2019."""
    make_model("gpt2").transformer.save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", architectures=["GPT2LMHeadModel"], n_ctx=32)
    mask = torch.ones(32, 32).tril()[None, None]
    change_tensors(tmp_path / "hf", lambda tensors: {**tensors, "h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.ones(1)})
    assert "wte.weight" in load_file(tmp_path / "hf" / "model.safetensors")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    make_folder(tmp_path / "whole", "gpt2")
    hf.from_hf(tmp_path / "again", tmp_path / "whole")
    assert_same_bits(tmp_path / "run", tmp_path / "again")


def test_names_of_norms_in_older_files_and_of_other_heads(tmp_path):
    """The files of BERT of 2018 hold its other objective, too."""
    make_folder(tmp_path / "hf", "bert")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")

    def age(tensors):
        older = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
                 for name, tensor in tensors.items()}
        return {**older, "bert.pooler.dense.weight": torch.ones(36, 36), "cls.seq_relationship.bias": torch.ones(2),
                "cls.predictions.decoder.weight": older["bert.embeddings.word_embeddings.weight"].clone()}

    change_tensors(tmp_path / "hf", age)
    change_config(tmp_path / "hf", architectures=["BertForPreTraining"], gradient_checkpointing=False)
    hf.from_hf(tmp_path / "again", tmp_path / "hf")
    assert_same_bits(tmp_path / "run", tmp_path / "again")


def test_the_first_token_type_goes_into_the_positions(tmp_path):
    model = make_folder(tmp_path / "hf", "bert")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    found = weights(tmp_path / "run")["positions.weight"][1].reshape(32, 36)
    table = model.bert.embeddings
    want = table.position_embeddings.weight + table.token_type_embeddings.weight[0]
    assert np.array_equal(found, want.detach().numpy()) and table.token_type_embeddings.weight[0].abs().min() > 0
    hf.to_hf(tmp_path / "run", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(written["bert.embeddings.position_embeddings.weight"], found)
    assert not written["bert.embeddings.token_type_embeddings.weight"].any()


def test_tied_ends(tmp_path):
    """Either end may be the one in the file; two that differ are not tied."""
    make_folder(tmp_path / "hf", "llama-3.2")
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    embedding = "model.embed_tokens.weight"
    change_tensors(tmp_path / "hf", lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()})
    hf.from_hf(tmp_path / "both", tmp_path / "hf")
    change_tensors(tmp_path / "hf", lambda tensors: {**tensors, "lm_head.weight": 2 * tensors[embedding]})
    with pytest.raises(DataError, match="lm_head.weight and model.embed_tokens.weight differ.*tie_word_embeddings"):
        hf.from_hf(tmp_path / "differ", tmp_path / "hf")
    change_tensors(tmp_path / "hf", lambda tensors: {"lm_head.weight": tensors.pop(embedding),
                                                     **{name: t for name, t in tensors.items() if name != "lm_head.weight"}})
    hf.from_hf(tmp_path / "other", tmp_path / "hf")
    for run in ("both", "other"):
        assert_same_bits(tmp_path / "run", tmp_path / run)


def test_several_end_tokens_and_the_names_of_special_ones(tmp_path):
    """They come along in both directions, with a text that ends in any of them."""
    tokenizer = train_bpe(["what one document says, another may say as well\n" * 20], 300)
    ends, size = [tokenizer.end, 4, 7], tokenizer.vocab_size
    make_folder(tmp_path / "hf", "llama", vocab_size=size, eos_token_id=ends)
    hf.to_hf(make_run(tmp_path / "source", tiny_model(vocab_size=size), tokenizer=tokenizer), tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / file).rename(tmp_path / "hf" / file)
    said = {"bos_token_id": 1, "eos_token_id": ends, "temperature": 0.6}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(said))
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    assert set(load_tokenizer(tmp_path / "run", size).ends) == set(ends)
    hf.to_hf(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said
    assert Settings.of_folder(tmp_path / "out").files == Settings.of_folder(tmp_path / "hf").files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == ends


@pytest.mark.parametrize("changes,message", [
    ({"vocab_size": 60}, r"embed_tokens.weight is F32 \[61, 36\].*\[60, 36\]"),
    ({"num_hidden_layers": 3}, "missing .*layers.2.input_layernorm"),
    ({"num_hidden_layers": 1}, "unknown .*layers.1.input_layernorm"),
    ({"intermediate_size": 57}, "mlp.gate_proj.weight"),
])
def test_tensors_of_another_model(tmp_path, changes, message):
    make_folder(tmp_path / "hf", "llama")
    change_config(tmp_path / "hf", **changes)
    with pytest.raises(DataError, match=message):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")


def test_damaged_folders(tmp_path):
    with pytest.raises(DataError, match="config.json"):
        hf.from_hf(tmp_path / "run", tmp_path / "nowhere")
    make_folder(tmp_path / "hf", "llama")
    weights_path = tmp_path / "hf" / "model.safetensors"
    weights_path.write_bytes(weights_path.read_bytes()[:5000])
    with pytest.raises(DataError, match="hf"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")
    weights_path.unlink()
    with pytest.raises(DataError, match="no model.safetensors.*safetensors files only"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text('{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}')
    with pytest.raises(DataError, match=r"hf: has no elsewhere\.safetensors"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")


def test_used_targets_and_missing_runs(tmp_path):
    run = make_run(tmp_path / "run", tiny_model())
    make_folder(tmp_path / "hf", "llama")
    with pytest.raises(ConfigError, match="in use"):
        hf.to_hf(run, tmp_path / "hf")
    with pytest.raises(ConfigError, match="in use"):
        hf.from_hf(run, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="nowhere"):
        hf.to_hf(tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="hf.config.json"):
        hf.to_hf(run, tmp_path / "hf" / "config.json" / "below")


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for convert in (hf.to_hf, hf.from_hf):
        with pytest.raises(ConfigError, match=r"mpillm\[hf\]"):
            convert(tmp_path / "run", tmp_path / "hf")


def test_command(tmp_path):
    run, target, again = make_run(tmp_path / "run", tiny_model()), tmp_path / "hf", tmp_path / "again"
    for words in ([run, "--to-hf", target], [again, "--from-hf", target]):
        result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0
        assert str(words[0]) in result.output and str(words[2]) in result.output
    assert_same_bits(run, again)
    assert {path.name for path in again.iterdir()} == {"checkpoints", "config.toml"}
    assert [path.name for path in reading.complete_checkpoints(again / "checkpoints")] == ["step-00000000"]


@pytest.mark.parametrize("words", [["run"], ["run", "--to-hf", "a", "--from-hf", "b"]], ids=["neither", "both"])
def test_command_wants_one_direction(words):
    with pytest.raises(ConfigError, match="either"):
        command.main(words, standalone_mode=False)

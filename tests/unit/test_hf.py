"""Weights to Hugging Face's Llama and back, with Hugging Face's own model and the serial reference as oracles."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mpillm import hf
from mpillm.checkpoint import reading, saving
from mpillm.cli.convert import command
from mpillm.comm.group import Group
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Model
from mpillm.data.tokenizers import END_OF_DOCUMENT, ByteTokenizer, train_bpe
from mpillm.errors import CheckpointError, ConfigError, DataError
from mpillm.hf.folder import INDEX
from mpillm.hf.writing import FILE_ELEMENTS
from mpillm.inference.generator import load_weights
from mpillm.nn.attention import Batch, rotary_tables
from mpillm.nn.init import initial_values, parameter_table
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import TransformerStage
from mpillm.verify.reference import Reference

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
MODELS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one-kv-head": {"num_kv_heads": 1, "head_dim": 6},
    "tied": {"tie_embeddings": True, "num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-3},
}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 59, (2, 19)))


def make_model(**changes):
    return Model(**{"vocab_size": 59, "hidden_size": 40, "num_layers": 2, "num_heads": 4, "ffn_size": 56,
                    "max_seq_len": 32, **changes})


def make_run(folder, model, dtype="float32", tokenizer=None):
    """Write a run whose weights are large enough for logits of order one."""
    config = Config.from_dict({"model": asdict(model), "train": {"run_dir": str(folder), "seq_len": 16}})
    shards = []
    for name, (shape, std) in parameter_table(model).items():
        flat = initial_values(name, 1, 0, int(np.prod(shape)), std and 8 * std).astype(dtype)
        shards += [(name, shape, 0, {"weight": flat[:7]}), (name, shape, 7, {"weight": flat[7:]})]
    saving.save(folder / "checkpoints", 3, shards, {"model": asdict(model)}, SingleComm())
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return folder


def make_hf(folder, **changes):
    """Save a random model of Hugging Face's."""
    torch.manual_seed(0)
    values = {"vocab_size": 59, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 32,
              "initializer_range": 0.16, "bos_token_id": 0, "eos_token_id": 0, **changes}
    dtype = values.pop("save_as", torch.float32)
    size = values.pop("file_size", "5GB")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype)
    model.save_pretrained(folder, max_shard_size=size)
    return model


def hf_logits(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def stage_logits(run):
    """Return the logits of mpillm's own layers."""
    source = reading.Checkpoint(run)
    model = Model(**source.manifest["model"])
    stage = TransformerStage(model, TensorSplit(Group(SingleComm())), 0, model.num_layers)
    load_weights(stage, source)
    tables = rotary_tables(model.head_dim, range(TOKENS.shape[1]), model.rope_theta, torch.float32)
    batch = Batch(*TOKENS.shape, *tables)
    with torch.no_grad():
        return stage.logits(stage(TOKENS.reshape(-1), batch), batch).view(*TOKENS.shape, -1)


def reference_logits(run):
    """Return the logits of the serial reference."""
    source = reading.Checkpoint(run)
    reference = Reference(Model(**source.manifest["model"]), 0, torch.float32)
    with torch.no_grad():
        for name, weight in reference.parameters.items():
            weight.copy_(torch.from_numpy(source.read(name)).view(weight.shape))
        return reference.logits(TOKENS)


def assert_same_logits(folder, run):
    wanted = hf_logits(folder)
    assert wanted.abs().max() > 1
    for logits in (stage_logits(run), reference_logits(run)):
        assert (logits - wanted).abs().max() < TOLERANCE


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


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("file_elements", [FILE_ELEMENTS, 5000], ids=["one-file", "many-files"])
def test_to_hf_and_back(tmp_path, changes, file_elements):
    run = make_run(tmp_path / "run", make_model(**changes))
    hf.to_hf(run, tmp_path / "hf", file_elements)
    num_files = len(list((tmp_path / "hf").glob("*.safetensors")))
    assert num_files > 3 if file_elements == 5000 else num_files == 1
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == make_model(**changes).rope_theta
    assert_same_logits(tmp_path / "hf", run)
    hf.from_hf(tmp_path / "again", tmp_path / "hf")
    assert_same_bits(run, tmp_path / "again")
    assert Config.load(tmp_path / "again" / "config.toml").model == make_model(**changes)


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}, {"head_dim": 6}, {"file_size": "20KB"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rms_norm_eps": 1e-2},
], ids=["grouped", "plain", "tied", "head-dim", "many-files", "rotary-and-norm"])
def test_from_hf_and_back(tmp_path, changes):
    model = make_hf(tmp_path / "hf", **changes)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    assert_same_logits(tmp_path / "hf", tmp_path / "run")
    hf.to_hf(tmp_path / "run", tmp_path / "again")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("save_as,kept,computed", [
    (torch.float64, "float64", "float64"), (torch.float32, "float32", "float32"),
    (torch.bfloat16, "float32", "bfloat16"), (torch.float16, "float32", "float32"),
], ids=str)
def test_types(tmp_path, save_as, kept, computed):
    model = make_hf(tmp_path / "hf", save_as=save_as)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    values = weights(tmp_path / "run")["layers.1.ffn.down.weight"][1]
    assert values.dtype == kept
    want = model.model.layers[1].mlp.down_proj.weight.detach().T.to(torch.float64).numpy().reshape(-1)
    assert np.array_equal(values.astype(np.float64), want)
    assert Config.load(tmp_path / "run" / "config.toml").train.dtype == computed


def test_files_are_open_to_those_who_may_enter_the_folder(tmp_path):
    run, target = make_run(tmp_path / "run", make_model()), tmp_path / "hf"
    target.mkdir(mode=0o750)
    hf.to_hf(run, target)
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_float64_keeps_its_bits(tmp_path):
    run = make_run(tmp_path / "run", make_model(), "float64")
    hf.to_hf(run, tmp_path / "hf")
    hf.from_hf(tmp_path / "again", tmp_path / "hf")
    assert_same_bits(run, tmp_path / "again")
    assert Config.load(tmp_path / "again" / "config.toml").train.dtype == "float64"


def test_tokenizer_travels(tmp_path):
    text = "what one document says, another may say as well\n"
    tokenizer = train_bpe([text * 20], 300)
    model = make_model(vocab_size=tokenizer.vocab_size)
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
    run = make_run(tmp_path / "run", make_model(vocab_size=257), tokenizer=ByteTokenizer())
    hf.to_hf(run, tmp_path / "hf")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256


def change_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "leave out"}))


@pytest.mark.parametrize("key,value", [
    ("model_type", "mistral"), ("architectures", ["LlamaForSequenceClassification"]), ("hidden_act", "gelu"),
    ("attention_bias", True), ("mlp_bias", True), ("quantization_config", {"quant_method": "gptq"}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}), ("partial_rotary_factor", 0.5),
    ("hidden_size", "leave out"), ("num_attention_heads", 3), ("head_dim", 7),
])
def test_models_that_mpillm_has_not(tmp_path, key, value):
    make_hf(tmp_path / "hf")
    change_config(tmp_path / "hf", **{key: value})
    named = {"num_attention_heads": "num_heads"}.get(key, key)
    with pytest.raises(ConfigError, match=f"config.json.*{named}"):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "run").exists()


def test_rotary_keys_of_older_releases(tmp_path):
    make_hf(tmp_path / "hf")
    change_config(tmp_path / "hf", rope_parameters="leave out", rope_scaling=None, rope_theta=123.0)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    assert Config.load(tmp_path / "run" / "config.toml").model.rope_theta == 123.0
    assert_same_logits(tmp_path / "hf", tmp_path / "run")


@pytest.mark.parametrize("changes,message", [
    ({"vocab_size": 60}, r"embed_tokens.weight is F32 \[59, 40\].*\[60, 40\]"),
    ({"num_hidden_layers": 3}, "missing .*layers.2.input_layernorm"),
    ({"num_hidden_layers": 1}, "unknown .*layers.1.input_layernorm"),
    ({"intermediate_size": 57}, "mlp.gate_proj.weight"),
])
def test_tensors_of_another_model(tmp_path, changes, message):
    make_hf(tmp_path / "hf")
    change_config(tmp_path / "hf", **changes)
    with pytest.raises(DataError, match=message):
        hf.from_hf(tmp_path / "run", tmp_path / "hf")


def test_damaged_folders(tmp_path):
    with pytest.raises(DataError, match="config.json"):
        hf.from_hf(tmp_path / "run", tmp_path / "nowhere")
    make_hf(tmp_path / "hf")
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
    run = make_run(tmp_path / "run", make_model())
    make_hf(tmp_path / "hf")
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
    run, target, again = make_run(tmp_path / "run", make_model()), tmp_path / "hf", tmp_path / "again"
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

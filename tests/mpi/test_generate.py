"""Sampled tokens on every layout, held against the serial reference that computes the whole row each time."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import assert_all
from mpi4py import MPI

from mpillm.checkpoint import reading, saving
from mpillm.cli import generate as cli
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Model
from mpillm.data.tokenizers import ByteTokenizer
from mpillm.errors import CheckpointError, ConfigError, DataError
from mpillm.inference.generator import Generator, choose
from mpillm.model.parameters import initial_values, parameters
from mpillm.nn.attention import KeyValueCache
from mpillm.verify.reference import Reference

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

MODELS = {
    "grouped": {"num_kv_heads": 2},
    "uneven-tied": {"num_heads": 5, "num_kv_heads": 1, "head_dim": 6, "ffn_size": 31, "tie_embeddings": True},
    "turned-in-a-window": {
        "window": 5, "num_kv_heads": 2, "qk_norm": "whole", "norm_placement": "output", "attention_bias": True,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 8}},
    "learned-beside-each-other": {
        "positions": "learned", "norm": "layer", "residual": "parallel", "ffn": "gelu", "ffn_bias": True, "output_bias": True,
        "head_bias": True, "logit_softcap": 5.0},
}
PROMPT, COUNT = list(b"def f(x"), 14
END = ByteTokenizer.end


def make_model(**changes):
    return Model(**{"vocab_size": 257, "hidden_size": 24, "num_layers": 4, "num_heads": 4, "ffn_size": 40,
                    "max_seq_len": 32, **changes})


def make_run(path, model, **train):
    """Write a run whose weights are large enough for choices that differ, of norms and biases too."""
    shards = [(name, parameter.shape, 0,
               {"weight": initial_values(replace(parameter, std=20 * parameter.std or 0.3), 3, 0, parameter.size)})
              for name, parameter in parameters(model).items()]
    saving.save(path / "checkpoints", 1, shards, {"model": asdict(model)}, SingleComm())
    config = {"model": asdict(model), "train": {"run_dir": str(path), "seq_len": 16, "dtype": "float64", **train}}
    (path / "config.toml").write_text(Config.from_dict(config).to_toml(), encoding="utf-8")
    (path / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return make_model(**request.param)


@pytest.fixture
def run(comm, comm_path, model):
    """Return the path of a float64 run that all ranks of ``comm`` see."""
    return shared_run(comm, comm_path, model)


@pytest.fixture
def plain_run(comm, comm_path):
    """Return the path of a run of the first model."""
    return shared_run(comm, comm_path, make_model(num_kv_heads=2))


def shared_run(comm, path, model):
    if comm.rank == 0:
        make_run(path, model)
    comm.Barrier()
    return path


def oracle(run, model, prompt, count, temperature, seed):
    """Return the tokens that the serial reference gives, without a cache, in float64."""
    source, reference, row = reading.Checkpoint(run), Reference(model, 0), list(prompt)
    with torch.no_grad():
        for name, weight in reference.parameters.items():
            weight.copy_(torch.from_numpy(source.read(name)).view(weight.shape))
        while len(row) < len(prompt) + count:
            logits = reference.logits(torch.tensor([row]))[0, -1].numpy()
            if temperature == 0:
                token = int(np.argmax(logits))
            else:
                odds = np.exp(logits / temperature)
                number = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, len(row)])).random()
                token = next(i for i in range(len(odds)) if odds[:i + 1].sum() > number * odds.sum())
            if token == END:
                break
            row.append(token)
    return row[len(prompt):]


def layouts(ranks, model):
    """Return every split of the ranks over pipeline and tensor that the model can take."""
    return [{"layout.pipeline": p, "layout.tensor": ranks // p} for p in range(1, ranks + 1)
            if ranks % p == 0 and p <= model.num_layers and ranks // p <= model.num_heads]


@pytest.mark.parametrize("temperature,seed", [(0, 0), (0.7, 11)], ids=["greedy", "sampled"])
def test_same_tokens_on_every_layout(comm, run, model, temperature, seed):
    wanted = oracle(run, model, PROMPT, COUNT, temperature, seed)
    assert len(wanted) == COUNT and len(set(wanted)) > 5
    for overrides in [{}, *layouts(comm.size, model)]:
        generator = Generator(run, comm, overrides)
        found = list(generator.tokens(PROMPT, COUNT, temperature, seed))
        generator.free()
        assert_all(found == wanted, f"{overrides}: {found}, not {wanted}", comm)


def test_the_communicator_of_the_caller_carries_nothing(comm, plain_run):
    used = []

    class Watched(MPI.Intracomm):
        def allgather(self, value):
            used.append(self == comm)
            return super().allgather(value)

    generator = Generator(plain_run, Watched(comm))
    list(generator.tokens(PROMPT, 2))
    generator.free()
    assert_all((used or comm.size == 1) and not any(used), used, comm)


def test_seeds_and_temperatures_matter(comm, plain_run):
    generator = Generator(plain_run, comm)
    choices = [(0.7, 1), (0.7, 2), (5.0, 1), (0.7, 1), (1e-6, 1), (0,)]
    rows = [list(generator.tokens(PROMPT, 8, *choice)) for choice in choices]
    generator.free()
    assert_all(rows[0] == rows[3] and rows[4] == rows[5] and len({*map(tuple, rows)}) == 4, rows, comm)


def test_cache_equals_the_whole_row(comm, run, model):
    """Feed a row in parts of 5, 1, 1 and 3 tokens and as a whole."""
    row = list(np.random.default_rng(0).integers(0, 257, 10))
    for overrides in layouts(comm.size, model):
        generator, cache = Generator(run, comm, overrides), KeyValueCache()
        whole = [generator.next_logits(row[:stop], 0, KeyValueCache()) for stop in (5, 6, 7, 10)]
        parts = [generator.next_logits(row[start:stop], start, cache)
                 for start, stop in ((0, 5), (5, 6), (6, 7), (7, 10))]
        assert_all(all((a is None) == (not generator.stage.is_last) for a in whole), "who has logits", comm)
        differences = [np.abs(a - b).max() / np.abs(a).max() for a, b in zip(whole, parts) if a is not None]
        assert_all(max(differences, default=0) < 1e-12, f"{overrides}: {differences}", comm)
        generator.free()


def test_exact_has_the_same_bits_on_every_layout(comm, run, model):
    exact = {"train.numerics": "exact", "train.dtype": "float32", "train.exact_blocks": 8}
    parts = ((0, PROMPT), (len(PROMPT), [3]), (len(PROMPT) + 1, [200]))

    def logits_and_tokens(generator):
        cache = KeyValueCache()
        logits = [generator.next_logits(part, start, cache) for start, part in parts]
        return logits, list(generator.tokens(PROMPT, COUNT, 1.0, 5))

    wanted, wanted_tokens = logits_and_tokens(Generator(run, SingleComm(), exact))
    for overrides in layouts(comm.size, model):
        if 8 % overrides["layout.tensor"]:
            continue
        generator = Generator(run, comm, exact | overrides)
        logits, tokens = logits_and_tokens(generator)
        generator.free()
        differing = [i for i, (a, b) in enumerate(zip(logits, wanted)) if a is not None and a.tobytes() != b.tobytes()]
        assert_all(not differing, f"{overrides}: logits of {differing}", comm)
        assert_all(tokens == wanted_tokens, f"{overrides}: {tokens}, not {wanted_tokens}", comm)


def test_no_rank_holds_a_whole_sharded_weight(comm, run, model):
    generator = Generator(run, comm, {"layout.tensor": comm.size, "layout.pipeline": 1})
    held = {p.shard.name: p.numel() for p in generator.stage.parameters()}
    generator.free()
    for name, parameter in parameters(model).items():
        part = name.split(".")[-2]
        is_shared = part in ("key", "value", "key_norm") and model.num_kv_heads < comm.size
        is_whole = part in ("attention_norm", "ffn_norm", "norm") or name.endswith(("output.bias", "down.bias"))
        copies = comm.size if is_shared or is_whole else 1
        assert_all(sum(comm.allgather(held[name])) == copies * parameter.size, name, comm)


def test_stops(comm, plain_run):
    generator = Generator(plain_run, comm)
    greedy = list(generator.tokens(PROMPT, COUNT, 0))
    full = list(generator.tokens(PROMPT, 1000, 0))
    nothing = [list(generator.tokens(prompt, count)) for prompt, count in ((PROMPT, 0), ([65] * 32, 5))]
    new_document = [list(generator.tokens(prompt, 5, 0)) for prompt in ([], [END])]
    generator.tokenizer.end = greedy[4]
    ended = list(generator.tokens(PROMPT, COUNT, 0))
    generator.free()
    assert_all(len(full) == 32 - len(PROMPT) and full[:COUNT] == greedy, full, comm)
    assert_all(not any(nothing), nothing, comm)
    assert_all(new_document[0] == new_document[1] and len(new_document[0]) == 5, new_document, comm)
    assert_all(ended == greedy[:greedy.index(greedy[4])], ended, comm)


def test_rows_that_pad_the_vocabulary_are_no_tokens(comm, comm_path):
    shared_run(comm, comm_path, make_model(vocab_size=300))
    generator = Generator(comm_path, comm)
    sampled = [token for seed in range(8) for token in generator.tokens(PROMPT, 1000, 100.0, seed)]  # nearly all alike
    generator.free()
    assert_all(len(sampled) > 20 and max(sampled) < ByteTokenizer.vocab_size, sampled, comm)


def test_what_cannot_be_continued(comm, plain_run):
    generator = Generator(plain_run, comm)
    for prompt, temperature, message in [
        ([65] * 33, 1.0, "prompt has 33 tokens.*max_seq_len = 32"), ([5, 257], 1.0, "5 to 257.*0 to 256"),
        ([-1], 1.0, "tokens from -1"), ([5], -0.5, "temperature -0.5"), ([5], float("nan"), "temperature nan"),
        ([5], float("inf"), "temperature inf"),
    ]:
        with pytest.raises(ConfigError, match=message):
            list(generator.tokens(prompt, 3, temperature))
    generator.free()


def test_overrides_that_cannot_be(comm, plain_run):
    for overrides, message in [
        ({"layout.data": 2}, "data = 2.*cannot share"), ({"layout.zero": 1}, "--layout.zero: generation takes only"),
        ({"model.num_heads": 2}, "--model.num_heads"), ({"layout.tensor": 7}, "needs 7 ranks"),
        ({"layout.pipeline": 9}, "needs 9 ranks"), ({"train.dtype": "int8"}, "train.dtype"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Generator(plain_run, comm, overrides)


def test_default_layout(comm, comm_path):
    """Tensor ranks as far as there are heads, and in exact numerics blocks; pipeline ranks for what is left."""
    shared_run(comm, comm_path, make_model(num_heads=3))
    for overrides, wanted in [
        ({}, {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}),
        ({"train.numerics": "exact"}, {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}),
        ({"layout.pipeline": comm.size}, {size: (size, 1) for size in range(1, 5)}),
    ]:
        generator = Generator(comm_path, comm, overrides)
        layout = generator.config.layout
        generator.free()
        assert (layout.pipeline, layout.tensor) == wanted[comm.size]


def test_missing_files(comm, comm_path):
    with pytest.raises(CheckpointError, match="complete"):
        Generator(comm_path, comm)
    shared_run(comm, comm_path, make_model())
    for name in ("tokenizer.json", "config.toml"):
        if comm.rank == 0:
            (comm_path / name).unlink()
        comm.Barrier()
        with pytest.raises(DataError, match=name):
            Generator(comm_path, comm)


def test_weights_that_are_not_finite(comm, plain_run):
    generator = Generator(plain_run, comm)
    next(generator.stage.parameters()).data.fill_(float("nan"))
    for temperature in (0, 1.0):
        with pytest.raises(CheckpointError, match="not finite"):
            list(generator.tokens(PROMPT, 3, temperature))
    generator.free()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choices_follow_the_odds(temperature):
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    counts = np.bincount([choose(logits, temperature, 7, position) for position in range(4000)], minlength=4)
    odds = np.exp(logits / temperature)
    assert np.abs(counts / 4000 - odds / odds.sum()).max() < 0.03
    assert choose(np.array([0.0, -1e200, 3.0]), 1e-100, 0, 0) == 2


def test_command(tmp_path_factory, capfd):
    """Run the command on the whole launch: rank 0 writes prompt and continuation, others nothing."""
    world = MPI.COMM_WORLD
    path = shared_run(world, world.bcast(tmp_path_factory.mktemp("run") if world.rank == 0 else None), make_model())
    tokens = PROMPT + oracle(path, make_model(), PROMPT, 32 - len(PROMPT), 0.7, 4)
    wanted = bytes(tokens).decode(errors="replace") + "\n"
    cli.command.main([str(path), "--prompt", bytes(PROMPT).decode(), "--tokens", "1000", "--temperature", "0.7",
                      "--seed", "4", "--layout.order", '["tensor", "pipeline", "data"]'], standalone_mode=False)
    out, err = capfd.readouterr()
    is_first = world.rank == 0
    assert_all(out == (wanted if is_first else ""), repr(out), world)
    assert_all(("stopped at model.max_seq_len = 32" in err) == is_first, repr(err), world)


def test_text_is_written_by_whole_characters(capsys):
    writer, seen = cli.Writer(ByteTokenizer()), []
    for byte in "aé漢".encode() + b"\xff!" + "🙂".encode()[:2]:
        writer.add([byte])
        seen.append(capsys.readouterr().out)
    writer.close()
    assert seen == ["a", "", "é", "", "", "漢", "", "\ufffd!", "", ""]
    assert capsys.readouterr().out == "\ufffd\n"


def test_prompt_that_is_not_utf8():
    tokenizer = ByteTokenizer()
    assert cli._encode(tokenizer, "a\udcff") == [97, 255]
    assert cli._encode(tokenizer, "") == [END]

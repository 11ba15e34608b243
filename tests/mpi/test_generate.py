"""Sampled tokens on every layout, held against the serial reference that computes the whole row each time."""


import numpy as np
import pytest
import torch
from helpers import assert_all
from mpi4py import MPI
from written import make_model, reference_of, shared_run

from mpillm.cli import generate as cli
from mpillm.comm.single import SingleComm
from mpillm.data.tokenizers import ByteTokenizer
from mpillm.errors import CheckpointError, ConfigError, DataError, MpillmError
from mpillm.inference.engine import Engine
from mpillm.inference.requests import Request, Sampling
from mpillm.inference.sampling import choose
from mpillm.model.parameters import parameters

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


def continued(engine, prompt, count, temperature=1.0, seed=0):
    """Return the tokens that one request gets."""
    sampling = Sampling(temperature=temperature, seed=seed)
    return engine.generate([Request("", prompt, count, sampling)])[0].tokens


def oracle(run, model, prompt, count, temperature, seed):
    """Return the tokens that the serial reference gives, without a cache, in float64."""
    reference, row = reference_of(run, model), list(prompt)
    with torch.no_grad():
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
        engine = Engine(run, comm, overrides)
        found = continued(engine, PROMPT, COUNT, temperature, seed)
        engine.free()
        assert_all(found == wanted, f"{overrides}: {found}, not {wanted}", comm)


def test_the_communicator_of_the_caller_carries_nothing(comm, plain_run):
    used = []

    class Watched(MPI.Intracomm):
        def allgather(self, value):
            used.append(self == comm)
            return super().allgather(value)

    engine = Engine(plain_run, Watched(comm))
    continued(engine, PROMPT, 2)
    engine.free()
    assert_all((used or comm.size == 1) and not any(used), used, comm)


def test_seeds_and_temperatures_matter(comm, plain_run):
    engine = Engine(plain_run, comm)
    choices = [(0.7, 1), (0.7, 2), (5.0, 1), (0.7, 1), (1e-6, 1), (0,)]
    rows = [continued(engine, PROMPT, 8, *choice) for choice in choices]
    engine.free()
    assert_all(rows[0] == rows[3] and rows[4] == rows[5] and len({*map(tuple, rows)}) == 4, rows, comm)


def test_scores_are_those_of_the_whole_row(comm, run, model):
    """Log-probabilities of a prompt's tokens, asked for from the second and from a later one on."""
    row = [int(token) for token in np.random.default_rng(0).integers(0, 257, 30)]
    logits = torch.log_softmax(reference_of(run, model).logits(torch.tensor([row]))[0], -1).detach()
    wanted = logits[range(29), row[1:]].numpy()
    for overrides in layouts(comm.size, model):
        engine = Engine(run, comm, overrides)
        requests = [Request(str(start), row, 0, scored_from=start) for start in (1, 13)]
        found = engine.generate(requests)
        engine.free()
        for start, result in zip((1, 13), found):
            worst = np.abs(np.array(result.scores) - wanted[start - 1:]).max()
            assert_all(worst < 1e-10 and len(result.scores) == 30 - start, f"{overrides}: {worst}", comm)
            assert_all(result.is_greedy == bool((logits[start - 1:29].argmax(1) == torch.tensor(row[start:])).all()), "", comm)


def test_exact_has_the_same_bits_on_every_layout(comm, run, model):
    exact = {"train.numerics": "exact", "train.dtype": "float32", "train.exact_blocks": 8}
    request = Request("", PROMPT, COUNT, Sampling(seed=5, logprobs=257))

    def found(engine):
        result = engine.generate([request])[0]
        engine.free()
        return result.tokens, result.logprobs, result.top_logprobs

    wanted = found(Engine(run, SingleComm(), exact))
    assert len(wanted[2]) == len(wanted[0]) == COUNT and len(wanted[2][0]) == 257
    for overrides in layouts(comm.size, model):
        if 8 % overrides["layout.tensor"] == 0:
            assert_all(found(Engine(run, comm, exact | overrides)) == wanted, f"{overrides}: other bits", comm)


def test_no_rank_holds_a_whole_sharded_weight(comm, run, model):
    engine = Engine(run, comm, {"layout.tensor": comm.size, "layout.pipeline": 1})
    held = {p.shard.name: p.numel() for p in engine.replica.stage.parameters()}
    engine.free()
    for name, parameter in parameters(model).items():
        part = name.split(".")[-2]
        is_shared = part in ("key", "value", "key_norm") and model.num_kv_heads < comm.size
        is_whole = part in ("attention_norm", "ffn_norm", "norm") or name.endswith(("output.bias", "down.bias"))
        copies = comm.size if is_shared or is_whole else 1
        assert_all(sum(comm.allgather(held[name])) == copies * parameter.size, name, comm)


def test_stops(comm, plain_run):
    engine = Engine(plain_run, comm)
    greedy, full = continued(engine, PROMPT, COUNT, 0), continued(engine, PROMPT, 1000, 0)
    nothing = [continued(engine, prompt, count) for prompt, count in ((PROMPT, 0), ([65] * 32, 5))]
    text = bytes(greedy).decode(errors="replace")
    cut = engine.generate([Request("", PROMPT, COUNT, Sampling(temperature=0), stop=("never there", text[5:7], text[6:9]))])[0]
    engine.tokenizer.end = greedy[4]
    ended = [engine.generate([Request("", PROMPT, COUNT, Sampling(temperature=0), ignore_ends=goes_on)])[0]
             for goes_on in (False, True)]
    engine.free()
    assert_all(len(full) == 32 - len(PROMPT) and full[:COUNT] == greedy, full, comm)
    assert_all(not any(nothing), nothing, comm)
    assert_all(cut.text == text[:text.index(text[5:7])] and cut.finish_reason == "stop", cut, comm)
    assert_all(ended[0].tokens == greedy[:greedy.index(greedy[4])] and ended[0].finish_reason == "stop", ended, comm)
    assert_all(ended[1].tokens == greedy and ended[1].finish_reason == "length", ended, comm)


def test_rows_that_pad_the_vocabulary_are_no_tokens(comm, comm_path):
    shared_run(comm, comm_path, make_model(vocab_size=300))
    engine = Engine(comm_path, comm)
    choices = [Sampling(temperature=100.0, seed=seed) for seed in range(8)]  # nearly all tokens are as likely
    requests = [Request(str(choice.seed), PROMPT, 1000, choice) for choice in choices]
    sampled = [token for result in engine.generate(requests) for token in result.tokens]
    engine.free()
    assert_all(len(sampled) > 20 and max(sampled) < ByteTokenizer.vocab_size, sampled, comm)


def test_what_cannot_be_continued(comm, plain_run):
    engine = Engine(plain_run, comm)
    for prompt, message in [([65] * 33, "prompt has 33 tokens.*max_seq_len = 32"), ([5, 257], "5 to 257.*0 to 256"),
                            ([-1], "tokens from -1"), ([], "no tokens")]:
        with pytest.raises(ConfigError, match=message):
            continued(engine, prompt, 3)
    with pytest.raises(ConfigError, match="scored_from 0: must be at least 1"):
        Request("", PROMPT, 0, scored_from=0)
    engine.free()
    for values, message in [
        ({"temperature": -0.5}, "temperature -0.5"), ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"), ({"top_p": 0}, "top_p 0"), ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -1}, "top_k -1"), ({"min_p": 2}, "min_p 2"), ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"seed": 1 << 128}, "seed"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Sampling(**values)


def test_overrides_that_cannot_be(comm, plain_run):
    for overrides, message in [
        ({"layout.zero": 1}, "--layout.zero: inference takes only"), ({"model.num_heads": 2}, "--model.num_heads"),
        ({"layout.tensor": 7}, "7 ranks"), ({"layout.pipeline": 9}, "9 ranks"), ({"train.dtype": "int8"}, "train.dtype"),
        ({"inference.cache_bytes": 100}, "cache_bytes = 100.*a block of"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Engine(plain_run, comm, overrides)


def test_default_layout(comm, comm_path):
    """Replicas; of one row tensor ranks as far as there are heads, and in exact numerics blocks, and pipeline ranks for what is
    left."""
    shared_run(comm, comm_path, make_model(num_heads=3))
    one = {"layout.data": 1}
    for overrides, wanted in [
        ({}, {size: (size, 1, 1) for size in range(1, 5)}),
        (one, {1: (1, 1, 1), 2: (1, 1, 2), 3: (1, 1, 3), 4: (1, 2, 2)}),
        (one | {"train.numerics": "exact"}, {1: (1, 1, 1), 2: (1, 1, 2), 3: (1, 3, 1), 4: (1, 2, 2)}),
        ({"layout.pipeline": comm.size}, {size: (1, size, 1) for size in range(1, 5)}),
    ]:
        engine = Engine(comm_path, comm, overrides)
        layout = engine.config.layout
        engine.free()
        assert (layout.data, layout.pipeline, layout.tensor) == wanted[comm.size]


def test_missing_files(comm, comm_path):
    with pytest.raises(CheckpointError, match="complete"):
        Engine(comm_path, comm)
    shared_run(comm, comm_path, make_model())
    for name in ("tokenizer.json", "config.toml"):
        if comm.rank == 0:
            (comm_path / name).unlink()
        comm.Barrier()
        with pytest.raises(DataError, match=name):
            Engine(comm_path, comm)


def test_weights_that_are_not_finite(comm, plain_run):
    engine = Engine(plain_run, comm)
    for parameter in engine.replica.stage.parameters():
        parameter.data.fill_(float("nan"))
    for temperature in (0, 1.0):
        with pytest.raises(MpillmError, match="not finite"):
            continued(engine, PROMPT, 3, temperature)
    engine.free()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choices_follow_the_odds(temperature):
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    sampling = Sampling(temperature=temperature, seed=7)
    counts = np.bincount([choose(logits, sampling, position) for position in range(4000)], minlength=4)
    odds = np.exp(logits / temperature)
    assert np.abs(counts / 4000 - odds / odds.sum()).max() < 0.03
    assert choose(np.array([0.0, -1e200, 3.0]), Sampling(temperature=1e-100), 0) == 2


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


def test_prompt_that_is_not_utf8():
    tokenizer = ByteTokenizer()
    assert cli._encode(tokenizer, "a\udcff") == [97, 255]
    assert cli._encode(tokenizer, "") == [END]

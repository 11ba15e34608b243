"""The same results, bit for bit, whatever ranks, memory, batches and order do to the requests."""

import random

import pytest
from helpers import assert_all
from written import make_model, shared_run

from mpillm.comm.single import SingleComm
from mpillm.config import Config
from mpillm.inference.cache import block_size
from mpillm.inference.engine import Engine
from mpillm.inference.requests import Request, Sampling
from mpillm.inference.selftest import rows_apart
from mpillm.nn.products import PackedRows

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

MODELS = {
    "grouped": {"num_kv_heads": 2},
    "turned-in-a-window": {
        "window": 50, "qk_norm": "whole", "norm_placement": "output", "attention_bias": True,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 8}},
    "one-group-of-odd-sizes": {
        "num_heads": 5, "num_kv_heads": 1, "head_dim": 6, "ffn_size": 31, "tie_embeddings": True, "positions": "learned",
        "norm": "layer", "residual": "parallel", "ffn": "gelu_tanh", "ffn_bias": True, "output_bias": True, "head_bias": True,
        "logit_softcap": 5.0},
}
LENGTHS = (5, 70, 130, 1, 56, 57, 55, 20, 125, 3, 200, 90, 8, 8)
BLOCKS = 6  # of a pool that is too small for all requests, though none needs more than 5
SETTINGS = ({}, {"inference.cache_bytes": "small"}, {"inference.pass_tokens": 64}, {"inference.batch": 3},
            {"inference.share_prefixes": False})


def requests():
    """Return prompts of very unequal lengths, some of which begin alike, greedy and sampled, some scored; and four choices."""
    draw = random.Random(0)
    row = [draw.randrange(256) for _ in range(max(LENGTHS))]
    found = []
    for i, length in enumerate(LENGTHS):
        prompt = row[:length] if i in (1, 2, 8, 10) else [draw.randrange(256) for _ in range(length)]
        sampling = Sampling(temperature=0.8 * (i % 2), top_k=40 * (i % 3), top_p=0.9 if i % 4 == 1 else 1.0, seed=i, logprobs=2,
                            repetition_penalty=1.2 if i % 5 == 0 else 1.0)
        scored = 1 + length // 2 if i % 3 == 0 and length > 1 else None
        found.append(Request(str(i), prompt, draw.randrange(0 if scored else 1, 30), sampling, scored_from=scored))
    return found + [Request(str(len(LENGTHS) + i), [*row[:99], i, *row[i:i + 3]], 0, scored_from=99) for i in range(4)]


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def path(request, comm, comm_path):
    """Return the path of a float32 run that all ranks of ``comm`` see."""
    return shared_run(comm, comm_path, make_model(max_seq_len=300, **request.param), dtype="float32")


def open_engine(path, comm, overrides):
    """Return an engine, of which every rank may have a small pool."""
    overrides = dict(overrides)
    if overrides.get("inference.cache_bytes") == "small":
        model = Config.load(path / "config.toml").model
        layers = -(-model.num_layers // overrides.get("layout.pipeline", 1))
        overrides["inference.cache_bytes"] = BLOCKS * layers * 2 * model.num_kv_heads * block_size(model.head_dim) \
            * model.head_dim * 4
    return Engine(path, comm, overrides)


def found(path, comm, overrides, asked=None):
    """Return what an engine finds, as plain values in the order of the requests' names."""
    engine = open_engine(path, comm, overrides)
    results = engine.generate(requests() if asked is None else asked)
    caveat = engine.caveat
    engine.free()
    assert not caveat
    return sorted(((int(r.id), r.tokens, r.logprobs, r.top_logprobs, r.scores, r.finish_reason) for r in results))


def layouts(ranks):
    """Return every split of ranks over data and pipeline."""
    return [{"layout.data": ranks // p, "layout.pipeline": p} for p in range(1, ranks + 1) if ranks % p == 0]


def test_memory_batches_and_order_make_no_difference(comm, path):
    wanted = found(path, SingleComm(), {})
    assert sum(len(tokens) for _, tokens, *_ in wanted) > 100
    for layout in layouts(comm.size):
        for settings in SETTINGS if layout["layout.data"] == 1 else SETTINGS[:2]:
            assert_all(found(path, comm, layout | settings) == wanted, f"{layout} {settings}", comm)
    shuffled = requests()
    random.Random(1).shuffle(shuffled)
    assert_all(found(path, comm, {}, shuffled) == wanted, "another order", comm)
    alone = [found(path, SingleComm(), {}, [one])[0] for one in requests()[comm.rank::comm.size]]
    assert_all(alone == wanted[comm.rank::comm.size], "one by one", comm)


def test_the_small_pool_is_too_small_for_all(path):
    engine = open_engine(path, SingleComm(), SETTINGS[1])
    engine.generate(requests())
    scheduler = engine.replica.scheduler
    assert scheduler.num_blocks == BLOCKS and scheduler.preempted and not scheduler.used_blocks
    assert scheduler.shared_tokens % scheduler.block_size  # some began within a block
    engine.free()


def test_exact_makes_no_difference_between_tensor_ranks(comm, path):
    exact = {"train.numerics": "exact", "train.exact_blocks": 4, "layout.data": 1}
    wanted = found(path, SingleComm(), exact)
    for tensor in (1, 2, 4):
        if comm.size % tensor == 0:
            layout = {"layout.tensor": tensor, "layout.pipeline": comm.size // tensor, **SETTINGS[1]}
            assert_all(found(path, comm, exact | layout) == wanted, f"{layout}", comm)


class OneRowApart(PackedRows):
    """A product whose bits follow from how many rows there are."""

    def __call__(self, x_TD, packed):
        return super().__call__(x_TD, packed) * (1 + 1e-6 * (len(x_TD) == 1))


def test_rows_that_see_each_other_are_found(comm, path):
    engine = Engine(path, comm, {"layout.data": 1, "layout.tensor": 1, "layout.pipeline": comm.size})
    stage = engine.replica.stage
    groups = [engine.mesh.group("data"), engine.mesh.world]
    assert_all(rows_apart(engine.config.model, stage, groups) == "", "sound rows", comm)
    stage.split.multiply = OneRowApart()
    assert_all("rows see each other" in rows_apart(engine.config.model, stage, groups), "a planted fault", comm)
    engine.free()

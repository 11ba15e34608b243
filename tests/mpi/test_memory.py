"""Is the memory that a plan predicts the memory that a run takes? ``memory.py`` has the whole table."""

import gc

import pytest
from helpers import assert_all
from memory import CLOSE, compare, config_of, machine_of, measured_bytes

from mpillm.comm import shared

CASES = {
    "forwards first": {"layout.schedule": "gpipe", "train.global_batch": 6},
    "twice as many in flight": {"layout.schedule": "zb-h2", "train.global_batch": 10},
    "partial sums of microbatches": {"train.numerics": "exact", "train.global_batch": 8},
    "layers again": {"layout.recompute": "full", "layout.schedule": "1f1b", "train.global_batch": 4},
    "layers again, in halves": {"layout.recompute": "full", "layout.schedule": "zb-h1", "train.global_batch": 8},
    "tokens apart": {"layout.sequence_parallel": True, "train.dtype": "bfloat16"},
    "frozen layers": {"train.freeze": ["embedding.*", "layers.[0-4].*"], "layout.schedule": "1f1b", "train.global_batch": 8},
    "frozen parts": {"train.freeze": ["*.ffn.*", "embedding.*"], "layout.schedule": "zb-h1", "train.global_batch": 8},
    "a frozen body": {"train.freeze": ["embedding.*", "layers.*", "norm.*"], "train.dtype": "bfloat16"},
    "one copy": {"model.tie_embeddings": True, "model.vocab_size": 8192},
}
AXIS = {"tokens apart": "tensor", "a frozen body": "data", "one copy": "data"}


@pytest.mark.parametrize("name", CASES)
def test_memory_that_is_predicted_is_memory_that_is_taken(comm, name):
    overrides = {"layout." + AXIS.get(name, "pipeline"): comm.size, "train.global_batch": 2 * comm.size, **CASES[name]}
    if comm.size == 1:
        overrides.pop("layout.sequence_parallel", None)
    rows = compare(config_of(overrides, comm), machine_of(comm), comm)
    ok = all(abs(predicted - measured) <= CLOSE * measured for _, predicted, measured in rows)
    assert_all(ok, f"pipeline rank, predicted, measured: {rows}", comm)


def test_freeing_an_engine_gives_its_memory_back(comm, monkeypatch):
    """At once: what hangs on a circle of references is given back when the interpreter comes by. Without windows, so that
    all memory is PyTorch's."""
    monkeypatch.setenv(shared.SWITCH, "0")
    config = config_of({"layout.data": comm.size, "layout.bucket_cuts": (0, 3), "train.global_batch": 2 * comm.size}, comm)
    gc.disable()
    try:
        most, left, _ = measured_bytes(config, comm)
    finally:
        gc.enable()
    assert_all(left < most / 100, f"{left} of {most} bytes are left", comm)

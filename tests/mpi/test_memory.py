"""Is the memory that a plan predicts the memory that a run takes? ``memory.py`` has the whole table."""

import gc
from itertools import product

import pytest
from helpers import assert_all
from memory import CLOSE, compare, config_of, machine_of, measured_bytes
from tiny import KNOWN

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
    assert_all(all(abs(row.predicted - row.measured) <= CLOSE * row.measured for row in rows), rows, comm)


@pytest.mark.slow
@pytest.mark.parametrize("family", KNOWN)
def test_activations_of_every_family_are_within_a_tenth(comm, family):
    if comm.size != 2:
        pytest.skip("two ranks have all of it")
    sizes, found = {"model.head_dim": 32, "model.max_seq_len": 128, "train.global_batch": 8}, []
    for axis, more in product(("pipeline", "tensor"), (
            {}, {"layout.recompute": "full", "layout.schedule": "1f1b"}, {"train.dtype": "bfloat16"})):
        config = config_of({**KNOWN[family], **sizes, f"layout.{axis}": 2, **more}, comm)
        found += compare(config, machine_of(comm), comm)
    assert_all(all(abs(row.activations - 1) <= 0.1 for row in found), [round(row.activations, 3) for row in found], comm)


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

"""Is the memory that a plan predicts the memory that a run takes? ``memory.py`` has the whole table."""

import pytest
from helpers import assert_all
from memory import CLOSE, compare, config_of, machine_of

CASES = {
    "forwards first": {"layout.schedule": "gpipe", "train.global_batch": 6},
    "twice as many in flight": {"layout.schedule": "zb-h2", "train.global_batch": 10},
    "partial sums of microbatches": {"train.numerics": "exact", "train.global_batch": 8},
    "layers again": {"layout.recompute": "full", "layout.schedule": "1f1b", "train.global_batch": 4},
    "tokens apart": {"layout.sequence_parallel": True, "train.dtype": "bfloat16"},
    "one copy": {"model.tie_embeddings": True, "model.vocab_size": 8192},
}
AXIS = {"tokens apart": "tensor", "one copy": "data"}


@pytest.mark.parametrize("name", CASES)
def test_memory_that_is_predicted_is_memory_that_is_taken(comm, name):
    overrides = {"layout." + AXIS.get(name, "pipeline"): comm.size, "train.global_batch": 2 * comm.size, **CASES[name]}
    if comm.size == 1:
        overrides.pop("layout.sequence_parallel", None)
    rows = compare(config_of(overrides, comm), machine_of(comm), comm)
    ok = all(abs(predicted - measured) <= CLOSE * measured for _, predicted, measured in rows)
    assert_all(ok, f"pipeline rank, predicted, measured: {rows}", comm)

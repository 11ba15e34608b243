"""Converted weights of every family on every choice of degrees, against the serial reference in float64.

That the reference computes what ``transformers`` does is held by ``tests/unit/test_hf_families.py``.
"""

import pytest
from families import CASES, make_run
from helpers import assert_all
from tiny import TRAIN, one_for_every_degrees

from mpillm.planner.keys import describe
from mpillm.verify import compare

pytest.importorskip("transformers")
pytestmark = [pytest.mark.mpi, pytest.mark.slow]


@pytest.mark.parametrize("case", [*CASES, "llama-classes", "bert-classes", "bert-tags"])
def test_every_choice_of_degrees(comm, comm_path, case):
    config = comm.bcast(make_run(comm_path, case) if comm.rank == 0 else None)
    config = config.with_values({f"train.{key}": value for key, value in TRAIN.items()})
    batches = compare.batches(config, 1)
    expected = [compare.ReferenceTrainer(config).step(*batches[0]) if comm.rank == 0 else None]
    found = {describe(one.layout): compare.compare_layout(one, comm, batches, expected)
             for one in one_for_every_degrees(config, comm.size)}
    wrong = [f"{name}: {difference}" for name, difference in found.items() if difference.first]
    assert_all(not wrong, "; ".join(wrong), comm)

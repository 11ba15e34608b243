"""Plans: what a table answers at, below and between its limits; the file; what is refused."""

import json
from pathlib import Path

import pytest

from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE, OPERATIONS, DecisionTable, Plan


def test_the_first_row_into_which_a_message_fits():
    table = DecisionTable((
        ("allreduce", "*", "*", 100, "mpi"), ("allreduce", "*", "*", 1000, "ring"),
        ("allreduce", "*", "*", None, "window"),
        ("allreduce", "tensor", "*", 10, "binomial"), ("allreduce", "*", "bfloat16", None, "direct"),
    ))
    for n_bytes, algorithm in ((0, "mpi"), (100, "mpi"), (101, "ring"), (1000, "ring"), (1001, "window")):
        assert table.choose("allreduce", "data", "float32", n_bytes) == algorithm
    assert table.choose("allreduce", "tensor", "float32", 10) == "binomial"
    assert table.choose("allreduce", "tensor", "float32", 11) == "mpi"
    assert table.choose("allreduce", "tensor", "bfloat16", 10) == "direct"
    assert table.choose("bcast", "data", "float32", 10) == "mpi"


def test_limits_out_of_order_are_refused():
    table = DecisionTable((("bcast", "*", "*", 100, "mpi"), ("bcast", "*", "*", 10, "binomial")))
    with pytest.raises(ConfigError, match="ascending"):
        table.choose("bcast", "data", "float32", 1)


def test_a_size_that_goes_by_another_needs_one_that_does_not():
    rows = [("bcast", "*", "*", 100, "padded:300"), ("bcast", "*", "*", 200, "pieces:50"),
            ("bcast", "*", "*", None, "mpi")]
    with pytest.raises(ConfigError, match="pieces:50"):
        DecisionTable(tuple(rows)).choose("bcast", "data", "float32", 1)
    rows[1] = ("bcast", "*", "*", 200, "pieces:300")
    assert DecisionTable(tuple(rows)).choose("bcast", "data", "float32", 1) == "padded:300"


def test_the_file(tmp_path):
    plan = Plan(4, 2, DEFAULT_TABLE)
    Plan(4, 2, DecisionTable((("allreduce", "*", "*", 9, "pieces:99"), ("allreduce", "*", "*", None,
                                                                       "reduce_scatter+allgather")))).save(
        tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").table.choose("allreduce", "data", "float32", 9) == "pieces:99"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert all(Plan.load(tmp_path / "plan.json").table.choose(op, "data", "float32", 1 << 30) == "window"
               for op in OPERATIONS)
    plan.check(4, 2)
    for ranks, nodes in ((2, 2), (4, 1)):
        with pytest.raises(ConfigError, match=f"4 ranks on 2 nodes, this launch has {ranks} on {nodes}"):
            plan.check(ranks, nodes)


def test_a_plan_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    Plan(4, 2).save(path)
    write = Path.write_text

    def full(self, text, **options):
        write(self, text[:20], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        Plan(2, 1).save(path)
    assert Plan.load(path) == Plan(4, 2)


@pytest.mark.parametrize("row", [
    ["allreduce", "*", "*", None, "rings"], ["sort", "*", "*", None, "ring"], ["bcast", "*", "*", "big", "binomial"],
    ["bcast", "*", "*", None], ["bcast", "*", "*", None, "trees"],
    ["bcast", "*", "*", None, "reduce_scatter+allgather"], ["bcast", "*", "*", None, "padded:0"],
    ["bcast", "*", "*", None, "pieces:x"], ["alltoall", "*", "*", None, "pieces:64"],
])
def test_a_file_with_a_bad_row_is_refused(tmp_path, row):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"num_ranks": 2, "num_nodes": 1, "table": {"rows": [row]}}))
    with pytest.raises(ConfigError, match="decision table: row"):
        Plan.load(path)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    for text in ("", "[]", "{}", '{"num_ranks": 2}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="plan.json"):
            Plan.load(path)
    with pytest.raises(ConfigError, match="missing.json"):
        Plan.load(tmp_path / "missing.json")

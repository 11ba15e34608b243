"""Every JSON that mpillm writes is JSON, which knows no NaN and no Infinity."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest

import mpillm
from mpillm.files import to_json
from mpillm.train.metrics_file import Metrics

PACKAGE = Path(mpillm.__file__).parent
# Calls of json.dumps whose text goes into no file: messages, digests, comparisons, a line from process to process.
ELSEWHERE = {"plain.py", "hf/family.py", "hf/reading.py", "train/choose.py", "checkpoint/reading.py", "cli/doctor.py",
             "bench/peer.py"}


def strictly(text):
    """Parse JSON alone, without Python's extensions."""
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_not_finite_comes_back_by_float(number, indent):
    found = strictly(to_json({"own": number, "in": [1.5, {"deep": (number, 2.0)}], "none": None}, indent))
    assert [str(float(text)) for text in (found["own"], found["in"][1]["deep"][0])] == [str(float(number))] * 2
    assert found["in"][0] == 1.5 and found["in"][1]["deep"][1] == 2.0 and found["none"] is None


def test_what_is_finite_is_written_as_ever():
    value = {"step": 3, "loss": 1e300, "name": "NaN", "none": None, "is": True, "list": [0.1, -0.0, []]}
    assert to_json(value) == json.dumps(value) and to_json(value, 1) == json.dumps(value, indent=1)


def test_a_line_of_metrics_is_json_whatever_a_step_came_to(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.add({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    metrics.add({"step": 2, "loss": 3.0, "grad_norm": 1.0})
    metrics.close()
    lines = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": "NaN", "grad_norm": "Infinity"}, {"step": 2, "loss": 3.0, "grad_norm": 1.0}]
    assert Metrics(tmp_path / "metrics.jsonl", 1).last == lines[0]


def test_no_json_is_written_around_the_helper():
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
                 and ast.unparse(node.func) in ("json.dump", "json.dumps")]
        loose = [call.lineno for call in calls if "allow_nan" not in {word.arg for word in call.keywords}]
        where = path.relative_to(PACKAGE).as_posix()
        assert not loose or where in ELSEWHERE | {"files.py"}, f"{where}, lines {loose}: use mpillm.files.to_json"

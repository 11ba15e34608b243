"""The scripts that measure for a night, as far as they need no launch; and the files that the docs show."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from layouts import MODELS, candidates

from mpillm.config import Config
from mpillm.machine import PRESETS, Machine
from mpillm.plan import Plan
from mpillm.planner.keys import to_config
from mpillm.planner.layout_costs import Pricer
from mpillm.planner.routes import Topology


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_that_is_to_be_measured_can_be_run(name):
    config, machine = Config.from_dict(MODELS[name]), PRESETS["cpu-node"]
    pricer = Pricer(config, machine, 4)
    prices = candidates(pricer, config, 4, machine)
    assert {(p.layout.data, p.layout.pipeline, p.layout.tensor) for p in prices} >= {(1, 2, 2), (2, 1, 2)}
    for price in prices:
        Plan(4, 0, layout=to_config(price, pricer)).applied_to(config).resolve(4)
    fewer = candidates(pricer, config, 4, machine, hopeless=1.1)
    assert 0 < len(fewer) < len(prices) and fewer[0] == prices[0]


def test_the_files_that_the_docs_show_are_whole_and_can_be_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "planning.rst").read_text(encoding="utf-8")
    shown = re.findall(r"code-block:: json\n\n((?:    .*\n)+)", text)
    for kind, example in zip((Machine, Plan, Topology), shown, strict=True):
        path = tmp_path / "example.json"
        path.write_text(example, encoding="utf-8")
        read = kind.load(path)
        assert kind is Topology or set(json.loads(example)) == {field.name for field in fields(kind)}
        assert kind is not Machine or read.num_ranks == 2


def test_the_readme_of_the_tests_names_every_file():
    tests = Path(__file__).parents[1]
    text = (tests / "README.rst").read_text(encoding="utf-8")
    files = [f"{path.parent.name}/{path.name}" for part in ("unit", "mpi") for path in tests.glob(f"{part}/test_*.py")]
    files += [path.name for path in tests.glob("*.py")]
    assert not [name for name in files if f"``{name}``" not in text]
    assert not [name for name in re.findall(r"``((?:unit|mpi)/\w+\.py)``", text) if not (tests / name).exists()]

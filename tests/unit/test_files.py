"""Files that others read: what is wrong with one is told by key; a file appears whole or the old one stays."""

import json

import pytest

from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.machine import PRESETS, Machine
from mpillm.plan import Plan
from mpillm.planner.routes import Topology
from mpillm.schedules.collective import CollectiveSchedule
from mpillm.schedules.generators import make_collective

NETWORK = {"nodes": [{"name": 3}, {"name": "b", "compute": True}],
           "links": [{"from": 3, "to": "b", "bytes_per_s": 1e9}, {"from": "b", "to": 3, "bytes_per_s": 1e9}]}


@pytest.fixture
def good(tmp_path):
    """What the file of each kind holds."""
    PRESETS["cpu-node"].save(tmp_path / "machine.json")
    Plan(2, 1, layout={"data": 2}).save(tmp_path / "plan.json")
    found = {kind: json.loads((tmp_path / name).read_text())
             for kind, name in ((Machine, "machine.json"), (Plan, "plan.json"))}
    return {**found, Topology: NETWORK, CollectiveSchedule: make_collective("bcast", "binomial", 3).to_dict()}


@pytest.mark.parametrize("kind, way, value, text", [
    (Machine, ["memory_byte"], 3, "memory_byte: unknown key, did you mean memory_bytes"),
    (Machine, ["levels", 1, "size"], "two", r'levels.1.size = "two": .* integer'),
    (Machine, ["levels", 1, "alpha"], 1, "levels.1.alpha: unknown key, did you mean alpha_s"),
    (Machine, ["matmul", 0, 0], 1.5, "matmul.0.0 = 1.5: .* integer"),
    (Machine, ["num_ranks"], True, "num_ranks = true: .* integer"),
    (Machine, ["memory_bytes"], float("inf"), "rates must be positive"),
    (Plan, ["num_nodes"], "1", 'num_nodes = "1": .* integer'),
    (Plan, ["layuot"], {}, "layuot: unknown key, did you mean layout"),
    (Plan, ["table", "rows", 0], ["sort"], r"decision table: row \['sort'\]: needs"),
    (Plan, ["tried"], {"x": 1}, 'tried = {"x": 1}: .* list'),
    (Topology, ["links", 0, "form"], "b", "links.0.form: unknown key, did you mean from"),
    (Topology, ["nodes", 1, "compute"], 1, "nodes.1.compute = 1: .* boolean"),
    (CollectiveSchedule, ["rounds", 0, 0, 0, 0], "cop", r"rounds.0.0.0.0 = \"cop\": .*'copy', 'send'"),
    (CollectiveSchedule, ["shares"], None, "shares = null"),
])
def test_a_file_that_is_refused_names_the_key_the_value_and_what_is_allowed(tmp_path, good, kind, way, value, text):
    path, values = tmp_path / "file.json", json.loads(json.dumps(good[kind]))
    path.write_text(json.dumps(values))
    kind.load(path)
    place = values
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"file.json: .*{text}") as caught:
        kind.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Machine, Plan, Topology, CollectiveSchedule])
def test_what_is_no_such_file_is_refused_with_what_to_give(tmp_path, kind):
    path = tmp_path / "file.json"
    for text in (None, "", "[]", "3", "{", "[" * 100_000, "\udcff"):
        if text is not None:
            path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="file.json: .*(give a file|needs nodes)") as caught:
            kind.load(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_is_left_out_has_its_default(tmp_path, good):
    """As a key has that came later than the file."""
    path = tmp_path / "file.json"
    for kind, required in ((Machine, ("name", "source", "levels", "matmul", "memory_bytes", "memory_bytes_per_s")),
                           (Plan, ("num_ranks", "num_nodes"))):
        path.write_text(json.dumps({key: good[kind][key] for key in required}))
        assert kind.load(path) == kind(**{key: getattr(kind.load(path), key) for key in required})
        for key in required:
            path.write_text(json.dumps({other: good[kind][other] for other in required if other != key}))
            with pytest.raises(ConfigError, match=f"{key}: required, but not given"):
                kind.load(path)


def test_a_configuration_is_named_by_its_path(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text("[model]\nhidden_siz = 3\n")
    with pytest.raises(ConfigError, match="tiny.toml: .*hidden_siz: unknown key, did you mean hidden_size"):
        Config.load(path)

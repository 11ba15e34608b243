"""Files that others read: what is wrong with one is told by key; a file appears whole or the old one stays."""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import unpack

from mpillm.config import Config
from mpillm.errors import ConfigError, DataError
from mpillm.files import write_json, write_text
from mpillm.machine import PRESETS, Machine
from mpillm.plan import Plan
from mpillm.planner.routes import Topology
from mpillm.report.records import read_metrics, read_trace
from mpillm.schedules.check import check
from mpillm.schedules.check_collective import check_collective
from mpillm.schedules.collective import CollectiveSchedule
from mpillm.schedules.formats import named_or_read
from mpillm.schedules.generators import make_collective
from mpillm.train.metrics_file import Metrics

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


def test_what_version_0_1_0_wrote_is_read(tmp_path):
    """Its run, tokens and checkpoint are taken up in tests/mpi/test_resume.py."""
    unpack("v0.1.0", tmp_path, ("kind", "num_nodes"))
    machine = Machine.load(tmp_path / "machine.json")
    assert machine.num_ranks == 2 and [level.name for level in machine.levels] == ["node"] and machine.table[0][4] == "mpi"
    for path in (tmp_path / "plan.json", tmp_path / "run" / "plan.json"):
        plan = Plan.load(path)
        assert (plan.num_ranks, plan.num_nodes, plan.layout["data"], plan.layout["microbatch"]) == (2, 1, 2, 1)
        assert plan.table.choose("allgather", "data", "float32", 1 << 30) == "ring"
        plan.applied_to(Config.load(tmp_path / "config.toml").with_values({"model.vocab_size": 257})).resolve(2)
    schedule = CollectiveSchedule.load(tmp_path / "schedule.json")
    check_collective(schedule)
    assert (schedule.op, schedule.num_ranks) == ("allgather", 3)
    assert Topology.load(tmp_path / "topology.json").ranks == [0, 1, 2]
    check(named_or_read(str(tmp_path / "pipeline.txt"), 2, 3, 1))
    assert Config.load(tmp_path / "run" / "config.toml").model.norm == "rms"
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2] and "validation_loss" in metrics[1]
    (launch,) = read_trace(tmp_path / "run" / "trace")
    assert sorted(launch.steps) == [1, 2]


def test_a_configuration_is_named_by_its_path(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text("[model]\nhidden_siz = 3\n")
    with pytest.raises(ConfigError, match="tiny.toml: .*hidden_siz: unknown key, did you mean hidden_size"):
        Config.load(path)


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_json(path, {"text": text})])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, write):
    path, link = tmp_path / "real" / "file.json", tmp_path / "link.json"
    path.parent.mkdir()
    link.symlink_to(path)  # which leads to nothing yet
    old = os.umask(0o027)
    try:
        write(link, "old")
    finally:
        os.umask(old)
    assert link.is_symlink() and "old" in path.read_text() and path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o664)  # for the group to change
    write(str(link), "new")
    assert link.is_symlink() and "new" in path.read_text() and path.stat().st_mode & 0o777 == 0o664
    for number, todo in ((errno.EDQUOT, "your quota there is used up"), (errno.ENOSPC, "free some space"),
                         (errno.EROFS, "name a place")):
        def full(self, text, number=number, **options):
            self.touch()
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(DataError, match=rf"link.json: cannot be written \({os.strerror(number)}\): {todo}"):
            write(link, "newer")
        monkeypatch.undo()
    assert "new" in path.read_text() and os.listdir(path.parent) == ["file.json"]
    for where, todo in ((tmp_path / "none" / "x", "make its folder first"), (path / "x", "make its folder first")):
        with pytest.raises(DataError, match=f"cannot be written .*: {todo}"):
            write(where, "x")


def test_what_is_no_plain_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through" and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)
    write_text("/dev/null", "x")
    assert not os.path.isfile("/dev/null")
    for target in (tmp_path / "output", None):  # a file, a pipe
        words = [sys.executable, "-c", "from mpillm.files import write_text; write_text('/dev/stdout', 'x' * 9)"]
        with open(target or os.devnull, "w") as file:
            job = subprocess.run(words, stdout=file if target else subprocess.PIPE, check=True)
        assert (target.read_bytes() if target else job.stdout) == b"x" * 9
    assert sorted(os.listdir(tmp_path)) == ["output", "pipe"]


def test_metrics_that_cannot_be_read_are_not_written_anew(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    Metrics(path, 0).close()
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def failing(self, **options):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):
        patch.setattr(Path, "read_bytes", failing)
        patch.setattr(Path, "exists", lambda self: False)  # as from Python 3.14 on
        Metrics(path, 2)
    kept = Metrics(path, 2)
    kept.close()
    assert kept.last == {"step": 2} and len(path.read_text().splitlines()) == 2


def test_a_file_system_that_cannot_sync_takes_files(tmp_path, monkeypatch):
    for number in (errno.EINVAL, errno.ENOSYS, errno.EIO):
        def failing(descriptor, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", failing)
        with nullcontext() if number != errno.EIO else pytest.raises(DataError, match="Input/output error"):
            write_text(tmp_path / "file", str(number))
    assert (tmp_path / "file").read_text() == str(errno.ENOSYS)

"""The watchdog on a rank that a clock plays, and what is read out of records that are made up."""

import json
import threading

import pytest

from mpillm.comm.recorder import Recorder
from mpillm.errors import FAILURE
from mpillm.guard import watchdog
from mpillm.guard.diagnose import diagnose


class Left(BaseException):
    """Stands for the end of the process."""


class Played(watchdog.Watchdog):
    """One of some ranks, on a clock: :meth:`pass_s` lets its thread's loop see the time go by."""

    def __init__(self, monkeypatch, folder, limit_s, size=2):
        self.now_s = 0.0
        monkeypatch.setattr(watchdog.threading.Thread, "start", lambda thread: None)
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(watchdog.time, "sleep", lambda s: setattr(self, "now_s", self.now_s + s))
        monkeypatch.setattr(watchdog.os, "_exit", self.leave)
        super().__init__(Recorder(), folder, 0, size, {"data": 0, "pipeline": 0, "tensor": 0}, limit_s)

    def leave(self, code):
        raise Left(code)

    def play(self, events):
        """Watch while ``events`` happen: what to call, and how long it is quiet after it."""
        def wait(poll_s, events=iter(events)):
            self.now_s += poll_s
            if self.now_s >= self.until_s:
                event = next(events, None)
                if event is None:
                    return True
                event[0]()
                self.until_s = self.now_s + event[1]
            return False

        self.until_s, self._ended.wait = self.now_s, wait
        self._watch()


def spans(played, quiet, kind="F"):
    """Spans of a kind, and after each the time that nothing happens."""
    for s in quiet:
        yield lambda: played.recorder.begin(kind, kind), s
        yield lambda: played.recorder.end(kind), 0.3


@pytest.mark.parametrize("limit_s, quiet, expected_s", [
    (300.0, [], 300.0),  # new
    (300.0, [0.3] * 2, 300.0),  # not known yet
    (300.0, [0.3] * 9, 30.0),  # known and short: a share of the limit
    (60.0, [0.3] * 9, 10.0),  # no shorter than this
    (4.0, [0.0] * 9, 5.0),  # unless asked for; twenty polls
    (60.0, [0.3] * 9 + [5.0], 100.0),
    (60.0, [8.0], 160.0),  # may take longer than the limit for what is new
])
def test_the_limit_is_learned(tmp_path, monkeypatch, limit_s, quiet, expected_s):
    played = Played(monkeypatch, tmp_path, limit_s)
    played.recorder.begin_step(1)
    played.play(spans(played, quiet))
    assert played.limit_of("F") == pytest.approx(expected_s, rel=0.2)
    assert played.limit_of(watchdog.RESTING) == float("inf")


def test_a_rank_gives_up_after_its_limit_and_says_so(tmp_path, monkeypatch, capsys):
    played = Played(monkeypatch, tmp_path / "flight", 60.0)
    played.recorder.begin_step(1)
    with pytest.raises(Left, match=str(FAILURE)):
        played.play(spans(played, [0.3] * 9 + [1000.0]))
    record = json.loads((tmp_path / "flight" / "rank-00000.json").read_text())
    assert record["kind"] == "F" and 10 < record["quiet_s"] < 11 and record["limit_s"] == pytest.approx(10.0)
    assert "ranks [1] wrote nothing" in capsys.readouterr().err


def test_a_rank_that_waits_gives_up_when_another_has(tmp_path, monkeypatch):
    played = Played(monkeypatch, tmp_path, 60.0)
    (tmp_path / "rank-00001.json").write_text(json.dumps(record(1, [call("allreduce", 1)])))
    played.recorder.begin_step(1)
    with pytest.raises(Left):
        played.play(spans(played, [0.5] * 9 + [1000.0]))
    assert json.loads((tmp_path / "rank-00000.json").read_text())["quiet_s"] < 3


@pytest.mark.parametrize("kind, quiet_s", [("data", 200.0), ("save", 200.0), ("load", 200.0)])
def test_a_stall_of_the_file_system_ends_nothing(tmp_path, monkeypatch, kind, quiet_s):
    """Though what the rank knows of this kind is short; it has a limit all the same."""
    played = Played(monkeypatch, tmp_path / "flight", 60.0)
    played.recorder.begin_step(1)
    played.play(spans(played, [0.1] * 9 + [quiet_s] + [0.1] * 3, kind))
    assert not (tmp_path / "flight").exists() and 240 <= played.limit_of(kind) < 20 * 210
    with pytest.raises(Left):
        played.play(spans(played, [1e5], kind))


def told_by(folder, *names):
    for name in names:
        (folder / name).write_text(json.dumps(record(int(name[5:10]), [call("allreduce", 1)])))


def test_who_waits_for_a_rank_that_waits_for_a_file_system_waits_with_it(tmp_path, monkeypatch, capsys):
    """It has given up after what it knows of its own kind, finds that the other is in a file, and takes its word back."""
    played = Played(monkeypatch, tmp_path, 60.0)
    played.recorder.begin_step(1)

    def sleep(s):  # the other, asked by this one, goes on after 100 s, this rank 8 s later
        if not sleeps:
            (tmp_path / "files-00001").touch()
            told_by(tmp_path, "rank-00001.json")
        played.now_s += s
        sleeps.append(played.now_s)
        if played.now_s > sleeps[0] + 100:
            (tmp_path / "files-00001").unlink(missing_ok=True)
            (tmp_path / "rank-00001.json").unlink(missing_ok=True)
        if played.now_s > sleeps[0] + 108:
            played.recorder.end("wait")

    sleeps = []
    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    played.play([*spans(played, [0.3] * 9, "wait"), (lambda: played.recorder.begin("wait", "1F0"), 30.0)])
    assert sleeps[-1] > sleeps[0] + 108 and not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_who_was_asked_takes_it_back_with_who_asked(tmp_path, monkeypatch, capsys):
    """Though it makes no progress that the recorder sees: it is at work of its own."""
    played, sleeps = Played(monkeypatch, tmp_path, 60.0, 3), []

    def sleep(s):
        played.now_s += s
        sleeps.append((tmp_path / "rank-00000.json").exists())
        (tmp_path / "rank-00001.json").unlink(missing_ok=True)

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    played.play([(lambda: told_by(tmp_path, "rank-00001.json"), 300.0)])
    assert sleeps == [True] and not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_a_rank_in_a_file_says_that_all_wait_for_it(tmp_path, monkeypatch, capsys):
    played = Played(monkeypatch, tmp_path, 60.0)
    played.recorder.begin_step(3)
    played.recorder.begin("data", "samples")
    told_by(tmp_path, "rank-00001.json")
    with pytest.raises(Left):
        played.play([(lambda: None, 1e5)])
    said = capsys.readouterr().err
    assert "[rank 0/2" in said and "step 3, data: quiet for 2 s; all wait for the file system, for 238 s at most" in said
    assert 230 < played.now_s < 260 and "rank 0 on" in said.split("at most")[1]  # then it has no more patience


@pytest.mark.parametrize("size, looks", [(2, 1592), (4000, 10)])
def test_all_ranks_together_ask_the_file_system_so_many_times_a_second(tmp_path, monkeypatch, size, looks):
    asked = []
    monkeypatch.setattr(watchdog.Path, "glob", lambda folder, pattern: asked.append(folder) or [])
    played = Played(monkeypatch, tmp_path, 1e4, size)
    played.recorder.begin_step(1)
    played.play([(lambda: None, 400.0)])
    assert len(asked) == pytest.approx(looks, rel=0.01)


def test_the_thread_ends_with_the_watchdog(tmp_path):
    dog = watchdog.Watchdog(Recorder(), tmp_path, 0, 1, {}, 60.0)
    assert "watchdog" in {thread.name for thread in threading.enumerate()}
    dog.stop()
    assert not dog._thread.is_alive()


def test_whatever_goes_wrong_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "rank-00001.json").write_text("[]")  # not a record
    played = Played(monkeypatch, tmp_path, 60.0)
    with pytest.raises(Left):
        played._fire(61.0)
    assert "[rank 0/2" in (said := capsys.readouterr().err) and "not the record of a rank" in said


def call(name, number, axis="data", at=1.0):
    return {"axis": axis, "call": name, "number": number, "bytes": 8, "at": at}


def record(rank, calls, ranks=2, data=None):
    return {"rank": rank, "ranks": ranks, "host": f"n{rank}", "step": 3, "kind": "reduce", "quiet_s": 9, "limit_s": 8,
            "coords": {"data": rank if data is None else data, "pipeline": 0, "tensor": 0}, "calls": calls}


@pytest.mark.parametrize("calls, said", [
    ([[call("allreduce", 1), call("bcast", 2)], [call("allreduce", 1), call("allgather", 2)]],
     "axis data, call 2: the ranks call different operations: rank 0 bcast, rank 1 allgather"),
    ([[call("allreduce", 1), call("bcast", 2)], [call("allreduce", 1)]],
     "axis data, call 2, bcast: ranks [0] are in it, ranks [1] have not come to it: rank 1 on n1: step 3, reduce"),
    ([[call("allreduce", 1), call("send", 1, at=5.0)], [call("allreduce", 1, at=2.0)]], "rank 1 on n1 went quiet first"),
    ([[call("allreduce", 1)], None], "ranks [1] wrote nothing"),
    # that which differs comes before that which lies behind
    ([[call("bcast", 7, "world"), call("allreduce", 1)], [call("allreduce", 7, "world")]],
     "axis world, call 7: the ranks call different operations: rank 0 bcast, rank 1 allreduce"),
])
def test_the_first_that_diverged_is_named(calls, said):
    found = diagnose({rank: record(rank, some) for rank, some in enumerate(calls) if some is not None})
    assert found.splitlines()[1].strip().startswith(said), found


def test_ranks_of_other_groups_are_not_compared():
    found = diagnose({0: record(0, [call("bcast", 1, "tensor")]), 1: record(1, [call("allreduce", 1, "tensor")])})
    assert "different" not in found and "went quiet first" in found

"""What a run left behind, read back; the arithmetic of its pictures; and the command that draws them."""

import csv
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from mpillm.cli.report import command, find_restarts, loss_rows, running_mean, timeline_rows
from mpillm.comm.recorder import Recorder
from mpillm.errors import ConfigError, DataError
from mpillm.files import to_json
from mpillm.plan import Plan
from mpillm.planner import timeline
from mpillm.report.chrome import trace_events
from mpillm.report.figures import KINDS, draw_loss, draw_timeline
from mpillm.report.planned import compare_with_plan, draw_both, planned_launch, planned_spans
from mpillm.report.records import Launch, Span, bubble, read_metrics, read_trace, step_shares
from mpillm.report.trace import Trace
from mpillm.schedules.pipeline import make_schedule

SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def header(rank, ranks):
    return {"rank": rank, "ranks": ranks, "coords": {"data": 0, "pipeline": rank, "tensor": 0}, "host": "n"}


def step_lines(step, begin, kinds=("data", "F", "B", "reduce", "update")):
    """Return a step's spans of one second each."""
    return [{"step": step, "kind": kind, "name": f"0{kind}0", "start_s": begin + at, "stop_s": begin + at + 1}
            for at, kind in enumerate(kinds)]


def write_lines(path, records, end=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end, encoding="utf-8")


def write_metrics(run, steps, **more):
    records = [{"step": step, "loss": 9.0 / step, "step_s": 30.0, **more} for step in steps]
    write_lines(run / "metrics.jsonl", records)


def play(schedule, begin=0.0):
    """Return the spans of a schedule whose actions last ``SECONDS`` and whose messages take no time."""
    done, clocks = {}, [begin] * schedule.num_ranks
    todo = [list(row) for row in schedule.actions]
    spans = [[] for _ in todo]
    while any(todo):
        for rank, actions in enumerate(todo):
            while actions:
                action = actions[0]
                before = (action.stage - 1, "F") if action.kind == "F" else (action.stage + 1, "B")
                source = (*before, action.microbatch)
                has_input = action.kind in "FBI" and 0 <= before[0] < schedule.num_stages
                if has_input and source not in done:
                    break
                start = max(clocks[rank], done[source] if has_input else begin)
                stop = clocks[rank] = start + SECONDS[action.kind]
                done[action.stage, action.kind.replace("I", "B"), action.microbatch] = stop
                spans[rank].append(Span(action.kind, str(actions.pop(0)), start, stop))
    return spans


@pytest.fixture
def run(tmp_path):
    """A run directory of 6 steps on 2 pipeline ranks, traced."""
    write_metrics(tmp_path, range(1, 7))
    for rank in range(2):
        records = [header(rank, 2)]
        for step in range(1, 7):
            begin = 100.0 * step
            spans = play(make_schedule("1f1b", 2, 4), begin + 1)[rank]
            spans = [Span("data", "batch", begin, begin + 1), *spans,
                     Span("update", "weights", begin + 17, begin + 18)]
            records += [{"step": step, **span._asdict()} for span in spans]
        write_lines(tmp_path / "trace" / f"rank-{rank:05d}.jsonl", records)
    return tmp_path


def invoke(*words):
    """Run the command; let its own errors through."""
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_metrics_come_by_step_the_later_of_two_and_without_a_torn_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = [(1, 5.0), (3, 4.0), (2, 4.5), (3, 3.0)]
    records = [{"step": step, "loss": loss, "step_s": 1.0} for step, loss in losses]
    write_lines(path, records, '{"step": 4, "lo')
    found = [(record["step"], record["loss"]) for record in read_metrics(path)]
    assert found == [(1, 5.0), (2, 4.5), (3, 3.0)]


@pytest.mark.parametrize("write", [to_json, json.dumps], ids=["JSON", "as before"])
def test_metrics_that_are_not_finite_come_back_as_they_were(tmp_path, write):
    path, wanted = tmp_path / "metrics.jsonl", {"step": 1, "loss": math.inf, "step_s": 1.0, "grad_norm": math.nan,
                                                "validation_loss": -math.inf}
    path.write_text(write(wanted) + "\n")
    (found,) = read_metrics(path)
    assert str(found) == str(wanted)  # NaN is not equal to itself


@pytest.mark.parametrize("text", ["", "{}", "\n", "[1]\n", '{"step": 1, "loss": null, "step_s": 1}\n', "x\n",
                                  '{"step": 1, "loss": 2.0}\n'])
def test_metrics_of_another_form_are_refused(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="metrics.jsonl"):
        read_metrics(path)


def test_a_trace_is_read_back_as_written(tmp_path):
    comm = SimpleNamespace(Barrier=lambda: None, bcast=lambda name: "a launch", allgather=lambda mine: [mine])
    traces = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, comm=comm)
        traces.append(Trace(tmp_path, SimpleNamespace(
            world=world, coord=lambda axis, rank=rank: rank, recorder=Recorder())))
    for step in (1, 2):
        for trace in traces:
            trace.begin_step(step)
            for kind, name in (("data", "batch"), ("F", "0F0"), ("update", "weights")):
                with trace.span(kind, name):
                    pass
            trace.end_step()
            with trace.span("evaluate", "validation"), trace.span("F", "0F7"):
                pass
    [launch] = read_trace(tmp_path)
    assert launch.coords == [{"data": rank, "pipeline": rank, "tensor": rank} for rank in range(2)]
    assert list(launch.steps) == [1, 2]
    for spans in launch.steps.values():
        assert [[span.name for span in own] for own in spans] == [["batch", "0F0", "weights"]] * 2


def test_a_trace_shows_only_steps_that_every_rank_completed(tmp_path):
    for rank in range(2):
        last = step_lines(4, 30) if rank else step_lines(4, 30)[:-1]
        steps = step_lines(2, 10) + step_lines(3, 20) + last
        write_lines(tmp_path / f"rank-{rank:05d}.jsonl", [header(rank, 2), *steps])
    [launch] = read_trace(tmp_path)
    assert list(launch.steps) == [2, 3]
    (tmp_path / "rank-00001.jsonl").unlink()
    assert read_trace(tmp_path) == []
    assert read_trace(tmp_path / "none") == []


def test_a_trace_has_a_launch_for_every_restart(tmp_path):
    """4 ranks, then 2 from step 2 on that were killed while writing, then 2 from step 4 on."""
    for rank in range(4):
        records = [header(rank, 4), *step_lines(1, 0), *step_lines(2, 10)]
        torn = ""
        if rank < 2:
            records += [header(rank, 2), *step_lines(2, 20), *step_lines(3, 30), *step_lines(4, 40)]
            again = [header(rank, 2), *step_lines(4, 0), *step_lines(5, 10)]
            torn = '{"step": 5, "ki' + "".join(json.dumps(record) + "\n" for record in again) + '{"step": 6'
        write_lines(tmp_path / f"rank-{rank:05d}.jsonl", records, torn)
    launches = read_trace(tmp_path)
    found = [(len(launch.coords), list(launch.steps)) for launch in launches]
    assert found == [(4, [1, 2]), (2, [2, 3, 4]), (2, [4, 5])]
    assert launches[-1].steps[4][1][0].start_s == 0
    metrics = [{"step": step} for step in range(1, 6)]
    assert find_restarts(metrics, launches) == [2, 4]


def test_a_launch_that_begins_again_replaces_the_earlier(tmp_path):
    records = [header(0, 1), *step_lines(1, 0), *step_lines(2, 10), header(0, 1), *step_lines(1, 50)]
    write_lines(tmp_path / "rank-00000.jsonl", records)
    [launch] = read_trace(tmp_path)
    assert list(launch.steps) == [1] and launch.steps[1][0][0].start_s == 50


def test_launches_with_names_are_never_mixed(tmp_path):
    """Two ranks, killed when only one had a first step; then both from the same step on."""
    for rank in range(2):
        first = [header(rank, 2) | {"launch": "one"}, *(step_lines(1, 0) if rank == 0 else [])]
        second = [header(rank, 2) | {"launch": "two"}, *step_lines(1, 9)]
        write_lines(tmp_path / f"rank-{rank:05d}.jsonl", [*first, *second])
    [launch] = read_trace(tmp_path)
    assert [own[0].start_s for own in launch.steps[1]] == [9, 9]


def test_launches_come_in_the_order_of_their_last_start(tmp_path):
    """Starts at steps 1, 3 and, from an earlier checkpoint by hand, 1 again."""
    starts = [step_lines(1, 0) + step_lines(2, 10), step_lines(3, 0), step_lines(1, 70)]
    records = [record for lines in starts for record in [header(0, 1), *lines]]
    write_lines(tmp_path / "rank-00000.jsonl", records)
    assert [list(launch.steps) for launch in read_trace(tmp_path)] == [[3], [1]]


@pytest.mark.parametrize("line", ["x", "[]", "3", '{"rank": 0}', '{"a": 1}', json.dumps(step_lines(1, 0)[0]),
                                  '{"step": 1, "kind": "F", "name": "0F0", "start_s": "soon", "stop_s": 1}'])
def test_a_trace_of_another_form_is_refused(tmp_path, line):
    (tmp_path / "rank-00000.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="rank-00000.jsonl, line 1"):
        read_trace(tmp_path)


def test_bubble_by_hand():
    """Rank 0 works 3 + 4 and rank 1 works 5 of the 10 seconds from 2 to 12; only actions count."""
    first = [Span("data", "batch", 0, 2), Span("F", "0F0", 2, 5), Span("wait", "wait 0B0", 5, 8),
             Span("B", "0B0", 8, 12)]
    second = [Span("I", "1I0", 6, 9), Span("W", "1W0", 9, 11), Span("reduce", "gradients", 11, 20)]
    share, idle = bubble([first, second])
    assert share == pytest.approx(0.4) and idle == pytest.approx([0.3, 0.5])
    assert bubble([[], first])[1] == pytest.approx([1.0, 0.3])
    assert bubble([[], []]) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("ranks, microbatches", [(1, 3), (2, 4), (4, 8), (3, 7)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_a_played_schedule_is_the_known_one(name, ranks, microbatches):
    share, _ = bubble(play(make_schedule(name, ranks, microbatches), begin=5.0))
    assert share == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_step_shares_by_hand():
    """Steps of 10 and 30 seconds; rank 1 ends the second early."""
    first = [[Span("F", "0F0", 0, 4), Span("update", "w", 4, 10)],
             [Span("wait", "w", 0, 2), Span("F", "1F0", 2, 10)]]
    second = [[Span("F", "0F0", 50, 66), Span("unheard", "w", 66, 80)], [Span("wait", "w", 50, 60)]]
    shares, step_s = step_shares([first, second])
    assert step_s == 20
    assert [list(own) for own in shares] == [list(KINDS)] * 2
    nothing = dict.fromkeys(KINDS, 0)
    assert shares[0] == pytest.approx(nothing | {"F": 20 / 40, "update": 6 / 40, "other": 14 / 40})
    assert shares[1] == pytest.approx(nothing | {"F": 8 / 40, "wait": 12 / 40, "other": 20 / 40})


def test_a_span_within_another_counts_once():
    own = [Span("B", "0B0", 0, 8), Span("reduce", "start of bucket 0", 2, 3), Span("wait", "w", 2.5, 3),
           Span("reduce", "start of bucket 1", 3, 4), Span("reduce", "gradients", 8, 10)]
    [shares], _ = step_shares([[own]])
    assert {kind: share for kind, share in shares.items() if share} == pytest.approx(
        {"B": 0.6, "reduce": 0.35, "wait": 0.05})


@pytest.mark.parametrize("size, reach", [(1, 0), (1, 3), (9, 0), (9, 1), (9, 3), (50, 7)])
def test_running_mean_is_the_plain_one(size, reach):
    values = np.random.default_rng(size).normal(size=size)
    wanted = [values[at - min(at, reach):at + min(at, reach) + 1].mean() for at in range(size)]
    assert running_mean(values.tolist(), reach) == pytest.approx(wanted)


def test_running_mean_leaves_out_what_is_not_finite():
    means = running_mean([1.0, 2.0, math.nan, 5.0, math.inf, 7.0], 1)
    assert means == pytest.approx([1.0, 1.5, 3.5, 5.0, 6.0, 7.0])
    assert math.isnan(running_mean([math.nan, 1.0], 1)[0])


def test_restarts_are_where_steps_are_missing_or_a_traced_launch_begins():
    metrics = [{"step": step} for step in (11, 12, 14, 15, 16)]
    launches = [Launch([], {number: [] for number in numbers}) for numbers in ([11, 12], [16, 17], [20])]
    assert find_restarts(metrics, launches) == [14, 16]
    assert find_restarts(metrics[:2], []) == []
    assert find_restarts([{"step": step} for step in (5, 10, 15, 25, 30, 32)], []) == [25]  # one line for five steps


def test_loss_rows_add_up_minutes():
    metrics = [{"step": 1, "loss": 4.0, "step_s": 90.0},
               {"step": 2, "loss": 3.0, "step_s": 30.0, "validation_loss": 3.5, "bits_per_byte": 2.0}]
    first, second = loss_rows(metrics)
    assert first == {"step": 1, "minutes": 1.5, "loss": 4.0, "loss_smoothed": 4.0, "validation_loss": None,
                     "bits_per_byte": None}
    assert (second["minutes"], second["validation_loss"], second["bits_per_byte"]) == (2.0, 3.5, 2.0)


def test_command_draws_all_with_data(run):
    output = invoke(run)
    for name in ("loss", "timeline", "step_time"):
        assert f"{run / 'figures' / name}.png" in output
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (run / "figures" / f"{name}.svg").read_text()
    losses = rows_of(run / "figures" / "loss.csv")
    assert [(int(row["step"]), float(row["loss"]), float(row["minutes"])) for row in losses] == [
        (step, 9.0 / step, step / 2) for step in range(1, 7)]
    timeline = rows_of(run / "figures" / "timeline.csv")
    assert timeline[0] == {"rank": "0", "kind": "data", "name": "batch", "start_s": "0.0", "stop_s": "1.0"}
    assert len(timeline) == 2 * (8 + 2)
    for row in rows_of(run / "figures" / "step_time.csv"):
        assert float(row["F"]) == pytest.approx(4 / 18) and float(row["B"]) == pytest.approx(8 / 18)
        assert float(row["step_s"]) == 18
        assert sum(float(row[kind]) for kind in KINDS) == pytest.approx(1)


def test_command_takes_a_step_and_a_folder(run, tmp_path):
    invoke(run, "-o", tmp_path / "elsewhere" / "deep", "--step", "2")
    assert not (run / "figures").exists()
    assert (tmp_path / "elsewhere" / "deep" / "timeline.png").exists()
    with pytest.raises(DataError, match="--step 7.*1 to 6"):
        invoke(run, "--step", "7")


def test_command_shows_the_newest_launch_and_averages_without_its_first_step(tmp_path):
    """Step 2 was done twice; the second launch took 9, 5 and 5 seconds a step."""
    write_metrics(tmp_path, range(1, 5))
    records = [header(0, 1), *step_lines(1, 0), *step_lines(2, 10, ("F", "update")), header(0, 1)]
    records += step_lines(2, 0, ("data", *"FFFBBB", "reduce", "update"))
    records += step_lines(3, 10) + step_lines(4, 20)
    write_lines(tmp_path / "trace" / "rank-00000.jsonl", records)
    invoke(tmp_path)
    [shares] = rows_of(tmp_path / "figures" / "step_time.csv")
    assert float(shares["step_s"]) == 5 and float(shares["F"]) == pytest.approx(1 / 5)
    assert len(rows_of(tmp_path / "figures" / "timeline.csv")) == 5
    invoke(tmp_path, "--step", "2")
    assert len(rows_of(tmp_path / "figures" / "timeline.csv")) == 9


def test_command_draws_what_there_is(tmp_path):
    write_metrics(tmp_path, [1, 2], validation_loss=3.0, bits_per_byte=2.0)
    output = invoke(tmp_path)
    assert "no complete step" in output and "train.trace = true" in output
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["loss.csv", "loss.png", "loss.svg"]
    with pytest.raises(DataError, match="--step 1.*none"):
        invoke(tmp_path, "--step", "1")


def test_command_refuses_what_is_no_run(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    problems = {"none": "no such directory", "file": "not a directory", "empty": "no metrics.jsonl",
                "new": "holds no metrics yet"}
    for name, problem in problems.items():
        with pytest.raises(DataError, match=problem) as caught:
            invoke(tmp_path / name)
        assert caught.value.exit_code == 74 and name in str(caught.value)


def test_command_says_what_it_cannot_write(run):
    (run / "figures").touch()
    with pytest.raises(DataError, match="cannot be written"):
        invoke(run)


def test_command_says_how_to_get_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install mpillm\[plot\]"):
        invoke(run)


def test_command_needs_neither_mpi_nor_torch_and_imports_matplotlib_late():
    script = "import sys, mpillm.cli.report; print({'torch', 'mpi4py', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_timeline_says_bubble_and_idle_and_numbers_microbatches(run):
    [launch] = read_trace(run / "trace")
    [axes] = draw_timeline(launch, 3).axes
    texts = [text.get_text() for text in axes.texts]
    assert axes.get_title(loc="left") == "Step 3: 18 s, bubble 20.0 %"
    assert texts.count("20.0 %") == 2 and all(texts.count(str(number)) == 4 for number in range(4))
    begins = {bar.vertices[0, 0] for patch in axes.collections for bar in patch.get_paths()}
    assert begins == {row["start_s"] for row in timeline_rows(launch.steps[3])}


def test_timeline_leaves_out_numbers_that_do_not_fit():
    spans = play(make_schedule("gpipe", 2, 100))
    launch = Launch([{"data": 0, "pipeline": rank, "tensor": 0} for rank in range(2)], {1: spans})
    [axes] = draw_timeline(launch, 1).axes
    assert {text.get_text() for text in axes.texts} == {"idle", "1.0 %"}


def test_loss_has_a_second_panel_only_when_evaluated():
    metrics = [{"step": step, "loss": 1.0, "step_s": 1.0} for step in (1, 2, 4)]
    assert len(draw_loss(loss_rows(metrics), [4]).axes) == 1
    metrics[1] |= {"validation_loss": 2.0, "bits_per_byte": 1.25}
    top, bottom = draw_loss(loss_rows(metrics), [4]).axes
    marks = [axes.collections[0].get_paths()[0].vertices[0, 0] for axes in (top, bottom)]
    assert marks == pytest.approx([3.5, 2 / 60])
    assert [text.get_text() for text in bottom.texts] == ["1.250"]
    del metrics[1]["bits_per_byte"]  # of tokens that are no text
    [only] = draw_loss(loss_rows(metrics)).axes
    assert {line.get_label(): list(line.get_ydata()) for line in only.lines}["validation"] == [2.0]


def test_a_plan_is_drawn_and_compared_as_a_trace():
    """Of both a rank that has done its actions waits in ``reduce``: here the second, for 0.2 s."""
    predicted = {"step_s": 1.7, "pipeline_s": 1.2, "gradients_s": 0.3, "update_s": 0.2}
    launch = planned_launch(timeline.play(make_schedule("1f1b", 2, 3), 0.1, 0.1, 0.1), predicted)
    planned = launch.steps["predicted"]
    for own in planned:
        assert all(first.stop_s == pytest.approx(second.start_s) for first, second in zip(own, own[1:]))
        assert own[-1].stop_s - own[0].start_s == pytest.approx(0.3 * 3 + 0.3 + 0.5)
    metrics = [{"step_s": 9.0}, {"step_s": 1.0}, {"step_s": 4.0}, {"step_s": 2.5}]
    found = compare_with_plan(predicted, metrics, [{"reduce": 0.2, "update": 0.08}, {}], planned)
    rows = {row["phase"]: row for row in found}
    assert rows["step"]["measured_s"] == 2.5 and rows["step"]["error"] == pytest.approx(1.7 / 2.5 - 1)
    assert rows["gradients"]["measured_s"] == 0.25 and rows["update"]["error"] == pytest.approx(1.0)
    assert rows["pipeline"]["measured_s"] == pytest.approx(2.15)
    expected = {"gradients": 0.4, "update": 0.2, "pipeline": 1.1}
    assert {phase: rows[phase]["predicted_s"] for phase in expected} == pytest.approx(expected)
    assert [row["phase"] for row in compare_with_plan(predicted, metrics)] == ["step"]


def test_buckets_under_way_are_drawn_beside_the_actions():
    buckets = [[timeline.BucketTimes(8, 0.05, 0.2, 0.0)], [timeline.BucketTimes(8, 0.0, 0.1, 0.0)]]
    played = timeline.play(make_schedule("1f1b", 2, 1), 0.1, 0.1, 0.1, buckets=buckets)
    predicted = {"gradients_s": played.reduced_s - played.total_s, "update_s": 0.2}
    first, second = planned_launch(played, predicted).steps["predicted"]
    under_way = [(round(s.start_s, 3), round(s.stop_s, 3)) for s in first + second if s.kind == "transfer"]
    assert under_way == [(0.55, 0.75), (0.4, 0.5)]
    assert [s.stop_s for own in (first, second) for s in own if s.kind == "reduce"] == pytest.approx([0.75, 0.75])


def test_what_was_sent_is_told_beside_what_was_planned(run):
    """Both ranks send 5 and then 10 bytes a step; the plan knows of the first, and of something that nobody sends."""
    for rank in range(2):
        path = run / "trace" / f"rank-{rank:05d}.jsonl"
        sent = [{"step": step, "sent": [["pipeline", "send", 5], ["world", "allreduce", 10], ["data", "bcast", 0]]}
                for step in range(1, 7)]
        path.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in sent))
    volume = [{"axis": axis, "operation": operation, "bytes": n_bytes}
              for axis, operation, n_bytes in (("pipeline", "send", 10), ("tensor", "bcast", 1))]
    predicted = {"step_s": 20.0, "pipeline_s": 17.0, "gradients_s": 0.0, "update_s": 1.0, "volume": volume}
    Plan(2, 1, predicted=predicted).save(run / "plan.json")
    output = invoke(run)
    rows = rows_of(run / "figures" / "volume.csv")
    rows = [(row["axis"], row["planned_bytes"], row["counted_bytes"]) for row in rows]
    assert rows == [("world", "0", "20"), ("pipeline", "10", "10"), ("tensor", "1", "0")]
    lines = [line for line in output.splitlines() if line.startswith("  ")]
    assert [line.endswith("differs") for line in lines] == [True, False, True]


def test_planned_lies_above_measured_on_one_axis():
    planned = timeline.play(make_schedule("1f1b", 2, 3), 0.1, 0.1, 0.1)
    predicted = {"step_s": 2.0, "pipeline_s": 1.5, "gradients_s": 0.3, "update_s": 0.2}
    measured = planned_launch(timeline.play(make_schedule("1f1b", 2, 3), 0.2, 0.2, 0.2), predicted).steps["predicted"]
    coords = [{"data": 0, "pipeline": rank, "tensor": 0} for rank in range(2)]
    [axes] = draw_both(planned_spans(planned, predicted, coords), Launch(coords, {4: measured}), 4).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 planned", "1 planned", "0 measured",
                                                                      "1 measured"]
    assert "planned 1.7 s" in axes.get_title(loc="left") and "measured 2.9 s" in axes.get_title(loc="left")


def test_the_data_of_the_picture_has_the_planned_and_the_measured_spans(run):
    stages = {"forward_s": [1.0, 1.0], "input_s": [1.0, 1.0], "weight_s": [0.5, 0.5], "message_s": 0.0,
              "microbatches": 4}
    predicted = {"step_s": 14.0, "pipeline_s": 12.5, "gradients_s": 0.5, "update_s": 1.0, "stages": stages}
    Plan(2, 1, layout={"schedule": "1f1b", "pipeline": 2, "chunks": 1}, predicted=predicted).save(run / "plan.json")
    invoke(run)
    rows = rows_of(run / "figures" / "planned.csv")
    measured = [row for row in rows if row.pop("origin") == "measured"]
    assert measured == rows_of(run / "figures" / "timeline.csv")
    planned = [(row["rank"], row["name"], float(row["start_s"]), float(row["stop_s"]))
               for row in rows if row not in measured]
    assert ("0", "0F0", 0.0, 1.0) in planned and ("1", "1F0", 1.0, 2.0) in planned
    assert ("1", "weights", 13.0, 14.0) in planned and ("0", "0B0", 3.5, 5.0) in planned


def test_a_chrome_trace_has_every_span_of_every_rank():
    spans = [[Span("F", "0F0", 1.0, 1.5), Span("wait", "message", 1.5, 1.75)], [Span("reduce", "gradients", 1.25, 2.0)]]
    launch = Launch([{"data": 0, "pipeline": rank, "tensor": 0} for rank in range(2)], {3: spans})
    events = trace_events(launch)["traceEvents"]
    assert [(e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        (0, 0, 0.0, 5e5), (0, 1, 5e5, 2.5e5), (1, 2, 2.5e5, 7.5e5)]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "rank 0 (data 0 pipeline 0 tensor 0)", "rank 1 (data 0 pipeline 1 tensor 0)"}


def test_reductions_on_their_way_are_beside_all_else():
    own = [Span("B", "0B0", 1.0, 2.0), Span("transfer", "bucket 0", 1.25, 2.5), Span("transfer", "bucket 1", 1.5, 2.25),
           Span("update", "weights", 2.5, 3.0)]
    launch = Launch([{"data": 0, "pipeline": 0, "tensor": 0}], {3: [own]})
    events = [e for e in trace_events(launch)["traceEvents"] if e["ph"] in "be"]
    assert [(e["ph"], e["name"], e["ts"]) for e in events] == [
        ("b", "bucket 0", 2.5e5), ("e", "bucket 0", 1.5e6), ("b", "bucket 1", 5e5), ("e", "bucket 1", 1.25e6)]
    assert len({e["id"] for e in events}) == 2
    [shares], step_s = step_shares([[own]])
    assert step_s == 2 and shares["other"] == pytest.approx(0.25) and shares["reduce"] == 0
    [axes] = draw_timeline(launch, 3).axes
    lows = sorted(round(bars.get_paths()[0].get_extents().y0, 2) for bars in axes.collections)
    assert lows == [-0.42, -0.42, 0.42]


def test_a_recorder_knows_what_a_rank_is_in():
    recorder, kinds = Recorder(), []
    for name, *arguments in (("begin_step", 3), ("begin", "F", "0F0"), ("end", "F"), ("end_step",),
                             ("begin", "evaluate", "validation"), ("begin", "F", "0F1"), ("end", "F"),
                             ("end", "evaluate")):
        before = recorder.beats
        getattr(recorder, name)(*arguments)
        kinds.append(recorder.kind)
        assert recorder.beats > before
    assert kinds == ["between", "F", "between", "resting", "evaluate", "F", "evaluate", "resting"]
    assert recorder.ended == {"F", "evaluate"}
    assert [call["name"] for call in recorder.last] == ["0F0", "validation", "0F1"]


def test_own_work_is_spans_without_collectives_and_without_spans_within(monkeypatch):
    now, recorder = [0.0], Recorder()
    monkeypatch.setattr("mpillm.comm.recorder.time.perf_counter", lambda: now[0])

    def spend(seconds, in_collective=0.0):
        now[0] += seconds
        recorder.collective_s += in_collective

    spend(1.0)  # between spans: nobody's
    recorder.begin("F", "0F0")
    spend(5.0, in_collective=3.0)
    recorder.end("F")
    recorder.begin("evaluate", "validation")
    recorder.begin("F", "0F1")
    spend(7.0)
    recorder.end("F")
    recorder.end("evaluate")
    assert recorder.own_s == {"F": 2.0, "evaluate": 7.0}

"""Pipeline schedules in PyTorch's CSV: what its own classes write is read, and what is written its own parser reads.

PyTorch's validation and its lowering to messages are the oracle for what mpillm writes.
"""

import csv
import itertools

import pytest
from click.testing import CliRunner
from pytorch_schedules import made_by_pytorch
from tiny import tiny

from mpillm.cli.simulate import command
from mpillm.errors import ConfigError, ScheduleError
from mpillm.planner.timeline import play
from mpillm.schedules import SCHEDULES, make_schedule
from mpillm.schedules.check import check
from mpillm.schedules.formats import read_schedule, write_schedule

LOOPED = {"ScheduleInterleaved1F1B": 3, "ScheduleLoopedBFS": 3, "ScheduleInterleavedZeroBubble": 1}
SHORT, LONG = "compute_only", "compute_comms"
ROWS = "0F0,0F1,,,0B0,,,0B1\n,1F0,1B0,,1F1,1B1\n"


def all_made(name):
    """Yield what PyTorch makes at 2 and 4 ranks, with the sizes."""
    for ranks, chunks in itertools.product((2, 4), (1, 2, 3)):
        for microbatches in range(1, 3 * ranks + 2):
            try:
                yield made_by_pytorch(name, ranks, microbatches, chunks), ranks, chunks, microbatches
            except ValueError as error:
                assert "multiple of the number of rounds" in str(error)


def orders(rows):
    """Return the order of every rank's actions as text, without the steps in which it waits."""
    return [[str(action) for action in rows[rank] if action is not None] for rank in sorted(rows)]


def orders_of(schedule):
    return [list(map(str, row)) for row in schedule.actions]


@pytest.mark.parametrize("name, count", [
    ("ScheduleInterleaved1F1B", 45), ("ScheduleLoopedBFS", 60), ("ScheduleInterleavedZeroBubble", 45)])
def test_all_that_pytorch_makes_is_read_played_and_written(name, count, tmp_path):
    path, every = tmp_path / "made by #1.csv", list(all_made(name))
    assert len(every) == count
    for made, ranks, chunks, microbatches in every:
        made._dump_csv(path, SHORT)
        schedule = read_schedule(str(path))
        assert orders_of(schedule) == orders(made.pipeline_order) and schedule.name == "made-by-1"
        assert (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches) == (ranks, ranks * chunks, microbatches)
        made._dump_csv(path, LONG)
        assert read_schedule(str(path)) == schedule
        check(schedule)
        if microbatches >= ranks:  # a pipeline that fills
            idle = LOOPED[name] * (ranks - 1)
            assert play(schedule, 1.0, 1.0, 1.0).bubble_fraction == pytest.approx(idle / (idle + 3 * chunks * microbatches))
        write_schedule(path, schedule)
        again = made_by_pytorch(name, ranks, microbatches, chunks)
        again.pipeline_order = {}
        again._load_csv(path, SHORT)
        assert orders(again.pipeline_order) == orders(made.pipeline_order)
        assert again.pipeline_order_with_comms == made.pipeline_order_with_comms
        assert read_schedule(str(path)) == schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_pytorch_takes_all_that_mpillm_makes(name, tmp_path):
    """Its validation, and its lowering to messages."""
    path = tmp_path / f"{name}.csv"
    for ranks, microbatches, chunks in itertools.product((1, 2, 3, 4), (1, 3, 4, 9), (1, 2)):
        if chunks == 1 or name in ("gpipe", "interleaved"):
            schedule = make_schedule(name, ranks, microbatches, chunks)
            write_schedule(path, schedule)
            theirs = made_by_pytorch("ScheduleLoopedBFS", ranks, microbatches, chunks)
            theirs._load_csv(path, SHORT)
            assert orders(theirs.pipeline_order) == orders_of(schedule)
            theirs._dump_csv(path, LONG)
            assert read_schedule(str(path)) == schedule


def test_a_cell_is_a_step_as_the_checker_plays_it(tmp_path):
    path = tmp_path / "1f1b.csv"
    write_schedule(path, make_schedule("1f1b", 2, 2))
    assert path.read_text() == ROWS


def test_schedules_of_one_stage_a_rank(tmp_path):
    """PyTorch 2.13 lists their actions, but does not write them; in its list of 1F1B forwards are misnumbered."""
    path = tmp_path / "gpipe.csv"
    made = made_by_pytorch("ScheduleGPipe", 4, 5)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(made.pipeline_order.values())
    assert read_schedule(str(path)) == make_schedule("gpipe", 4, 5)


@pytest.mark.parametrize("name", ["ScheduleZBVZeroBubble", "ScheduleDualPipeV"])
def test_other_placements_of_stages_are_refused(name, tmp_path):
    path = tmp_path / "v.csv"
    made_by_pytorch(name, 2, 4, 2)._dump_csv(path, SHORT)
    with pytest.raises(ScheduleError) as error:
        read_schedule(str(path))
    assert str(error.value) == (
        f"schedule {path}: row 1, cell 4: 3F0 puts stage 3 on rank 0; of 2 ranks (rows) only rank 1 can hold it, that is "
        "stage % ranks: take a schedule that places its stages so")


@pytest.mark.parametrize("old, new, words", [
    ("1F1,1B1", "(1F1;1B1)OVERLAP_F_B", ["row 2, cell 5: (1F1;1B1)OVERLAP_F_B", "at a time", "a cell of its own"]),
    ("1B0", "1G0", ["row 2, cell 3", '"1G0"', "as in 2F0"]),
    ("1B0", "1F", ["row 2, cell 3", '"1F"']),
    ("0F1,", "0F1;", ["row 1, cell 2", '"0F1;"']),
    ("0F1,", "0F1 0B0,", ["row 1, cell 2", '"0F1 0B0"']),
    ("0F0", "rank 0", ["row 1, cell 1", '"rank 0"']),
    ("0F0", "0SEND_X0", ["row 1, cell 1", '"0SEND_X0"']),
    ("0F0", '"0F0', ["no CSV", "unexpected end"]),
    ("0F0", "9" * 200_000, ["no CSV", "131072"]),
    ("1B1\n", "1B1\n\n", ["row 3", "remove the row"]),
    ("1B1\n", "1B1\n,,,0SEND_F0\n", ["row 3", "remove the row"]),
    ("0F0", "4F0", ["stages=5", "ranks must divide stages"]),
    (ROWS, "", ["ranks=0", "at least one"]),
])
def test_a_broken_file_is_refused_with_row_and_cell(old, new, words, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(ROWS.replace(old, new))
    with pytest.raises(ScheduleError) as error:
        read_schedule(str(path))
    assert str(error.value).startswith(f"schedule {path}: ")
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value)) < len(str(path)) + 250


def test_text_is_told_by_file_too(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("schedule=mine ranks=1 stages=1 microbatches=1\nrank 0: 0F0 0X0\n")
    with pytest.raises(ScheduleError, match=f'schedule {path}: line 2: action "0X0"'):
        read_schedule(str(path))


def test_a_schedule_that_cannot_run_is_not_written(tmp_path):
    schedule = make_schedule("1f1b", 2, 2)
    object.__setattr__(schedule, "actions", schedule.actions[:1] + (schedule.actions[1][1:],))
    with pytest.raises(ScheduleError, match="1F0"):
        write_schedule(tmp_path / "mine.csv", schedule)
    assert not list(tmp_path.iterdir())


def simulate(*words):
    times = ["--forward-ms", "10", "--backward-input-ms", "10", "--backward-weight-ms", "10"]
    return CliRunner().invoke(command, ["pipeline", "--pipeline", "2", *times, *map(str, words)], catch_exceptions=False)


def test_simulate_reads_and_writes_it(tmp_path):
    theirs, ours = tmp_path / "theirs.csv", tmp_path / "ours.csv"
    made_by_pytorch("ScheduleInterleavedZeroBubble", 2, 4, 2)._dump_csv(theirs)
    found = simulate("--schedule", theirs, "--microbatches", 4, "--chunks", 2, "-o", ours)
    assert "2 ranks, 4 microbatches: 125.000 ms, bubble 4.00 %" in found.output
    assert read_schedule(str(ours)).actions == read_schedule(str(theirs)).actions
    simulate("--schedule", "zb-h2", "--microbatches", 4, "-o", ours)
    assert read_schedule(str(ours)).actions == make_schedule("zb-h2", 2, 4).actions
    with pytest.raises(ConfigError, match="is for 2 ranks, 4 stages, 4 microbatches; this layout needs 2, 2 and 4"):
        simulate("--schedule", theirs, "--microbatches", 4)


def test_a_layout_takes_it_and_has_as_many_stages(tmp_path):
    path = tmp_path / "theirs.csv"
    made_by_pytorch("ScheduleInterleaved1F1B", 2, 3, 3)._dump_csv(path)
    config = tiny({"layout.pipeline": 2, "layout.schedule": str(path), "train.global_batch": 6}, 2)
    assert config.layout.chunks == 3

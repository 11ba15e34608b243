"""Pipeline schedules in files: mpillm's own text, and PyTorch's CSV where the name of the file ends in ``.csv``.

``torch.distributed.pipelining`` writes a row a rank and an action a cell, and leaves cells empty where the rank waits. Its
longer form has cells for messages and for sharded weights as well. Both follow from the order of the actions, so they are
passed over.
"""

import csv
import re
from pathlib import Path

from mpillm.errors import ConfigError, ScheduleError
from mpillm.files import write_text
from mpillm.schedules.check import check, start_steps
from mpillm.schedules.pipeline import SCHEDULES, Action, PipelineSchedule, make_schedule

PASSED_OVER = re.compile(r"|\d+((SEND|RECV)_[FB]|UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def named_or_read(name, num_ranks, num_microbatches, chunks=1):
    """Make one of the named schedules, or read the file of that name or ``name`` itself (:func:`read_schedule`), which
    must have these sizes.

    Local; parameters and errors as for :func:`make_schedule`.
    """
    if name in SCHEDULES:
        return make_schedule(name, num_ranks, num_microbatches, chunks)
    schedule = read_schedule(name)
    found = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    needed = (num_ranks, num_ranks * chunks, num_microbatches)
    if found != needed:
        raise ConfigError(
            f"schedule {label(name)}: is for {found[0]} ranks, {found[1]} stages, {found[2]} microbatches; this layout needs "
            f"{needed[0]}, {needed[1]} and {needed[2]}"
        )
    return schedule


def label(name):
    """Return what a schedule is called in a line: its name or path; of one that a plan holds as text "synthesised"."""
    return "synthesised" if "\n" in name else name


def read_schedule(path):
    """Read a schedule from a file, or from ``path`` itself where that is the text of one, as plans hold them.

    Local. A schedule from a CSV file has the file's name.

    Raises
    ------
    ConfigError
        When the file cannot be read.
    ScheduleError
        When it holds no schedule, or one with stages on other ranks than ``stage % ranks``.
    """
    try:
        if "\n" in path:
            return PipelineSchedule.from_text(path)
        text = Path(path).read_text(encoding="utf-8")
        return from_csv(text, re.sub(r"[\s#]+", "-", Path(path).stem)) if is_csv(path) else PipelineSchedule.from_text(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'schedule "{path}": neither one of {", ".join(SCHEDULES)} nor a file that can be read ({error})') from None
    except ScheduleError as error:
        raise ScheduleError(f"schedule {label(path)}: {error}") from None


def write_schedule(path, schedule):
    """Write a schedule that can run to a file, in the form that its name says. Local."""
    write_text(path, to_csv(schedule) if is_csv(path) else schedule.to_text())


def is_csv(path):
    """Tell whether a file is in PyTorch's form. Local."""
    return Path(path).suffix == ".csv"


def from_csv(text, name):
    """Read a schedule, to be called ``name``, from PyTorch's CSV: :class:`ScheduleError` with row and cell where it is none.

    Local.
    """
    try:
        rows = list(csv.reader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise ScheduleError(f"no CSV: {error}") from None
    actions = [tuple(_parse_row(row, rank, len(rows))) for rank, row in enumerate(rows)]
    every = [action for row in actions for action in row]
    num_stages = max((action.stage for action in every), default=-1) + 1
    num_microbatches = max((action.microbatch for action in every), default=-1) + 1
    return PipelineSchedule(name, len(rows), num_stages, num_microbatches, tuple(actions))


def to_csv(schedule):
    """Return a schedule as PyTorch's CSV, with a column for every step that the checker plays; it must pass the checker.

    Local.
    """
    check(schedule)
    lines = []
    for row, starts in zip(schedule.actions, start_steps(schedule)):
        cells = [""] * (starts[-1] + 1)
        for action, step in zip(row, starts):
            cells[step] = str(action)
        lines.append(",".join(cells) + "\n")
    return "".join(lines)


def _parse_row(row, rank, num_ranks):
    """Yield the actions in the cells of a rank."""
    action = None
    for number, cell in enumerate(map(str.strip, row), 1):
        if PASSED_OVER.fullmatch(cell):
            continue
        try:
            action = _parse_cell(cell, rank, num_ranks)
        except ScheduleError as error:
            raise ScheduleError(f"row {rank + 1}, cell {number}: {error}") from None
        yield action
    if action is None:
        raise ScheduleError(f"row {rank + 1}: no action in it, and every row is a rank, which must have some: remove the row")


def _parse_cell(cell, rank, num_ranks):
    """Read an action, which must be of a stage that lives on the rank."""
    if cell.endswith("OVERLAP_F_B"):
        raise ScheduleError(f"{cell[:80]} runs a forward and a backward at once, and a rank runs one action at a time: give "
                            "each a cell of its own")
    action = Action.parse(cell)
    home = action.stage % num_ranks
    if home != rank:
        raise ScheduleError(f"{action} puts stage {action.stage} on rank {rank}; of {num_ranks} ranks (rows) only rank {home} "
                            "can hold it, that is stage % ranks: take a schedule that places its stages so")
    return action

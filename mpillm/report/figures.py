"""Pictures of a run: reads ``metrics.jsonl`` and ``trace/``; draws losses, a step's timeline, its shares.

Reading and arithmetic come first. The functions ``draw_...`` import matplotlib (:class:`ConfigError` if it is
missing) and make one figure each: 5 inches wide, to be read at 3.3 inches as well as over a page, in the
colours of Okabe and Ito (2008), which colour-blind people can tell apart.
"""

import functools
import json
from collections import namedtuple
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from mpillm.errors import ConfigError, DataError
from mpillm.schedules.pipeline import KINDS as ACTIONS
from mpillm.schedules.pipeline import Action

KINDS = {  # kind: colour, legend
    "F": ("#0072B2", "F forward"), "B": ("#E69F00", "B backward"), "I": ("#009E73", "I input gradients"),
    "W": ("#CC79A7", "W weight gradients"), "wait": ("#E4E4E4", "wait"), "reduce": ("#F0E442", "reduce"),
    "update": ("#D55E00", "update"), "data": ("#56B4E9", "data"), "other": ("#FFFFFF", "other"),
}
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "axes.linewidth": 0.6,
         "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.4, "xtick.labelsize": 8,
         "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False}
WIDTH_IN, ROW_IN, POINTS_PER_IN = 5.0, 0.3, 72
LINE, LIGHT_LINE, POINT, GREY, LIGHT_GREY = "#0072B2", "#9CC7E2", "#D55E00", "#777777", "#AAAAAA"

Span = namedtuple("Span", "kind name start_s stop_s")


@dataclass(frozen=True)
class Launch:
    """One start of a traced run.

    Attributes
    ----------
    coords : list of dict
        By rank: its place on each axis of the mesh.
    steps : dict of int to list of list of Span
        By number, the steps that all ranks completed; by rank, a step's spans in order, without the
        evaluation and the saving between steps.
    """

    coords: list
    steps: dict


def read_metrics(path):
    """Return the records of a ``metrics.jsonl`` by ascending step; of two with one step, the later.

    Local.

    Raises
    ------
    DataError
        When the file is missing, holds no complete line, or is not of this form.
    """
    records = {}
    for where, line in _lines(path):
        try:
            record = json.loads(line)
            records[int(record["step"])] = record | {key: float(record[key]) for key in ("loss", "step_s")}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where}: no step, loss and step_s: is this the file of a run?") from None
    if not records:
        raise DataError(f"{path}: holds no metrics yet: draw the run after its first step")
    return [records[step] for step in sorted(records)]


def read_trace(folder):
    """Return the launches that completed traced steps, oldest first.

    Local. Of launches with as many ranks that began at the same step, only the last is there.

    Parameters
    ----------
    folder : Path
        With the files of :class:`mpillm.report.trace.Trace`. There need not be any.

    Returns
    -------
    list of Launch

    Raises
    ------
    DataError
        When a file is not a trace.
    """
    found = {}
    # Rank 0 comes last and so decides the order: every launch has one, higher ranks may be of older launches.
    for path in sorted(Path(folder).glob("rank-*.jsonl"), reverse=True):
        for header, steps in _sections(path):
            if steps:
                key = header["ranks"], min(steps)
                found[key] = found.pop(key, {}) | {header["rank"]: (header["coords"], steps)}
    launches = []
    for (ranks, _), sections in found.items():
        if all(rank in sections for rank in range(ranks)):
            coords, steps = zip(*(sections[rank] for rank in range(ranks)))
            launches.append(Launch(list(coords), _complete(steps)))
    return [launch for launch in launches if launch.steps]


def _lines(path):
    """Yield a file's complete lines, each after its place; one without its end is still being written."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            yield f"{path}, line {number}", line


def _sections(path):
    """Return ``[(header, {step: spans})]`` of one rank's file, a section for each launch."""
    sections = []
    for where, line in _lines(path):
        try:
            # A rank that was killed leaves a torn line, and the next launch's header follows on it.
            record = json.loads(line[max(0, line.rfind('{"rank"')):])
            if "rank" in record:
                sections.append(({key: record[key] for key in ("rank", "ranks", "coords")}, {}))
            else:
                times = float(record["start_s"]), float(record["stop_s"])
                span = Span(record["kind"], record["name"], *times)
                sections[-1][1].setdefault(record["step"], []).append(span)
        except (ValueError, KeyError, TypeError, IndexError):
            raise DataError(f"{where}: not a line of a trace: move the file away, or train anew") from None
    return sections


def _complete(steps):
    """Return ``{step: spans by rank}`` of the steps that every rank brought to its update."""
    numbers = sorted(set.intersection(*map(set, steps)))
    common = {number: [_within_step(own[number]) for own in steps] for number in numbers}
    return {number: spans for number, spans in common.items()
            if all("update" in {span.kind for span in own} for own in spans)}


def _within_step(spans):
    """Return a step's spans from the end of the evaluation and saving that are recorded ahead of it."""
    begin = max((span.stop_s for span in spans if span.kind in ("evaluate", "save")), default=float("-inf"))
    return sorted((span for span in spans if span.start_s >= begin), key=lambda span: span.start_s)


def bubble(spans):
    """Return the bubble of a step, and how idle each rank is in it.

    Local. Between the first start and the last end of the actions ``F B I W`` of all ranks, a rank idles
    while it is in none of its own. The bubble is the idle share of all ranks' time: the mean over ranks.

    Parameters
    ----------
    spans : list of list of Span
        By rank.

    Returns
    -------
    (float, list of float)
        Shares from 0 to 1: the bubble, and by rank.
    """
    actions = [[span for span in own if span.kind in ACTIONS] for own in spans]
    if not any(actions):
        return 0.0, [0.0] * len(spans)
    begin, end = _window(actions)
    idle = [1 - _seconds(own) / (end - begin) for own in actions]
    return sum(idle) / len(idle), idle


def step_shares(steps):
    """Return by rank the share of step time that each kind takes on average, and the mean time of a step.

    Local. A step lasts from the first start to the last end of any rank's spans; what a rank spends in no
    span, such as ending early, is ``other``.

    Parameters
    ----------
    steps : list of list of list of Span
        By step and rank.

    Returns
    -------
    (list of dict of str to float, float)
        By rank, kind to share in the order of ``KINDS``; seconds.
    """
    total_s = sum(end - begin for begin, end in map(_window, steps))
    shares = []
    for own in zip(*steps):
        spans = [span for step in own for span in step]
        row = {kind: _seconds(s for s in spans if s.kind == kind) / total_s for kind in KINDS}
        shares.append(row | {"other": max(0.0, 1 - sum(row.values()))})
    return shares, total_s / len(steps)


def _seconds(spans):
    return sum(span.stop_s - span.start_s for span in spans)


def _window(spans):
    """Return the first start and the last end of all ranks' spans."""
    return min(s.start_s for own in spans for s in own), max(s.stop_s for own in spans for s in own)


def _styled(draw):
    """Let ``draw`` use matplotlib, in the project's style."""

    @functools.wraps(draw)
    def drawn(*arguments, **options):
        try:
            import matplotlib
        except ImportError:
            raise ConfigError("drawing needs matplotlib, not found here: pip install mpillm[plot]") from None
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return drawn


@_styled
def draw_loss(rows, restarts=()):
    """Return the figure of losses over steps and, where evaluated, bits per byte over minutes of training.

    Parameters
    ----------
    rows : list of dict
        One a step: ``step minutes loss loss_smoothed``; ``validation_loss bits_per_byte``, None if not there.
    restarts : collection of int
        Steps to mark: before each the run was taken up again.
    """
    evaluated = [row for row in rows if row["validation_loss"] is not None]
    panels = 2 if evaluated else 1
    figure = _figure(0.3 + 2.1 * panels)
    top, *bottom = figure.subplots(panels, squeeze=False).flat
    steps, losses, means = ([row[key] for row in rows] for key in ("step", "loss", "loss_smoothed"))
    if means != losses:
        top.plot(steps, losses, color=LIGHT_LINE, linewidth=0.7, label="training, each step")
    top.plot(steps, means, color=LINE, linewidth=1.4, label="training")
    top.set(xlabel="step", ylabel="loss (nats a token)")
    if evaluated:
        places, losses = ([row[key] for row in evaluated] for key in ("step", "validation_loss"))
        top.plot(places, losses, "o", color=POINT, markersize=3.5, label="validation")
        _draw_bits(bottom[0], evaluated)
        _mark(bottom[0], [before["minutes"] for before, row in pairwise(rows) if row["step"] in restarts])
    _mark(top, [step - 0.5 for step in restarts])
    top.legend()
    return figure


def _draw_bits(axes, evaluated):
    """Plot bits per byte over minutes and write the last value beside its point."""
    minutes, bits = ([row[key] for row in evaluated] for key in ("minutes", "bits_per_byte"))
    axes.plot(minutes, bits, "o-", color=POINT, markersize=3.5, linewidth=1.0)
    axes.annotate(f"{bits[-1]:.3f}", (minutes[-1], bits[-1]), (0, 6), textcoords="offset points",
                  ha="center", fontsize=8)
    axes.set(xlabel="time in training steps (minutes)", ylabel="validation bits per byte", xlim=(0, None))


def _mark(axes, places):
    """Mark restarts by upright lines."""
    if places:
        axes.vlines(places, 0, 1, GREY, ":", label="restart", lw=0.9, transform=axes.get_xaxis_transform())


@_styled
def draw_timeline(launch, number):
    """Return the figure of what each rank did in step ``number``: a row a rank, microbatches numbered.

    The percentages on the right are the ranks' idle shares, see :func:`bubble`. White is time that no span
    tells of. Where a rank holds several stages, later ones are lighter.

    Parameters
    ----------
    launch : Launch
    number : int
        A step of the launch.
    """
    spans = launch.steps[number]
    begin, end = _window(spans)
    scale, unit = (1e3, "ms") if end - begin < 1 else (1, "s")
    kinds = {span.kind for own in spans for span in own}
    figure, axes = _rank_figure(launch.coords, kinds, f"time ({unit})")
    axes.set_xlim(0, (end - begin) * scale)
    share, idle = bubble(spans)
    axes.set_title(f"Step {number}: {_time(end - begin)}, bubble {100 * share:.1f} %", loc="left")
    for row, text in enumerate(["idle", *(f"{100 * part:.1f} %" for part in idle)], -1):
        axes.annotate(text, (1, row), (4, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      va="center_baseline", fontsize=8, color=GREY, annotation_clip=False)
    figure.draw_without_rendering()
    points_per_s = axes.get_window_extent().width / figure.dpi * POINTS_PER_IN / (end - begin)
    for rank, own in enumerate(spans):
        moved = [s._replace(start_s=s.start_s - begin, stop_s=s.stop_s - begin) for s in own]
        _draw_spans(axes, rank, moved, scale, points_per_s)
    return figure


def _draw_spans(axes, rank, spans, scale, points_per_s):
    """Draw a rank's row, ``scale`` units of the axis a second; number the microbatches whose box has room."""
    actions = {span: Action.parse(span.name) for span in spans if span.kind in ACTIONS}
    stages = sorted({action.stage for action in actions.values()})
    bars = {}
    for span in spans:
        action, width_s = actions.get(span), span.stop_s - span.start_s
        colour = _colour(span.kind, 0.6 * stages.index(action.stage) / len(stages) if action else 0)
        bars.setdefault((span.kind, colour), []).append((span.start_s * scale, width_s * scale))
        if action and width_s * points_per_s > 4.6 * len(str(action.microbatch)) + 1:
            axes.text((span.start_s + width_s / 2) * scale, rank, action.microbatch, fontsize=7, ha="center",
                      va="center_baseline", color=_ink(colour))
    for (kind, colour), places in bars.items():
        edge = min(0.5, min(width for _, width in places) / scale * points_per_s / 8)
        axes.broken_barh(places, (rank - 0.42, 0.84), facecolor=colour, linewidth=edge, **_pattern(kind))


@_styled
def draw_step_time(launch, numbers):
    """Return the figure of the share of step time that each kind takes on each rank, on average over steps.

    Parameters
    ----------
    launch : Launch
    numbers : list of int
        Ascending steps of the launch.
    """
    shares, step_s = step_shares([launch.steps[number] for number in numbers])
    used = {kind for own in shares for kind in KINDS if own[kind] >= 0.0005}
    figure, axes = _rank_figure(launch.coords, used, "share of the step time (%)")
    for rank, own in enumerate(shares):
        for kind, right in zip(own, accumulate(own.values())):
            colour, width, left = _colour(kind), 100 * own[kind], 100 * (right - own[kind])
            axes.barh(rank, width, 0.84, left, facecolor=colour, lw=min(0.5, width / 2), **_pattern(kind))
            if width >= 4:
                box = {"boxstyle": "square,pad=0.1", "facecolor": colour, "linewidth": 0}
                axes.text(left + width / 2, rank, f"{width:.0f}", fontsize=7, ha="center",
                          va="center_baseline", color=_ink(colour), bbox=box)
    axes.set_xlim(0, 100)
    steps = f"step {numbers[0]}," if len(numbers) == 1 else f"steps {numbers[0]} to {numbers[-1]}, mean"
    axes.set_title(f"Where the time goes: {steps} {_time(step_s)}", loc="left")
    return figure


def _rank_figure(coords, kinds, xlabel):
    """Return a figure with a row for each rank, and a legend of the kinds below."""
    from matplotlib.patches import Patch

    row_in = min(ROW_IN, 10 / len(coords))
    columns = len(kinds) if len(kinds) <= 6 else 4 if len(kinds) <= 8 else 5
    figure = _figure(row_in * len(coords) + 0.85 + 0.2 * -(-len(kinds) // columns))
    axes = figure.subplots()
    labels, ylabel = _labels(coords)
    axes.set_yticks(range(len(coords)), labels, fontsize=min(8, 0.85 * row_in * POINTS_PER_IN))
    axes.set_ylim(len(coords) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    patches = [Patch(facecolor=_colour(kind), label=label, linewidth=0.5, **_pattern(kind))
               for kind, (_, label) in KINDS.items() if kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, handlelength=1.2,
                  columnspacing=1.2)
    return figure, axes


def _figure(height_in):
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def _labels(coords):
    """Return the labels of the ranks and of their axis, with places if the mesh has more than one axis."""
    axes = [axis for axis in coords[0] if len({own[axis] for own in coords}) > 1]
    if len(axes) < 2:
        return list(range(len(coords))), "rank"
    places = [" ".join(f"{axis[0]}{own[axis]}" for axis in axes) for own in coords]
    names = ", ".join(f"{axis[0]} {axis}" for axis in axes)
    return [f"{rank}  {place}" for rank, place in enumerate(places)], f"rank\n{names}"


def _colour(kind, lighter=0.0):
    """Return the colour of a kind, from its own (0) towards white (1)."""
    from matplotlib.colors import to_rgb

    return tuple(part + (1 - part) * lighter for part in to_rgb(KINDS.get(kind, KINDS["other"])[0]))


def _ink(colour):
    """Return the colour of text on a coloured box."""
    red, green, blue = colour
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"


def _pattern(kind):
    """Return the edge and hatch of a kind's boxes."""
    edge = LIGHT_GREY if kind in ("wait", "other") else "white"
    return {"edgecolor": edge, "hatch": "////" if kind == "wait" else None}


def _time(seconds):
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

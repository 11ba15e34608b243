"""Pictures of a run: draws losses, a step's timeline, its shares.

The functions ``draw_...`` import matplotlib (:class:`ConfigError` if it is missing) and make one figure each: 5 inches
wide, to be read at 3.3 inches as well as over a page, in the colours of Okabe and Ito (2008), which colour-blind people
can tell apart.
"""

import functools
from itertools import accumulate, pairwise
from pathlib import Path

from mpillm.errors import ConfigError, DataError
from mpillm.files import replacing
from mpillm.report.records import bubble, step_shares, window
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
WIDTH_IN, ROW_IN, POINTS_PER_IN, DOTS_PER_IN = 5.0, 0.3, 72, 240
LINE, LIGHT_LINE, POINT, GREY, LIGHT_GREY = "#0072B2", "#9CC7E2", "#D55E00", "#777777", "#AAAAAA"


def save_figure(figure, path):
    """Write a figure; the ending of ``path`` names the format.

    Local.

    Raises
    ------
    DataError
        If there is no such folder or format.
    """
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=DOTS_PER_IN, format=Path(path).suffix[1:])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be drawn ({error}): choose another place or name") from error


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
    """Return the figure of losses over steps and, where evaluated on text, bits per byte over minutes of training.

    Parameters
    ----------
    rows : list of dict
        One a step: ``step minutes loss loss_smoothed``; ``validation_loss bits_per_byte``, None if not there.
    restarts : collection of int
        Steps to mark: before each the run was taken up again.
    """
    evaluated, on_text = ([row for row in rows if row[key] is not None] for key in ("validation_loss", "bits_per_byte"))
    panels = 2 if on_text else 1
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
    if on_text:
        _draw_bits(bottom[0], on_text)
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
def draw_timeline(launch, number, title=None, labels=None, idle=None):
    """Return the figure of what each rank did in step ``number``: a row a rank, microbatches numbered.

    The percentages on the right are the ranks' idle shares, see :func:`bubble`. White is time that no span
    tells of. Where a rank holds several stages, later ones are lighter.

    Parameters
    ----------
    launch : Launch
    number : int
        A step of the launch.
    title : str, optional
    labels : (list of str, str), optional
        Of the rows and of their axis; the ranks and their places on the mesh if not given.
    idle : list of float, optional
        Of the rows, where they are not ranks of one step.
    """
    spans = launch.steps[number]
    begin, end = window(spans)
    scale, unit = (1e3, "ms") if end - begin < 1 else (1, "s")
    kinds = {span.kind for own in spans for span in own}
    figure, axes = _rank_figure(labels or _labels(launch.coords), kinds, f"time ({unit})")
    axes.set_xlim(0, (end - begin) * scale)
    share, own = bubble(spans)
    axes.set_title(title or f"Step {number}: {as_time(end - begin)}, bubble {100 * share:.1f} %", loc="left")
    for row, text in enumerate(["idle", *(f"{100 * part:.1f} %" for part in idle or own)], -1):
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
        where = (rank + 0.42, 0.08) if kind == "transfer" else (rank - 0.42, 0.84)  # a line below, beside all else
        axes.broken_barh(places, where, facecolor=colour, linewidth=edge, **_pattern(kind))


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
    figure, axes = _rank_figure(_labels(launch.coords), used, "share of the step time (%)")
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
    axes.set_title(f"Where the time goes: {steps} {as_time(step_s)}", loc="left")
    return figure


def _rank_figure(labels, kinds, xlabel):
    """Return a figure with a row for each label, and a legend of the kinds below."""
    from matplotlib.patches import Patch

    (labels, ylabel), count = labels, len(labels[0])
    row_in = min(ROW_IN, 10 / count)
    columns = len(kinds) if len(kinds) <= 6 else 4 if len(kinds) <= 8 else 5
    figure = _figure(row_in * count + 0.85 + 0.2 * -(-len(kinds) // columns))
    axes = figure.subplots()
    axes.set_yticks(range(count), labels, fontsize=min(8, 0.85 * row_in * POINTS_PER_IN))
    axes.set_ylim(count - 0.4, -0.6)
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

    own, _ = KINDS.get("reduce" if kind == "transfer" else kind, KINDS["other"])
    return tuple(part + (1 - part) * lighter for part in to_rgb(own))


def _ink(colour):
    """Return the colour of text on a coloured box."""
    red, green, blue = colour
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"


def _pattern(kind):
    """Return the edge and hatch of a kind's boxes."""
    edge = LIGHT_GREY if kind in ("wait", "other") else "white"
    return {"edgecolor": edge, "hatch": "////" if kind == "wait" else None}


def as_time(seconds):
    """Return a time in words."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

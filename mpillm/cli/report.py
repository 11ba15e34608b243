"""``mpillm report``: the pictures of a run, each with its data as CSV beside it."""

import csv
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mode

import click
import numpy as np

from mpillm.cli.options import write_json
from mpillm.errors import DataError
from mpillm.files import replacing, unwritable
from mpillm.plan import Plan
from mpillm.report.chrome import trace_events
from mpillm.report.figures import draw_loss, draw_step_time, draw_timeline, save_figure
from mpillm.report.planned import compare_volume, compare_with_plan, draw_both, planned_spans
from mpillm.report.records import read_metrics, read_trace, step_shares


@click.command("report")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path),
              help="Where the pictures go; RUN/figures if not given.")
@click.option("--step", type=int, metavar="N", help="The timeline's step; the last complete if not given.")
def command(run, output, step):
    """Draw the pictures of the run directory RUN, as PNG and SVG with their data as CSV.

    loss: training and validation loss over steps, bits per byte over minutes of training. Of a run that was
    traced also timeline: what every rank did in one step; and step_time: how the steps' time is shared among
    the kinds of work, on average without the first step; and trace.json, which Perfetto opens. Of a run that
    obeyed a plan also comparison: the predicted and the measured time of each phase; and, if traced, planned:
    the predicted timeline above the measured one; and volume: the bytes that all ranks were to send in a step, by axis
    and operation, beside those that were counted.
    """
    output = output or run / "figures"
    metrics, launches = read_metrics(_metrics_path(run)), read_trace(run / "trace")
    launch, number = _choose(launches, step, run / "trace")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error}): choose another -o") from error
    rows = loss_rows(metrics)
    _save(output / "loss", draw_loss(rows, find_restarts(metrics, launches)), rows)
    plan = Plan.load(run / "plan.json") if (run / "plan.json").is_file() else None
    if launch is None:
        _show_comparison(output, plan, metrics)
        click.echo(f"{run / 'trace'}: no complete step, so no timeline and step_time; set train.trace = true")
        return
    _save(output / "timeline", draw_timeline(launch, number), timeline_rows(launch.steps[number]))
    numbers = list(launch.steps)[1:] or list(launch.steps)
    shares, step_s = step_shares([launch.steps[number] for number in numbers])
    _save(output / "step_time", draw_step_time(launch, numbers),
          [{"rank": rank, "step_s": step_s, **own} for rank, own in enumerate(shares)])
    write_json(output / "trace.json", trace_events(launch))
    click.echo(f"{output / 'trace'}.json, for https://ui.perfetto.dev")
    planned = ()
    if plan and "stages" in plan.predicted:
        from mpillm.planner.search import predicted_timeline

        planned = planned_spans(predicted_timeline(plan), plan.predicted, launch.coords)
        both = {"planned": planned, "measured": launch.steps[number]}
        rows = [{"origin": origin, **row} for origin, spans in both.items() for row in timeline_rows(spans)]
        _save(output / "planned", draw_both(planned, launch, number), rows)
    _show_comparison(output, plan, metrics, shares, planned)
    if plan and "volume" in plan.predicted and launch.sent[number]:
        _show_volume(output, plan.predicted["volume"], launch.sent[number], number)


def _show_comparison(output, plan, metrics, shares=(), planned=()):
    """Print and save what a plan predicted beside what was measured, if the run had one."""
    if not plan or not plan.predicted:
        return
    rows = compare_with_plan(plan.predicted, metrics, shares, planned)
    for row in rows:
        error = "" if row["error"] is None else f" ({row['error']:+.1%})"
        click.echo(f"{row['phase']:10} predicted {row['predicted_s']:.4g} s, measured {row['measured_s']:.4g} s{error}")
    _write_csv(output / "comparison.csv", rows)


def _show_volume(output, planned, counted, number):
    """Print and save what all ranks were to send in a step beside what they sent."""
    rows = compare_volume(planned, counted)
    click.echo(f"sent by all ranks in step {number}, bytes: {'planned':>27} {'counted':>15}")
    for row in rows:
        differs = "" if row["planned_bytes"] == row["counted_bytes"] else "  differs"
        click.echo(f"  {row['axis']:10} {row['operation']:16} {row['planned_bytes']:>33,} {row['counted_bytes']:>15,}"
                   + differs)
    _write_csv(output / "volume.csv", rows)


def loss_rows(metrics):
    """Return one dict a step: its losses, their running mean, and the minutes of training up to its end.

    Parameters
    ----------
    metrics : list of dict
        Of :func:`mpillm.report.figures.read_metrics`.
    """
    minutes = accumulate(record["step_s"] / 60 for record in metrics)
    means = running_mean([record["loss"] for record in metrics], len(metrics) // 50)
    return [{"step": record["step"], "minutes": minute, "loss": record["loss"], "loss_smoothed": mean,
             "validation_loss": record.get("validation_loss"), "bits_per_byte": record.get("bits_per_byte")}
            for record, minute, mean in zip(metrics, minutes, means)]


def running_mean(values, reach):
    """Return the mean around each value over up to ``reach`` values either side, of those that are finite.

    Near the start the window shrinks on both sides, because there a loss falls fast; at the end on one.
    """
    if reach == 0:
        return list(values)
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.append(0, part)) for part in (np.where(finite, values, 0.0), finite))
    at = np.arange(len(values))
    start, stop = at - np.minimum(at, reach), np.minimum(at + np.minimum(at, reach) + 1, len(values))
    with np.errstate(invalid="ignore"):
        return ((sums[stop] - sums[start]) / (counts[stop] - counts[start])).tolist()


def find_restarts(metrics, launches):
    """Return the steps before which the run was taken up again, as far as gaps and the trace tell.

    A gap is where lines are lacking that a launch would have written: more of them than between most steps.
    """
    steps = [record["step"] for record in metrics]
    apart = [after - before for before, after in pairwise(steps)]
    gaps = {step for step, distance in zip(steps[1:], apart) if distance > mode(apart)}
    begins = {min(launch.steps) for launch in launches}
    return sorted(gaps | {step for step in begins if steps[0] < step <= steps[-1]})


def timeline_rows(spans):
    """Return one dict a span, with its rank and times since the first span of the step."""
    begin = min(span.start_s for own in spans for span in own)
    return [{"rank": rank, "kind": span.kind, "name": span.name, "start_s": round(span.start_s - begin, 7),
             "stop_s": round(span.stop_s - begin, 7)} for rank, own in enumerate(spans) for span in own]


def _metrics_path(run):
    """Return the path of a run's metrics, or say why this is no run directory."""
    if not run.is_dir():
        problem = "not a directory" if run.exists() else "no such directory"
        raise DataError(f"report {run}: {problem}: name the run_dir of a run")
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"report {run}: no metrics.jsonl in it: name a run directory that has trained a step")
    return path


def _choose(launches, step, folder):
    """Return the launch and the number of the step to show; the newest launch that has it."""
    if not launches and step is None:
        return None, None
    number = max(launches[-1].steps) if step is None else step
    for launch in reversed(launches):
        if number in launch.steps:
            return launch, number
    known = ", ".join(f"{min(launch.steps)} to {max(launch.steps)}" for launch in launches) or "none"
    raise DataError(f"--step {step}: not a complete step of {folder}: there are {known}")


def _save(path, figure, rows):
    """Write a figure as PNG and SVG and its data as CSV, and say so."""
    for suffix in (".png", ".svg"):
        save_figure(figure, path.with_suffix(suffix))
    _write_csv(path.with_suffix(".csv"), rows)
    click.echo(f"{path}.png, .svg, .csv")


def _write_csv(path, rows):
    try:
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise unwritable(path, error) from error

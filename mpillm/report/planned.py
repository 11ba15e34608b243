"""A plan beside its run: drawn as if it had been traced, and its prediction phase by phase beside what was measured."""

import statistics
from collections import Counter

from mpillm.report.figures import as_time, draw_timeline, save_figure
from mpillm.report.records import Launch, Span, bubble, step_shares, window


def planned_launch(timeline, predicted):
    """Return a played step, the rest of its reduction and the update, as the trace of one step named ``predicted``.

    Local. As in a run, a rank that has done its actions waits for all gradients in ``reduce``.

    Parameters
    ----------
    timeline : mpillm.planner.timeline.Timeline
    predicted : dict
        ``gradients_s`` and ``update_s`` of the plan.
    """
    rows, update_s = [], timeline.total_s + predicted["gradients_s"]
    played = zip(timeline.schedule.actions, timeline.starts_s, timeline.ends_s, timeline.transfers)
    for actions, starts, ends, transfers in played:
        spans, free = [], 0.0
        for action, start, end in zip(actions, starts, ends):
            if start > free:
                spans.append(Span("wait", "message", free, start))
            spans.append(Span(action.kind, str(action), start, end))
            free = end
        spans += [Span("transfer", str(one), one.start_s, one.end_s) for one in transfers]
        spans += [Span("reduce", "gradients", free, update_s),
                  Span("update", "weights", update_s, update_s + predicted["update_s"])]
        rows.append([span for span in spans if span.stop_s > span.start_s])
    coords = [{"data": 0, "pipeline": rank, "tensor": 0} for rank in range(len(rows))]
    return Launch(coords, {"predicted": rows})


def draw_predicted(timeline, predicted, path):
    """Draw what every pipeline rank is predicted to do in a step; the ending of ``path`` names the format.

    Local.
    """
    save_figure(draw_timeline(planned_launch(timeline, predicted), "predicted"), path)


def planned_spans(timeline, predicted, coords):
    """Return the predicted spans of every rank of a launch, by its place on the mesh. Local.

    ``timeline`` and ``predicted`` as of :func:`planned_launch`.
    """
    spans = planned_launch(timeline, predicted).steps["predicted"]
    return [spans[own["pipeline"]] for own in coords]


def draw_both(planned, launch, number):
    """Return the figure of a measured step below the prediction of each of its ranks, on one axis of time.

    Local.

    Parameters
    ----------
    planned : list of list of Span
        Of :func:`planned_spans`.
    launch : Launch
    number : int
        A step of the launch.
    """
    measured = launch.steps[number]
    rows, titles, idle = [], [], []
    for name, spans in (("planned", planned), ("measured", measured)):
        begin, end = window(spans)
        rows += [[s._replace(start_s=s.start_s - begin, stop_s=s.stop_s - begin) for s in own] for own in spans]
        share, own = bubble(spans)
        idle += own
        titles.append(f"{name} {as_time(end - begin)}, bubble {100 * share:.1f} %")
    labels = [f"{rank} {name}" for name in ("planned", "measured") for rank in range(len(measured))]
    return draw_timeline(Launch(launch.coords * 2, {number: rows}), number, f"Step {number}: {titles[0]}\n{titles[1]}",
                         (labels, "rank"), idle)


def compare_with_plan(predicted, metrics, shares=(), planned=()):
    """Return predicted beside measured: a list of ``{"phase", "predicted_s", "measured_s", "error"}``.

    Local. The step is the median of all but the first; of a traced run also its phases, of both as means over ranks.

    Parameters
    ----------
    predicted : dict
        Of a plan.
    metrics : list of dict
        Of :func:`mpillm.report.records.read_metrics`.
    shares : list of dict
        Of :func:`mpillm.report.records.step_shares`: for every rank the share of a step that each kind of work takes.
    planned : list of list of Span
        Of :func:`planned_spans`.
    """
    steps = [record["step_s"] for record in metrics]
    expected, measured = {"step": predicted["step_s"]}, {"step": statistics.median(steps[1:] or steps)}
    if shares and planned:
        for phases, own in ((expected, step_shares([planned])[0]), (measured, shares)):
            phases |= _phases(own, phases["step"])
    return [{"phase": phase, "predicted_s": expected[phase], "measured_s": seconds,
             "error": expected[phase] / seconds - 1 if seconds else None} for phase, seconds in measured.items()]


def _phases(shares, step_s):
    """Return the seconds of a step's phases, as means over ranks."""
    found = {phase: statistics.fmean(own.get(kind, 0.0) for own in shares) * step_s
             for phase, kind in (("gradients", "reduce"), ("update", "update"))}
    return {**found, "pipeline": step_s - sum(found.values())}


def compare_volume(planned, counted):
    """Return what a step was to send beside what it sent: a list of ``{"axis", "operation", "planned_bytes",
    "counted_bytes"}``, with the larger first.

    Local.

    Parameters
    ----------
    planned : list of dict
        ``volume`` of a plan's prediction.
    counted : Counter
        Of :class:`mpillm.report.records.Launch`.
    """
    planned = Counter({(one["axis"], one["operation"]): one["bytes"] for one in planned})
    keys = sorted({*planned, *(key for key, n_bytes in counted.items() if n_bytes)},
                  key=lambda key: (-max(planned[key], counted[key]), key))
    return [{"axis": axis, "operation": operation, "planned_bytes": planned[axis, operation],
             "counted_bytes": counted[axis, operation]} for axis, operation in keys]

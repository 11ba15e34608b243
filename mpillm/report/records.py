"""What a run recorded: reads ``metrics.jsonl`` and ``trace/``, and does the arithmetic of times."""

import json
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

from mpillm.errors import DataError
from mpillm.schedules.pipeline import KINDS as ACTIONS

KINDS = ("F", "B", "I", "W", "wait", "reduce", "update", "data", "other")
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
    sent : dict of int to Counter
        By number: the bytes that all ranks sent, by ``(axis, operation)``.
    """

    coords: list
    steps: dict
    sent: dict = field(default_factory=dict)


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
            step = int(record["step"])
            numbers = {"loss", "step_s"} | {key for key, value in record.items() if isinstance(value, str)}  # "NaN"
            records[step] = record | {key: float(record[key]) for key in numbers}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where}: no step, loss and step_s: is this the file of a run?") from None
    if not records:
        raise DataError(f"{path}: holds no metrics yet: draw the run after its first step")
    return [records[step] for step in sorted(records)]


def read_trace(folder):
    """Return the launches that completed traced steps, oldest first.

    Local. Of launches that carry no name, with as many ranks that began at the same step, only the last is there.

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
                key = header["launch"] or (header["ranks"], min(steps))
                found[key] = found.pop(key, {}) | {header["rank"]: (header, steps)}
    launches = []
    for sections in found.values():
        ranks = range(max(header["ranks"] for header, _ in sections.values()))
        if all(rank in sections for rank in ranks):
            headers, steps = zip(*(sections[rank] for rank in ranks))
            complete = _complete(steps)
            sent = {number: sum((header["sent"].get(number, Counter()) for header in headers), Counter())
                    for number in complete}
            launches.append(Launch([header["coords"] for header in headers], complete, sent))
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
    """Return ``[(header, {step: spans})]`` of one rank's file, a section for each launch; what was sent in each step is
    in the header."""
    sections = []
    for where, line in _lines(path):
        try:
            # A rank that was killed leaves a torn line, and the next launch's header follows on it.
            record = json.loads(line[max(0, line.rfind('{"rank"')):])
            if "rank" in record:
                known = {key: record[key] for key in ("rank", "ranks", "coords")}
                sections.append((known | {"launch": record.get("launch"), "sent": {}}, {}))
            elif "sent" in record:
                counted = Counter({(axis, operation): int(n_bytes) for axis, operation, n_bytes in record["sent"]})
                sections[-1][0]["sent"][record["step"]] = counted
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
    begin, end = window(actions)
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
    total_s = sum(end - begin for begin, end in map(window, steps))
    shares = []
    for own in zip(*steps):
        seconds = _seconds_by_kind([span for step in own for span in step if span.kind in KINDS])
        row = {kind: seconds[kind] / total_s for kind in KINDS}
        shares.append(row | {"other": max(0.0, 1 - sum(row.values()))})
    return shares, total_s / len(steps)


def _seconds_by_kind(spans):
    """Add up one rank's time in each kind; a span stands still while one within it lasts, as a reduction in ``B``."""
    seconds, around = Counter(), []
    for span in sorted(spans, key=lambda span: (span.start_s, -span.stop_s)):
        while around and around[-1].stop_s <= span.start_s:
            around.pop()
        seconds[span.kind] += span.stop_s - span.start_s
        if around:
            seconds[around[-1].kind] -= span.stop_s - span.start_s
        around.append(span)
    return seconds


def _seconds(spans):
    return sum(span.stop_s - span.start_s for span in spans)


def window(spans):
    """Return the first start and the last end of all ranks' spans."""
    return min(s.start_s for own in spans for s in own), max(s.stop_s for own in spans for s in own)

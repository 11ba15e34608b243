"""A traced launch in the trace-event format that Perfetto and Chrome open."""

LANES = ("compute", "wait", "collective", "other")
_LANE = {**dict.fromkeys("FBIW", 0), "update": 0, "wait": 1, "reduce": 2}
_BESIDE = "transfer"  # several at once, beside everything else


def trace_events(launch):
    """Return what :func:`json.dump` writes as a trace: a process a rank, a thread a kind of work.

    Local. Times are in microseconds since the first span (Trace Event Format, complete events ``"ph": "X"``, and pairs
    ``"b"`` and ``"e"`` of what overlaps).
    """
    begin_s = min(span.start_s for step in launch.steps.values() for own in step for span in own)
    events = []
    for rank, coords in enumerate(launch.coords):
        place = " ".join(f"{axis} {coord}" for axis, coord in coords.items())
        events += [{"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank} ({place})"}},
                   {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}]
        events += [{"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": name}}
                   for tid, name in enumerate(LANES)]
    for number, step in launch.steps.items():
        for rank, own in enumerate(step):
            events += [{"ph": "X", "pid": rank, "tid": _LANE.get(span.kind, 3), "name": span.name, "cat": span.kind,
                        "ts": round((span.start_s - begin_s) * 1e6, 1),
                        "dur": round((span.stop_s - span.start_s) * 1e6, 1), "args": {"step": number}}
                       for span in own if span.kind != _BESIDE]
            events += [{"ph": phase, "pid": rank, "name": span.name, "cat": span.kind, "id": f"{rank}.{number}.{i}",
                        "ts": round((at_s - begin_s) * 1e6, 1), "args": {"step": number}}
                       for i, span in enumerate(own) if span.kind == _BESIDE
                       for phase, at_s in (("b", span.start_s), ("e", span.stop_s))]
    return {"traceEvents": events, "displayTimeUnit": "ms"}

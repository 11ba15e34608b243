"""Reads what the ranks of a hung job wrote and says which rank and call came first."""

import json
from pathlib import Path

from mpillm.config import AXES
from mpillm.errors import DataError


def read_flights(folder):
    """Read what :class:`mpillm.guard.watchdog.Watchdog` wrote. Local.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    dict of int to dict
        The record of every rank that wrote one.

    Raises
    ------
    DataError
        If a file is not such a record.
    """
    found = {}
    for path in Path(folder).glob("rank-*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found[record["rank"]] = record
        except FileNotFoundError:  # taken back
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not the record of a rank ({error!r})") from error
    return found


def diagnose(records):
    """Return in words which rank and which call diverged first.

    Local. In order: ranks that wrote nothing, being stopped or dead; the first collective that the ranks of a group
    call differently; ranks that have not come to a collective in which others wait; else whoever has been quiet
    longest.

    Parameters
    ----------
    records : dict of int to dict
        Of :func:`read_flights`.

    Returns
    -------
    str
    """
    any_record = next(iter(records.values()))
    size, lines = any_record["ranks"], []
    silent = sorted(set(range(size)) - set(records))
    if silent:
        lines.append(f"ranks {silent} wrote nothing: stopped, killed, or their node is lost")
    lines += _diverged(records)
    if not lines:
        first = min(records.values(), key=lambda record: _last(record)["at"])
        lines.append(f"rank {first['rank']} on {first['host']} went quiet first")
    lines += [_where(record) for _, record in sorted(records.items())]
    return f"no progress on {len(records)} of {size} ranks\n  " + "\n  ".join(lines)


def _diverged(records):
    """Return a line for every group whose ranks do not agree, those that call different things first."""
    different, behind = [], []
    for axis in (*AXES, "world"):
        groups = {}
        for rank, record in sorted(records.items()):
            key = () if axis == "world" else tuple(record["coords"][other] for other in AXES if other != axis)
            groups.setdefault(key, {})[rank] = {call["number"]: call for call in record["calls"]
                                                if call.get("axis") == axis and call["call"] != "send"}
        for members in groups.values():
            text, is_different = _compare(axis, members, records)
            if text:
                (different if is_different else behind).append(text)
    return different + behind


def _compare(axis, members, records):
    """Return what is wrong with the collectives of one group, and whether ranks called different ones."""
    for number in sorted(set().union(*members.values())):
        called = {rank: calls[number]["call"] for rank, calls in members.items() if number in calls}
        if len(set(called.values())) > 1:
            each = ", ".join(f"rank {rank} {name}" for rank, name in called.items())
            return f"axis {axis}, call {number}: the ranks call different operations: {each}", True
    ends = {rank: max(calls, default=0) for rank, calls in members.items()}
    late = [rank for rank, end in ends.items() if end < max(ends.values())]
    if not late:
        return None, False
    waiting = [rank for rank in ends if rank not in late]
    call = members[waiting[0]][ends[waiting[0]]]
    states = "; ".join(_where(records[rank]) for rank in late)
    return (f"axis {axis}, call {call['number']}, {call['call']}: ranks {waiting} are in it, ranks {late} have not "
            f"come to it: {states}"), False


def _where(record):
    spans = [call for call in record["calls"] if "kind" in call]
    name = spans[-1]["name"] if spans else record["kind"]
    return (f"rank {record['rank']} on {record['host']}: step {record['step']}, {name}, quiet for "
            f"{record['quiet_s']:.0f} s (limit {float(record['limit_s']):.0f} s)")


def _last(record):
    return record["calls"][-1] if record["calls"] else {"at": 0.0}

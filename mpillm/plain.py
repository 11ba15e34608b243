"""Plain objects (configuration, machine, plan, schedule, network) out of what TOML and JSON give, checked by pydantic."""

import difflib
import json
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mpillm.errors import ConfigError

KNOWN_KEYS = ConfigDict(extra="forbid")  # the ``__pydantic_config__`` of a dataclass that refuses other keys
config_section = dataclass(frozen=True, config=KNOWN_KEYS)  # of a configuration

Positive = Annotated[int, Strict(), Field(gt=0)]
Count = Annotated[int, Strict(), Field(ge=0)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=1 << 63)]
PositiveReal = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Real = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)]
FractionOfOne = Annotated[float, Strict(), Field(gt=0, le=1)]

_SHOWN_CHARACTERS = 80  # of a value that is refused


def checked(kind, values, source, remedy="", refusal=ConfigError):
    """Return the ``kind`` that nested dicts and lists stand for; keys left out have their defaults.

    Local. ``kind`` is a dataclass, whose annotations say what is allowed.

    Raises
    ------
    ConfigError
        Or another ``refusal``: ``source``; for every fault the key, its value and what is allowed; ``remedy``.
    """
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise refusal(_in_a_line(source, _faults(error, kind), remedy)) from None


def load_json(kind, path, what, remedy, refusal=ConfigError):
    """Return the ``kind`` that a JSON file holds. Local; raises as :func:`checked` does."""
    source = f"{what} {path}"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise refusal(_in_a_line(source, f"cannot be read ({error.strerror or error})", remedy)) from None
    except (ValueError, RecursionError) as error:
        raise refusal(_in_a_line(source, f"not JSON ({error})", remedy)) from None
    return checked(kind, values, source, remedy, refusal)


_adapter = cache(TypeAdapter)


def _in_a_line(*parts):
    return ": ".join(str(part) for part in parts if part)


def _faults(error, kind):
    """Turn pydantic's report into text: for every fault key, value, what is allowed."""
    parts = []
    for fault in error.errors():
        way = [part for part in fault["loc"] if not _is_union_tag(part)]
        key, shown = ".".join(map(str, way)), json.dumps(fault["input"], default=str)
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            part = f"{key}: unknown key{_suggest(kind, way)}"
        elif fault["type"] in ("missing", "missing_argument"):
            part = f"{key}: required, but not given"
        elif fault["type"] == "value_error":
            part = f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
        else:
            cut = f"{shown[:_SHOWN_CHARACTERS]} ..." if len(shown) > _SHOWN_CHARACTERS else shown
            part = f"{key or 'all of it'} = {cut}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        if part not in parts:
            parts.append(part)
    return "; ".join(parts)


def _is_union_tag(part):
    """Tell pydantic's names of union members from real keys."""
    return isinstance(part, str) and ("[" in part or "(" in part or part in ("int", "constrained-int", "str", "bool"))


def _suggest(kind, way):
    """Name the key that was meant, or all that there are, where ``way`` leads through dataclasses and rows of them."""
    for part in way[:-1]:
        kind = get_args(kind)[0] if isinstance(part, int) else get_type_hints(kind).get(part)
        if type(None) in get_args(kind):  # of ``X | None``
            kind = get_args(kind)[0]
    allowed = list(_adapter(kind).json_schema()["properties"]) if is_dataclass(kind) else []
    near = difflib.get_close_matches(str(way[-1]), allowed, n=1)
    return f", did you mean {near[0]}?" if near else f"; known: {', '.join(allowed)}"

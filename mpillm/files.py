"""Files that appear whole or not at all."""

import contextlib
import json
import math
import os


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside ``path`` that takes its place when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value, indent=None):
    """Return ``value`` as JSON; numbers that are not finite, which JSON does not know, as text that ``float()`` reads.

    Local. They are ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, as in the JSON of protocol buffers.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_infinities(value), indent=indent, allow_nan=False)


def _without_infinities(value):
    """Replace numbers that are not finite, wherever they are in lists and dicts."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(float(value))
    return value

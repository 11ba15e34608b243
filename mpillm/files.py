"""Files that appear whole or not at all, JSON that is JSON, and what to do where a file cannot be written."""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from pathlib import Path

from mpillm.errors import DataError

_REMEDIES = {
    errno.EDQUOT: "your quota there is used up: remove files of yours, or ask for more",
    errno.EROFS: "name a place that can be written", errno.EACCES: "name a place that you may write to",
    errno.EPERM: "name a place that you may write to", errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "make its folder first", errno.EISDIR: "name a file",
}
_BLOCKS, _BLOCK_BYTES = 256, 1 << 16  # of a file of which a digest is made
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EROFS, errno.EBADF}


def remedy(error):
    """Return what to do about the error of a file that cannot be written. Local."""
    return _REMEDIES.get(getattr(error, "errno", None), "free some space")


def unwritable(path, error):
    """Return the :class:`mpillm.errors.DataError` that names a file, the system's error and the remedy. Local."""
    return DataError(f"{path}: cannot be written ({error.strerror or error}): {remedy(error)}")


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside ``path`` that takes its place when all went well; else what was there stays.

    Local. Of a link, what it leads to is replaced; what is no plain file, as a pipe or ``/dev/stdout``, is written to.
    A file that is replaced keeps its mode.
    """
    if os.path.exists(path) and not os.path.isfile(path) or _is_output(path):
        yield Path(path)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_output(path):
    """Tell whether ``path`` leads to what standard output or errors go to, though that be a file."""
    with contextlib.suppress(OSError):
        return any(os.path.samestat(os.stat(path), os.fstat(descriptor)) for descriptor in (1, 2))
    return False


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk, on file systems that have that. Local."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def sampled_digest(path, stated=""):
    """Return a SHA-256, in hexadecimal, of a file's length, of ``stated``, and of 256 blocks that are spread over it. Local."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(f"{size} {stated}".encode())
    step = max(_BLOCK_BYTES, (size - _BLOCK_BYTES) / (_BLOCKS - 1))
    with open(path, "rb") as file:
        for block in range(_BLOCKS):
            file.seek(round(block * step))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def write_text(path, text):
    """Write a text file as :func:`replacing` does; raises :func:`unwritable`. Local."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path, value):
    """Write what :func:`to_json` makes of a value as :func:`replacing` does. Local."""
    write_text(path, to_json(value, indent=1) + "\n")


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

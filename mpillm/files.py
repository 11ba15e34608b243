"""Files that appear whole or not at all."""

import contextlib
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

"""The documents in text files."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import DataError


@dataclass(frozen=True)
class Documents:
    """The documents in files, as bytes, read anew at every iteration; empty ones are left out.

    Local. A ``.jsonl`` file has a document a line, under the key ``"text"``; any other file is one document.
    One document at a time is in memory.

    Parameters
    ----------
    paths : sequence of str
    low, high : float
        Only documents whose place in [0, 1) lies in ``low <= place < high``. The place is a SHA-256 of the
        path as it was given, or of a JSON line's text, and so does not depend on the other documents.
    utf8 : bool
        Whether documents must be valid UTF-8.

    Raises
    ------
    DataError
        When iterated, if a file cannot be read or does not hold what it must.
    """

    paths: tuple
    low: float = 0.0
    high: float = 1.0
    utf8: bool = True

    def __iter__(self):
        for path in self.paths:
            try:
                for key, text in (_json_lines if path.endswith(".jsonl") else self._whole_file)(path):
                    if text and self.low <= _place(key) < self.high:
                        yield text
            except IsADirectoryError:
                raise DataError(f"text file {path}: is a directory: name the files in it") from None
            except OSError as error:
                raise error if isinstance(error, DataError) else DataError(
                    f"text file {path}: cannot be read ({error.strerror or error})") from error

    def _whole_file(self, path):
        """Yield the one document of a text file."""
        data = Path(path).read_bytes()
        if self.utf8:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"text file {path}: byte {error.start} is not UTF-8 ({error.reason}): convert the file, "
                    "or use --tokenizer bytes, which takes any bytes"
                ) from None
        yield os.fsencode(Path(path).as_posix()), data


def _json_lines(path):
    """Yield the text of every line of a JSON lines file, as its own key."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"text file {path}: line {number} is no JSON object with text under the key \"text\" "
                    f"({type(error).__name__}: {error})"
                ) from None
            yield text, text


def _place(key):
    """Map a key to [0, 1), evenly and for ever the same."""
    return (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 11) / (1 << 53)

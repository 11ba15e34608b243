"""The documents in text files; what a file is, is seen by its content."""

import codecs
import hashlib
import importlib
import io
import json
import warnings
import zlib
from dataclasses import dataclass
from itertools import islice

from mpillm.errors import DataError

try:
    from lzma import LZMAError
except ImportError:  # not every Python was built with it
    LZMAError = EOFError

_HEAD_BYTES = 1 << 16
_READERS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "lzma"}  # how compressed files begin, and what reads them
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "compressed by zstd", b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x1f\x9d": "compressed by compress", b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive", b"\x89HDF": "HDF5", b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF-": "PDF",
}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
          codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Documents:
    """The documents in files, as bytes, read anew at every iteration; empty ones are left out.

    Local. A file of JSON lines, objects with text under the key ``"text"``, has a document a line; any other file is one
    document. Files of gzip, bzip2 and xz are read unpacked. One document at a time is in memory.

    Parameters
    ----------
    paths : sequence of str
    low, high : float
        Only documents whose place in [0, 1) lies in ``low <= place < high``. The place is a SHA-256 of the document's
        text: where it lies, how its path is written and what else is there do not matter, and copies stay together.
    utf8 : bool
        Whether documents must be text: UTF-8, or UTF-16 and UTF-32 that begin with a byte order mark. Else a document
        that is a file is the bytes of that file.
    are_cut : bool
        Take a part of every document, in place of some documents: the text between its last ``high`` and its last
        ``low``, cut where a line begins.

    Raises
    ------
    DataError
        When iterated, if a file cannot be read or does not hold what it must.
    """

    paths: tuple
    low: float = 0.0
    high: float = 1.0
    utf8: bool = True
    are_cut: bool = False

    def __iter__(self):
        for path in self.paths:
            try:
                for text in _documents(path, self.utf8):
                    if self.are_cut:
                        text = text[_start_of_last(self.high, text):_start_of_last(self.low, text)]
                    elif not self.low <= _place(text) < self.high:
                        continue
                    if text:
                        yield text
            except IsADirectoryError:
                raise DataError(f"text file {path}: is a directory: name the files in it") from None
            except DataError:
                raise
            except (OSError, EOFError, zlib.error, LZMAError) as error:
                raise DataError(f"text file {path}: cannot be read ({getattr(error, 'strerror', None) or error})"
                                ) from error


def _documents(path, utf8):
    """Yield the text of every document in a file."""
    with _unpacked(path) as file:
        head = file.read(_HEAD_BYTES)
        encoding = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8")
        if _has_json_lines(path, file, head, encoding):
            yield from _json_lines(path, _lines(file, encoding))
            return
        _check_kind(path, head, encoding, utf8)
        file.seek(0)
        data = file.read()
    yield _as_utf8(path, data, encoding) if utf8 else data


def _unpacked(path):
    """Open a file for reading bytes, unpacked if it is compressed."""
    file = open(path, "rb")
    head = file.read(8)
    module = next((module for magic, module in _READERS.items() if head.startswith(magic)), None)
    file.seek(0)
    if module is None:
        return file
    file.close()
    try:
        return importlib.import_module(module).open(path, "rb")
    except ImportError:
        raise DataError(f"text file {path}: is compressed, and this Python has no {module}: unpack it first") from None


def _has_json_lines(path, file, head, encoding):
    """Tell whether a file that has been opened is one of JSON lines; say so when that is not clear."""
    name = path.lower()
    for suffix in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".ndjson")):
        return True
    start, values = head.decode(encoding, "ignore").lstrip(), []
    if start[:1] not in ("{", "["):
        return False
    try:
        values = [json.loads(line) for line in islice(filter(bytes.strip, _lines(file, encoding)), 2)]
    except (ValueError, RecursionError):
        pass  # such as one object over many lines
    are_objects = [isinstance(value, dict) for value in values]
    if values and all(are_objects) and all(isinstance(value.get("text"), str) for value in values):
        return True
    if '"text"' in start or are_objects == [True, True]:
        warnings.warn(f"text file {path}: holds JSON, but no lines with text under the key \"text\": it is taken as one "
                      "document, syntax and all; for a document each, write an object a line: {\"text\": ...}",
                      stacklevel=2)
    return False


def _lines(file, encoding):
    """Yield all lines of a file, which end at line feeds alone, as UTF-8 without a byte order mark."""
    file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
    if encoding.startswith("utf-8"):
        yield from map(bytes, file)  # not from the file, which would be closed with this iterator
        return
    text = io.TextIOWrapper(file, encoding, newline="\n")
    try:
        yield from map(str.encode, text)
    finally:
        text.detach()


def _json_lines(path, lines):
    """Yield the text of every line."""
    number = 1
    try:
        for line in lines:
            if line.strip():
                yield json.loads(line)["text"].encode()
            number += 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"text file {path}: line {number} is no JSON object with text under the key \"text\" "
            f"({type(error).__name__}: {error})"
        ) from None


def _check_kind(path, head, encoding, utf8):
    """Refuse a file that is known not to be text; where any bytes will do, say what they are."""
    kind = next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        kind = "a tar archive"
    if kind and utf8:
        raise DataError(f"text file {path}: is {kind}, not text: take out the text first")
    if kind:
        warnings.warn(f"text file {path}: is {kind}; its bytes are taken, not what is packed in it", stacklevel=2)
    every_other = max(head[0::2].count(0), head[1::2].count(0))
    if utf8 and encoding == "utf-8" and every_other > len(head) / 4:
        raise DataError(f"text file {path}: every other byte is 0: looks like UTF-16 without a byte order mark: convert "
                        "it to UTF-8, as with iconv -f UTF-16LE -t UTF-8")


def _as_utf8(path, data, encoding):
    """Return text as UTF-8 without a byte order mark; refuse what is not in its encoding."""
    place = 0
    try:
        if not encoding.startswith("utf-8"):
            return data.decode(encoding).encode()
        while place < len(data):  # in parts, because a str may take four times the memory
            part = memoryview(data)[place:place + (1 << 20)]
            place += codecs.utf_8_decode(part, "strict", place + len(part) == len(data))[1]
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path}: byte {place + error.start} is not {encoding.upper().removesuffix('-SIG')} "
            f"({error.reason}): convert the file, or use --tokenizer bytes, which takes any bytes"
        ) from None
    return data.removeprefix(codecs.BOM_UTF8)


def _start_of_last(share, text):
    """Return where the last ``share`` of a text begins: where a line begins near there, else a word, else a character."""
    place = len(text) - round(len(text) * share)
    near = min(place, len(text) - place) // 2
    for end in (b"\n", b" "):
        before, after = text.rfind(end, place - near, place) + 1, text.find(end, place, place + near) + 1
        found = [cut for cut in (before, after) if cut]
        if found:
            return min(found, key=lambda cut: abs(cut - place))
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _place(text):
    """Map a text to [0, 1), evenly and for ever the same."""
    return (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11) / (1 << 53)

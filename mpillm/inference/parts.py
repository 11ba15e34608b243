"""Results on their way to one file: each replica appends to a part of its own; what was written whole counts. Local.

A record is a line of a number, a checksum and JSON. The first of a part, of number 0, says of which job the part is; beside the
file that they become, another says it.
"""

import json
import os
import re
import time
import zlib
from pathlib import Path

import numpy as np

from mpillm.errors import ConfigError, DataError
from mpillm.files import replacing, sync, to_json, unwritable, write_json

SYNC_S = 1.0
_NAME = re.compile(r"(\d{4,})-\d{4,}")


class Part:
    """A part that a replica appends to.

    Parameters
    ----------
    path : Path
        What :meth:`Parts.begin` has made.
    """

    def __init__(self, path):
        self.path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND)
        self._synced_s, self._is_dirty = time.monotonic(), False

    def add(self, number, result):
        """Append the result of a line."""
        _write(self._file, number, result)
        self._is_dirty = True

    def sync(self, every_s=SYNC_S):
        """Wait until all is on the disk, if the last time is ``every_s`` ago."""
        if self._is_dirty and time.monotonic() >= self._synced_s + every_s:
            os.fsync(self._file)
            self._synced_s, self._is_dirty = time.monotonic(), False

    def close(self):
        """Sync and close."""
        try:
            self.sync(0)
        finally:
            os.close(self._file)


class Parts:
    """The parts of a file, in a folder beside it. On rank 0.

    Parameters
    ----------
    target : str or Path
        The file that they become.
    job : dict
        What results depend on.
    """

    def __init__(self, target, job):
        self.target, self.job, self.folder = Path(target), job, Path(f"{target}.parts")
        self._old = Path(f"{target}.parts.old")  # of which all is in the file
        self._made_by = Path(f"{target}.job")

    def begin(self, replicas):
        """Make a part for each replica; return their paths, none if this job has made the file already.

        Raises
        ------
        ConfigError
            If the parts, or the file that is there, are of another job.
        DataError
            If they cannot be written.
        """
        try:
            _remove(self._old)
            held = self._held()
            if not held and self.target.exists():
                self._check(self.target, _read_job(self._made_by))
                return []
            for found in filter(None, map(_job_of, held)):
                self._check(self.folder, found)
            self.folder.mkdir(exist_ok=True)
            launch = 1 + max((int(_NAME.fullmatch(path.name)[1]) for path in held), default=0)
            paths = [self.folder / f"{launch:04d}-{replica:04d}" for replica in range(replicas)]
            for path in paths:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                try:
                    _write(file, 0, self.job)
                    os.fsync(file)
                finally:
                    os.close(file)
            sync(self.folder)
            return paths
        except OSError as error:
            raise error if isinstance(error, DataError) else unwritable(self.folder, error) from error

    def done(self, lines):
        """Return for each line number up to ``lines`` where its result lies: ``[lines + 1, 3]`` of part, start and length, 0
        where there is none; and the parts."""
        paths, places = self._held(), np.zeros((lines + 1, 3), np.int64)
        for index, path in enumerate(paths):
            for number, start, length in records(path):
                if 0 < number <= lines:
                    places[number] = index, start, length
        return places, paths

    def merge(self, numbers, refused):
        """Write the results of some lines, in their order, to the file and remove the parts.

        Parameters
        ----------
        numbers : iterable of int
            Of all lines.
        refused : dict of int to dict
            What is written for lines that ask for nothing that can be.
        """
        numbers = list(numbers)
        places, paths = self.done(max(numbers, default=0))
        missing = [number for number in numbers if number not in refused and not places[number, 2]]
        if missing:
            raise DataError(f"{self.folder}: lacks the results of {len(missing)} lines, the first is line {missing[0]}: start "
                            "the same command again")
        files = [os.open(path, os.O_RDONLY) for path in paths]
        try:
            write_json(self._made_by, self.job)
            with replacing(self.target) as temporary, open(temporary, "wb") as file:
                for number in numbers:
                    if number in refused:
                        file.write(to_json(refused[number]).encode() + b"\n")
                    else:
                        index, start, length = map(int, places[number])
                        file.write(os.pread(files[index], length, start) + b"\n")
            sync(self.target.resolve().parent)
            self.folder.rename(self._old)
            _remove(self._old)
        except OSError as error:
            raise error if isinstance(error, DataError) else unwritable(self.target, error) from error
        finally:
            for file in files:
                os.close(file)

    def _held(self):
        """Return the parts that are there, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name))

    def _check(self, path, found):
        """Refuse what another job has made."""
        if found is None:
            raise ConfigError(f"{path}: is there already: remove it, or name another file with -o")
        differing = [f"{key} = {_short(found.get(key))} there, {_short(self.job.get(key))} now"
                     for key in {**found, **self.job} if found.get(key) != self.job.get(key)]
        if differing:
            raise ConfigError(f"{path}: holds results of another job ({'; '.join(differing)}): give the command of that job to "
                              "go on with it, name another file with -o, or remove what is there")


def _job_of(part):
    """Return of which job a part is, or None if it was killed before it had said so."""
    first = next(records(part), (1, 0, 0))
    with open(part, "rb") as file:
        file.seek(first[1])
        return json.loads(file.read(first[2])) if first[0] == 0 else None


def _read_job(path):
    """Return what a file says of the job that made the file beside it, or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file, number, value):
    """Append a record."""
    data = to_json(value).encode()
    record = b"%d %08x %b\n" % (number, zlib.crc32(data), data)
    while record:
        record = record[os.write(file, record):]


def records(path):
    """Yield number, start and length of the JSON of each record that is whole."""
    start = 0
    with open(path, "rb") as file:
        for record in file:
            number, _, rest = record.partition(b" ")
            checksum, _, data = rest[:-1].partition(b" ")
            if record.endswith(b"\n") and number.isdigit() and checksum == b"%08x" % zlib.crc32(data):
                yield int(number), start + len(record) - 1 - len(data), len(data)
            start += len(record)


def _remove(folder):
    """Remove a folder of parts, if it is there."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _short(value):
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else value

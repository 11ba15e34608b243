"""``metrics.jsonl``: what every step of a run came to, a line each."""

import contextlib
import json
import os

from mpillm.errors import DataError
from mpillm.files import replacing, to_json, unwritable


class Metrics:
    """The metrics file of a run. Local to the rank that keeps it.

    Parameters
    ----------
    path : pathlib.Path
    step : int
        Lines of later steps, which will be done again, are taken out.

    Attributes
    ----------
    last : dict
        The newest metrics, empty if there are none.

    Raises
    ------
    DataError
        If the file holds something else, and by :meth:`add` if it cannot be written.
    """

    def __init__(self, path, step):
        self.path, self.last = path, {}
        kept, text = [], b""
        with contextlib.suppress(FileNotFoundError):  # any other error is none of an empty file, which would be written
            text = path.read_bytes()
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            try:  # a line without an end was being written when its run died
                if line.endswith(b"\n") and (metrics := json.loads(line))["step"] <= step:
                    kept.append(line)
                    self.last = metrics
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not the metrics of a step ({error!r}): mend or remove it, or "
                                "choose another train.run_dir") from None
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self._last_start = sum(map(len, kept[:-1]))
        self._file = open(path, "ab")

    def add(self, metrics, instead_of_last=False):
        """Append the metrics of a step, or put them in place of the last ones."""
        try:
            if instead_of_last:
                self._file.truncate(self._last_start)
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(to_json(metrics).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.last, self._last_start = metrics, start

    def close(self):
        """Close the file."""
        self._file.close()

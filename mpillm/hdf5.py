"""HDF5 files for reading and for writing, also on file systems that have no locks and on full ones."""

import contextlib
import io
import os
import re

import h5py


def open_to_read(path):
    """Open an HDF5 file that nobody changes, without asking for a lock, which not every file system has.

    Local. Who else has the file open does not matter.

    Raises
    ------
    OSError
        If there is no such file, or it is not HDF5.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" in str(error):  # this process has it open already, with the lock
            return h5py.File(path, "r")
        raise


def system_error(error):
    """Return the number of the system's error behind what h5py raised, or None where it is what the file holds. Local.

    Only opening gives an ``OSError`` with its number; all else, a ``KeyError`` even, tells it in words.
    """
    told = re.search(r"\berrno = (\d+)", str(error))
    return getattr(error, "errno", None) or (int(told[1]) if told else None)


@contextlib.contextmanager
def writing(path):
    """Give a new HDF5 file at ``path``, a name that nobody else uses; on leaving, it is on the disk.

    Local. Asks for no lock.

    Raises
    ------
    OSError
        On leaving, the first error of writing.
    """
    with _KeepsItsError(path, "w+") as raw:
        with h5py.File(raw, "w") as file:
            yield file
        if raw.error:
            raise raw.error
        os.fsync(raw.fileno())


class _KeepsItsError(io.FileIO):
    """A file for HDF5 that never fails to write but keeps the first error, to be raised once HDF5 has closed it.

    HDF5 cannot close what it could not write, and ends the process with a segmentation fault when it leaves. Writing
    also lets other threads run, which HDF5's own writing does not.
    """

    error = None

    def write(self, data):
        """Write all of ``data``, or keep the error."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and not self.error:
                left = left[super().write(left):]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size=None):
        """Set the size, or keep the error."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size

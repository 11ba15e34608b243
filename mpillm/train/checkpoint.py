"""Checkpoints: one plain HDF5 file per writing rank and a JSON manifest, readable at any layout.

Every shard is a contiguous range of the row-major order of one whole tensor. ``step-00000100/`` appears by one rename,
after all files are written, synced and agreed on; what the manifest lists is whole.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path

import h5py
import numpy as np
import torch

from mpillm.errors import CheckpointError, DataError, on_rank_0, together

VERSION = 1
DTYPES = ("float64", "float32")
SHARD_ELEMENTS = 1 << 20  # at most: who reads a part of a shard has all of it in memory for a moment
_NAME = re.compile(r"step-(\d{8})")


def save(folder, step, shards, manifest, comm, keep=3):
    """Write the checkpoint of ``step`` below ``folder`` and drop all but the newest ``keep``.

    Collective over ``comm``. Parameters and errors are those of :class:`Saving`.

    Returns
    -------
    Path
        Of the checkpoint.
    """
    return Saving(folder, step, shards, manifest, comm, keep).finish()


class Saving:
    """A checkpoint that is being written.

    Collective over ``comm``, as are all methods. Nothing is announced before :meth:`finish`.

    Parameters
    ----------
    folder : Path
        The run's ``checkpoints``.
    step : int
    shards : iterable of (name, shape, start, {kind: Tensor})
        What this rank writes: flat tensors that begin at element ``start`` of the whole parameter ``name``.
    manifest : dict
        What else to keep; equal on all ranks.
    comm : Comm
    keep : int
        How many of the newest stay.
    in_background : bool
        Copy the tensors now, and let a thread write them. MPI is left to the calling thread.

    Raises
    ------
    CollectiveError
        On every rank if any could not write; nothing is announced then, and older checkpoints stay.
    """

    def __init__(self, folder, step, shards, manifest, comm, keep=3, in_background=False):
        self.step, self._comm, self._keep, self._manifest = step, comm, keep, manifest
        self._final, self._temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
        self._action, self._error, self._entries, self._thread = f"save {self._final}", None, None, None
        on_rank_0(comm, lambda: _clear(self._temporary), self._action)
        if in_background:
            shards = [(*where, {kind: tensor.detach().clone() for kind, tensor in tensors.items()})
                      for *where, tensors in shards]
            self._thread = threading.Thread(target=self._write, args=(shards,), daemon=True)
            self._thread.start()
        else:
            self._write(shards)

    def _write(self, shards):
        try:
            self._entries = _write_file(self._temporary / f"rank-{self._comm.rank:05d}.h5", shards)
        except (OSError, RuntimeError) as error:  # h5py reports a full disk as either
            self._error = error

    def is_written(self):
        """Return, equal on all ranks, whether all have written their files. Collective; waits for no file."""
        return all(self._comm.allgather(self._thread is None or not self._thread.is_alive()))

    def finish(self):
        """Wait for all ranks' files, announce the checkpoint and drop old ones.

        Collective over the ranks that save.

        Returns
        -------
        Path
            Of the checkpoint.

        Raises
        ------
        CollectiveError
            On every rank if any could not write.
        """
        if self._thread:
            self._thread.join()

        def written():
            if self._error:
                raise DataError(f"{self._action}: {self._error}: free some space, or choose another train.run_dir")
            return self._entries

        gathered = self._comm.gather(together(self._comm, written, self._action))
        on_rank_0(self._comm, lambda: self._publish(gathered), self._action)
        return self._final

    def _publish(self, gathered):
        tensors = {}
        for kind, name, shape, dtype, shard in (entry for part in gathered for entry in part):
            known = tensors.setdefault(kind, {}).setdefault(name, {"shape": shape, "dtype": dtype, "shards": []})
            known["shards"].append(shard)
        _write_manifest(self._temporary, {"version": VERSION, "step": self.step, **self._manifest, "tensors": tensors})
        folder = self._final.parent
        if self._final.exists():
            _retire(self._final)
        os.rename(self._temporary, self._final)
        _sync_folder(folder)
        for old in complete_checkpoints(folder)[:-self._keep]:
            _retire(old)
        for retired in folder.glob("step-*.old"):  # also what an earlier launch did not come to remove
            shutil.rmtree(retired)


def complete_checkpoints(folder):
    """Return the paths of the complete checkpoints below ``folder``, oldest first. Local."""
    found = [path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(path for path in found if (path / "manifest.json").is_file())


def step_of(path):
    """Return the step (int) that the folder ``path`` of a checkpoint is named after. Local."""
    return int(_NAME.fullmatch(path.name)[1])


class Checkpoint:
    """A complete checkpoint, open for reading. Local.

    Parameters
    ----------
    path : Path
        A ``step-…`` folder, or a run or ``checkpoints`` folder whose newest is meant.

    Raises
    ------
    CheckpointError
        If there is none, or its manifest cannot be used.
    """

    def __init__(self, path):
        self.path = _find(Path(path))
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            if self.manifest["version"] != VERSION:
                raise CheckpointError(
                    f"checkpoint {self.path}: format version {self.manifest['version']}, this mpillm reads {VERSION}"
                )
            if self.manifest.pop("sha256") != _digest(self.manifest):
                raise ValueError("its digest does not match")
            self.step, self.tensors = int(self.manifest["step"]), self.manifest["tensors"]
            if not all(isinstance(named, dict) for named in (self.tensors, *self.tensors.values())):
                raise TypeError("tensors must be named by kind and name")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {self.path}: manifest.json cannot be used ({error!r})") from error

    def names(self, kind="weight"):
        """Return the names of the tensors of a kind."""
        return list(self.tensors.get(kind, {}))

    def shape(self, name, kind="weight"):
        """Return the whole shape of a tensor."""
        return tuple(self.tensors[kind][name]["shape"])

    def read(self, name, kind="weight", start=0, stop=None, shape=None):
        """Return elements ``[start, stop)`` of the row-major order of a tensor, joined from its shards.

        Local. Reads the shards that have some of them, one after the other, and checks their digests.

        Parameters
        ----------
        name, kind : str
        start, stop : int
            ``stop`` is the end of the tensor unless given.
        shape : tuple of int, optional
            What the whole tensor must have: nothing larger is then made room for.

        Returns
        -------
        numpy.ndarray, shape (stop - start,)
            In the dtype of the checkpoint.

        Raises
        ------
        CheckpointError
            If the tensor or a part of it is missing, has another shape, or a shard does not match its digest.
        """
        try:
            entry = self.tensors[kind][name]
            whole = tuple(int(size) for size in entry["shape"])
            dtype = np.dtype(DTYPES[DTYPES.index(entry["dtype"])])
            shards = sorted((int(shard["start"]), int(shard["stop"]), str(shard["file"]), str(shard["dataset"]),
                             str(shard["sha256"])) for shard in entry["shards"])
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path}: holds no {kind} of {name}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.path}: the entry of {kind} of {name} cannot be used ({error})"
                                  ) from None
        if shape is not None and whole != tuple(shape):
            raise CheckpointError(f"checkpoint {self.path}: {kind} of {name} has the shape {whole}, the model's is "
                                  f"{tuple(shape)}")
        stop = math.prod(whole) if stop is None else stop
        out, end = np.empty(stop - start, dtype), start
        for first, last, *where in shards:
            low, high = max(start, first), min(stop, last)
            if low < high and low == end:
                out[low - start:high - start] = self._read_shard(last - first, dtype, *where)[low - first:high - first]
                end = high
        if end != stop:
            raise CheckpointError(
                f"checkpoint {self.path}: of the elements {start} to {stop} of {kind} of {name}, those from {end} "
                "are missing"
            )
        return out

    def _read_shard(self, count, dtype, file_name, where, digest):
        """Read one shard and hold it against its digest.

        Follows no link, reads only plain data that lie in the file, and makes room for no more than the file holds.
        """
        file_path = self.path / Path(file_name).name
        try:
            if file_path.is_symlink():
                raise CheckpointError(f"checkpoint file {file_path}: is a link: checkpoints hold plain files")
            with h5py.File(file_path, "r") as file:
                dataset = _plain_dataset(file, where)
                if dataset is None or dataset.shape != (count,) or dataset.dtype != dtype:
                    raise CheckpointError(
                        f"checkpoint file {file_path}: {where} is not the shard the manifest lists"
                    )
                values = dataset[:]
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint file {file_path}: {where} cannot be read ({error})") from error
        if hashlib.sha256(values).hexdigest() != digest:
            raise CheckpointError(f"checkpoint file {file_path}: {where} is damaged, its digest does not match")
        return values


def _plain_dataset(file, where):
    """Return the dataset at a path of hard links whose bytes lie in this file as they are, else None."""
    place = file
    for part in where.split("/"):
        if not isinstance(place, h5py.Group) or not isinstance(place.get(part, getlink=True), h5py.HardLink):
            return None
        place = place[part]
    if not isinstance(place, h5py.Dataset) or place.is_virtual or place.external or place.chunks:
        return None
    return place if place.id.get_storage_size() == place.nbytes else None


def _find(path):
    for folder in (path, path / "checkpoints"):
        if (folder / "manifest.json").is_file():
            return folder
        found = complete_checkpoints(folder) if folder.is_dir() else []
        if found:
            return found[-1]
    raise CheckpointError(f"{path}: neither a checkpoint nor a run with a complete one (step-…/manifest.json)")


def _write_file(path, shards):
    """Write this rank's shards, sync, and return their manifest entries."""
    entries = []
    with _KeepsItsError(path, "w") as raw:
        with h5py.File(raw, "w") as file:
            for kind, name, shape, start, tensor in _cut(shards):
                values, where = _as_numpy(tensor), f"{kind}/{name}/{start}"
                file.create_dataset(where, data=values)
                shard = {"file": path.name, "dataset": where, "start": start, "stop": start + len(values),
                         "sha256": hashlib.sha256(values).hexdigest()}
                entries.append((kind, name, list(shape), values.dtype.name, shard))
        if raw.error:
            raise raw.error
        os.fsync(raw.fileno())
    return entries


def _cut(shards):
    """Yield ``(kind, name, shape, start, tensor)`` of no more than :data:`SHARD_ELEMENTS` each."""
    for name, shape, start, tensors in shards:
        for kind, tensor in tensors.items():
            for low in range(0, len(tensor), SHARD_ELEMENTS):
                yield kind, name, shape, start + low, tensor[low:low + SHARD_ELEMENTS]


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


def _as_numpy(tensor):
    return np.ascontiguousarray(tensor.detach().cpu().numpy() if torch.is_tensor(tensor) else tensor)


def _digest(manifest):
    """Return the SHA-256 of what a manifest says, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder, manifest):
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _retire(path):
    """Take its name from a checkpoint by one rename: removed file by file it would look complete to the last."""
    retired = path.with_suffix(".old")
    shutil.rmtree(retired, ignore_errors=True)
    path.rename(retired)


def _clear(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: one plain HDF5 file per writing rank and a JSON manifest, readable at any layout.

Every shard is a contiguous range of the row-major order of one whole tensor. ``step-00000100/`` appears by one rename,
after all files are written, synced and agreed on (:mod:`mpillm.checkpoint.saving`); what the manifest lists is whole.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
import time
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mpillm.config import Config
from mpillm.errors import CheckpointError, DataError
from mpillm.hdf5 import open_to_read, system_error
from mpillm.model.parameters import parameters

VERSION = 1
MANIFEST_BYTES = 1 << 28  # at most; a shard takes about 300
SHARD_ELEMENTS = 1 << 26  # at most, of one that is read; those written are smaller
PAUSES_S = (0.1, 0.5, 2.0)  # before a file is read again that could not be read for a reason that may pass
_NAME = re.compile(r"step-(\d{8})(\.replaced)?")
# What h5py, json and numpy raise on what was not written by mpillm; deep nesting is a RuntimeError.
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError)
# Errors of the system that say what lies there. All others are of the file system, and say nothing of the checkpoint.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
_PASSING = {errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.ENFILE, errno.EMFILE}
_REMEDIES = {errno.ENOLCK: "set HDF5_USE_FILE_LOCKING=FALSE", errno.EACCES: "ask its owner to let you read it",
             errno.ENOMEM: "give this rank more memory"}


class OtherVersion(CheckpointError):
    """A checkpoint of a format that this version does not know: it is no worse than older ones."""


def complete_checkpoints(folder):
    """Return the complete checkpoints below ``folder``, oldest first. Local.

    Raises
    ------
    OSError
        If the folder cannot be looked at: who went on without would start anew.
    """
    found = {}
    for name in sorted(_names(folder), reverse=True):  # a new one comes after the one that it replaces
        if _NAME.fullmatch(name) and _is_there(path := Path(folder) / name):
            found[path.stem] = path
    return sorted(found.values())


def interrupted_saves(folder):
    """Return the names of what saves that were interrupted left below ``folder``."""
    return sorted(name for name in _names(folder) if re.fullmatch(r"step-.*\.tmp", name))


def _names(folder):
    try:
        return _patiently(os.listdir, folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_there(path):
    """Tell whether a folder has a manifest. Unlike ``Path.is_file`` it does not take every error for a no."""
    try:
        return stat.S_ISREG(_patiently((path / "manifest.json").stat).st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


def _patiently(read, *arguments):
    """Return what ``read`` returns; where the file system fails in a way that may pass, after some tries."""
    for pause_s in PAUSES_S:
        try:
            return read(*arguments)
        except _MALFORMED as error:
            if system_error(error) not in _PASSING:
                raise
        time.sleep(pause_s)
    return read(*arguments)


def _refusal(what, error):
    """Return what to raise for an error of reading ``what``: of the file system, or of what was found there."""
    if isinstance(error, CheckpointError):
        return error
    number = errno.ENOMEM if isinstance(error, MemoryError) else system_error(error)
    if number is None or number in _ABSENT:
        return CheckpointError(f"{what} ({_in_a_line(error)})")
    remedy = _REMEDIES.get(number, "try again when the file system can read it, or name another checkpoint")
    return DataError(f"{what} ([Errno {number}] {os.strerror(number)}), though it may be whole: {remedy}")


def step_of(path):
    """Return the step (int) that the folder ``path`` of a checkpoint is named after. Local."""
    return int(_NAME.fullmatch(path.name)[1])


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 60)]


@dataclass(frozen=True)
class ShardEntry:
    """What a manifest says about one shard: elements ``[start, stop)`` of a tensor, and where they lie."""

    file: str
    dataset: str
    start: _Count
    stop: _Count
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """What a manifest says about one tensor; its shards lie in it."""

    shape: Annotated[list[_Count], Field(max_length=8)]
    dtype: Literal["float64", "float32"]
    shards: list[ShardEntry]

    def __post_init__(self):
        size = math.prod(self.shape)
        if not all(shard.start < shard.stop <= min(size, shard.start + SHARD_ELEMENTS) for shard in self.shards):
            raise ValueError(f"a shard is empty, does not lie in its tensor or has more than {SHARD_ELEMENTS} elements")


_TENSORS = TypeAdapter(dict[str, dict[str, TensorEntry]])


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
    DataError
        Here and in :meth:`read`, if the file system cannot read it: it is no worse for that.
    """

    def __init__(self, path):
        self.path = _find(Path(path))
        try:
            self.manifest = json.loads(_patiently(self._manifest_text))
            if self.manifest["version"] != VERSION:
                raise OtherVersion(f"checkpoint {self.path}: format version {self.manifest['version']}, this mpillm "
                                   f"reads {VERSION}: take the mpillm that wrote it")
            self.digest = self.manifest.pop("sha256")
            if self.digest != digest_of(self.manifest):
                raise ValueError("its digest does not match")
            self.step = TypeAdapter(_Count).validate_python(self.manifest["step"])
            self.tensors = _TENSORS.validate_python(self.manifest.pop("tensors"))
        except _MALFORMED as error:
            raise _refusal(f"checkpoint {self.path}: manifest.json cannot be used", error) from error

    def _manifest_text(self):
        file = self.path / "manifest.json"
        if file.stat().st_size > MANIFEST_BYTES:
            raise ValueError(f"it is longer than {MANIFEST_BYTES} bytes")
        return file.read_text(encoding="utf-8")

    def names(self, kind="weight"):
        """Return the names of the tensors of a kind."""
        return list(self.tensors.get(kind, {}))

    def shape(self, name, kind="weight"):
        """Return the whole shape of a tensor."""
        return tuple(self._entry(name, kind).shape)

    def dtype(self, name, kind="weight"):
        """Return the name of the dtype of a tensor."""
        return self._entry(name, kind).dtype

    def model_section(self):
        """Return the ``[model]`` section of the run; keys that came later than the checkpoint have their defaults.

        Raises
        ------
        ConfigError
            If the manifest has none that can be.
        """
        return Config.from_dict({"model": self.manifest.get("model", {})}, source=self.path).model

    def model(self):
        """Return the model whose weights these are. Reads one shard, before room is made for all.

        Raises
        ------
        ConfigError
            If the manifest names none.
        CheckpointError
            If the weights are not all those of the model, or more than the files can hold.
        """
        model = self.model_section()
        if model.num_layers > len(self.names()):  # before a table is made of them
            raise CheckpointError(f"checkpoint {self.path}: holds {len(self.names())} weights, fewer than "
                                  f"model.num_layers = {model.num_layers}")
        shapes = {name: parameter.shape for name, parameter in parameters(model).items()}
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise self._other_shape(name, "weight", shape)
        held_bytes = sum(path.stat().st_size for path in self.path.glob("rank-*.h5"))
        if 4 * sum(map(math.prod, shapes.values())) > held_bytes:
            raise CheckpointError(f"checkpoint {self.path}: its files hold {held_bytes} bytes, less than the model has")
        # A file may be a hole, and what it takes on the disk is told by some file systems only: a hole has no digest.
        largest = max(shapes, key=lambda name: math.prod(shapes[name]))
        self.read(largest, start=math.prod(shapes[largest]) - 1, shape=shapes[largest])
        return model

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
        entry = self._entry(name, kind)
        if shape is not None and tuple(entry.shape) != tuple(shape):
            raise self._other_shape(name, kind, shape)
        stop, parts = math.prod(entry.shape) if stop is None else stop, []
        end = start
        for shard in sorted(entry.shards, key=lambda shard: shard.start):
            low, high = max(start, shard.start), min(stop, shard.stop)
            if low < high and low == end:
                parts.append((slice(low - start, high - start), shard, slice(low - shard.start, high - shard.start)))
                end = high
        if end != stop:
            raise CheckpointError(
                f"checkpoint {self.path}: of the elements {start} to {stop} of {kind} of {name}, those from {end} "
                "are missing"
            )
        try:
            out = np.empty(stop - start, entry.dtype)
        except _MALFORMED as error:
            raise _refusal(f"checkpoint {self.path}: {kind} of {name} cannot be read", error) from error
        for place, shard, part in parts:
            out[place] = self._read_shard(shard, out.dtype)[part]
        return out

    def _entry(self, name, kind):
        try:
            return self.tensors[kind][name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path}: holds no {kind} of {name}") from None

    def _other_shape(self, name, kind, shape):
        return CheckpointError(f"checkpoint {self.path}: {kind} of {name} has the shape {self.shape(name, kind)}, the "
                               f"model's is {tuple(shape)}")

    def _read_shard(self, shard, dtype):
        """Read one shard and hold it against its digest."""
        file_path, where = self.path / Path(shard.file).name, shard.dataset
        try:
            values = _patiently(_read_dataset, file_path, where, shard.stop - shard.start, dtype)
        except _MALFORMED as error:
            raise _refusal(f"checkpoint file {file_path}: {where} cannot be read", error) from error
        if hashlib.sha256(values).hexdigest() != shard.sha256:
            raise CheckpointError(f"checkpoint file {file_path}: {where} is damaged, its digest does not match")
        return values


def _read_dataset(path, where, length, dtype):
    """Read what a shard is said to be: follow no link, read only plain data of the file, make room for no more."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(f"checkpoint file {path}: is a link or device: checkpoints hold plain files")
    with open_to_read(path) as file:
        dataset = _plain_dataset(file, where)
        if dataset is None or dataset.shape != (length,) or dataset.dtype != dtype:
            raise CheckpointError(f"checkpoint file {path}: {where} is not the shard the manifest lists")
        return dataset[:]


def _in_a_line(error):
    if isinstance(error, ValidationError):  # lists all that it found
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]
    return f"{error!r}"[:300]


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
        if _is_there(folder):
            return folder
        found = complete_checkpoints(folder)
        if found:
            return found[-1]
    raise CheckpointError(f"{path}: neither a checkpoint nor a run with a complete one (step-…/manifest.json)")


def digest_of(manifest):
    """Return the SHA-256 of what a manifest says, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

"""Checkpoints: one plain HDF5 file per writing rank and a JSON manifest, readable at any layout.

Every shard is a contiguous range of the row-major order of one whole tensor. ``step-00000100/`` appears by one rename,
after all files are written, synced and agreed on (:mod:`mpillm.checkpoint.saving`); what the manifest lists is whole.
"""

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mpillm.config import Config
from mpillm.errors import CheckpointError
from mpillm.hdf5 import open_to_read
from mpillm.nn.init import parameter_table

VERSION = 1
MANIFEST_BYTES = 1 << 28  # at most; a shard takes about 300
COMPRESSION = 1000  # at most, by a file system: what takes less room than that is a hole, not data
_NAME = re.compile(r"step-(\d{8})(\.replaced)?")
# What h5py, json and numpy raise on what was not written by mpillm; deep nesting is a RuntimeError.
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError)


def complete_checkpoints(folder):
    """Return the complete checkpoints below ``folder``, oldest first. Local."""
    found = {}
    for path in sorted(Path(folder).glob("step-*"), reverse=True):  # a new one comes after the one that it replaces
        if _NAME.fullmatch(path.name) and (path / "manifest.json").is_file():
            found[path.stem] = path
    return sorted(found.values())


def interrupted_saves(folder):
    """Return the names of what saves that were interrupted left below ``folder``."""
    return sorted(path.name for path in Path(folder).glob("step-*.tmp"))


def step_of(path):
    """Return the step (int) that the folder ``path`` of a checkpoint is named after. Local."""
    return int(_NAME.fullmatch(path.name)[1])


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 60)]


@dataclass(frozen=True)
class Shard:
    """Elements ``[start, stop)`` of a tensor, and where they lie."""

    file: str
    dataset: str
    start: _Count
    stop: _Count
    sha256: str


@dataclass(frozen=True)
class Entry:
    """What a manifest says about one tensor; its shards lie in it."""

    shape: Annotated[list[_Count], Field(max_length=8)]
    dtype: Literal["float64", "float32"]
    shards: list[Shard]

    def __post_init__(self):
        if not all(shard.start < shard.stop <= math.prod(self.shape) for shard in self.shards):
            raise ValueError("a shard is empty or does not lie in its tensor")


_TENSORS = TypeAdapter(dict[str, dict[str, Entry]])


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
            file = self.path / "manifest.json"
            if file.stat().st_size > MANIFEST_BYTES:
                raise ValueError(f"it is longer than {MANIFEST_BYTES} bytes")
            self.manifest = json.loads(file.read_text(encoding="utf-8"))
            if self.manifest["version"] != VERSION:
                raise CheckpointError(
                    f"checkpoint {self.path}: format version {self.manifest['version']}, this mpillm reads {VERSION}"
                )
            if self.manifest.pop("sha256") != digest_of(self.manifest):
                raise ValueError("its digest does not match")
            self.step = TypeAdapter(_Count).validate_python(self.manifest["step"])
            self.tensors = _TENSORS.validate_python(self.manifest.pop("tensors"))
        except _MALFORMED as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint {self.path}: manifest.json cannot be used ({_in_a_line(error)})"
                                  ) from error

    def names(self, kind="weight"):
        """Return the names of the tensors of a kind."""
        return list(self.tensors.get(kind, {}))

    def shape(self, name, kind="weight"):
        """Return the whole shape of a tensor."""
        return tuple(self._entry(name, kind).shape)

    def model(self):
        """Return the model whose weights these are.

        Raises
        ------
        ConfigError
            If the manifest names none.
        CheckpointError
            If the weights are not all those of the model, or more than the files can hold.
        """
        model = Config.from_dict({"model": self.manifest.get("model", {})}, source=self.path).model
        if model.num_layers > len(self.names()):  # before a table is made of them
            raise CheckpointError(f"checkpoint {self.path}: holds {len(self.names())} weights, fewer than "
                                  f"model.num_layers = {model.num_layers}")
        shapes = {name: shape for name, (shape, _) in parameter_table(model).items()}
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise self._other_shape(name, "weight", shape)
        files = [path.stat() for path in self.path.glob("rank-*.h5")]
        held_bytes = sum(min(file.st_size, COMPRESSION * 512 * file.st_blocks) for file in files)
        if 4 * sum(map(math.prod, shapes.values())) > held_bytes:
            raise CheckpointError(f"checkpoint {self.path}: its files hold {held_bytes} bytes, less than the model has")
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
            raise CheckpointError(f"checkpoint {self.path}: {kind} of {name} cannot be read ({error})") from error
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
        """Read one shard and hold it against its digest.

        Follows no link, reads only plain data that lie in the file, and makes room for no more than the shard.
        """
        file_path, where = self.path / Path(shard.file).name, shard.dataset
        try:
            if not stat.S_ISREG(os.lstat(file_path).st_mode):
                raise CheckpointError(f"checkpoint file {file_path}: is a link or device: checkpoints hold plain files")
            with open_to_read(file_path) as file:
                dataset = _plain_dataset(file, where)
                if dataset is None or dataset.shape != (shard.stop - shard.start,) or dataset.dtype != dtype:
                    raise CheckpointError(
                        f"checkpoint file {file_path}: {where} is not the shard the manifest lists"
                    )
                values = dataset[:]
        except _MALFORMED as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint file {file_path}: {where} cannot be read ({_in_a_line(error)})"
                                  ) from error
        if hashlib.sha256(values).hexdigest() != shard.sha256:
            raise CheckpointError(f"checkpoint file {file_path}: {where} is damaged, its digest does not match")
        return values


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
        if (folder / "manifest.json").is_file():
            return folder
        found = complete_checkpoints(folder) if folder.is_dir() else []
        if found:
            return found[-1]
    raise CheckpointError(f"{path}: neither a checkpoint nor a run with a complete one (step-…/manifest.json)")


def digest_of(manifest):
    """Return the SHA-256 of what a manifest says, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

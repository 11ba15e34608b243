"""Checkpoints: one plain HDF5 file per writing rank and a JSON manifest, readable at any layout.

Every shard is a contiguous range of the row-major order of one whole tensor. ``step-00000100/`` appears by one rename,
after all files are written, synced and agreed on; what the manifest lists is whole.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import torch

from mpillm.errors import CheckpointError, together

VERSION = 1
_NAME = re.compile(r"step-(\d{8})")


def save(folder, step, shards, manifest, comm, keep=3):
    """Write the checkpoint of ``step`` below ``folder`` and drop all but the newest ``keep``.

    Collective over ``comm``.

    Parameters
    ----------
    folder : Path
        The run's ``checkpoints``.
    shards : iterable of (name, shape, start, {kind: Tensor})
        What this rank writes: flat tensors that begin at element ``start`` of the whole parameter ``name``.
    manifest : dict
        What else to keep; equal on all ranks.

    Returns
    -------
    Path

    Raises
    ------
    CollectiveError
        On every rank if any could not write; nothing is announced then, and older checkpoints stay.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    action = f"save {final}"
    together(comm, lambda: _clear(temporary) if comm.rank == 0 else None, action)
    entries = together(comm, lambda: _write_file(temporary / f"rank-{comm.rank:05d}.h5", shards), action)
    gathered = comm.gather(entries)

    def publish():
        tensors = {}
        for kind, name, shape, dtype, shard in (entry for part in gathered for entry in part):
            known = tensors.setdefault(kind, {}).setdefault(name, {"shape": shape, "dtype": dtype, "shards": []})
            known["shards"].append(shard)
        _write_manifest(temporary, {"version": VERSION, "step": step, **manifest, "tensors": tensors})
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync_folder(folder)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)

    together(comm, publish if comm.rank == 0 else lambda: None, action)
    return final


def complete_checkpoints(folder):
    """Return the complete checkpoints below ``folder``, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(path for path in found if (path / "manifest.json").is_file())


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
            self.step, self.tensors = int(self.manifest["step"]), self.manifest["tensors"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {self.path}: manifest.json cannot be used ({error!r})") from error

    def names(self, kind="weight"):
        """Return the names of the tensors of a kind."""
        return list(self.tensors.get(kind, {}))

    def shape(self, name, kind="weight"):
        """Return the whole shape of a tensor."""
        return tuple(self.tensors[kind][name]["shape"])

    def read(self, name, kind="weight", start=0, stop=None):
        """Return elements ``[start, stop)`` of the row-major order of a tensor, joined from its shards.

        Raises
        ------
        CheckpointError
            If the tensor or a part of it is missing, or a shard does not match its digest.
        """
        try:
            entry = self.tensors[kind][name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path}: holds no {kind} of {name}") from None
        stop = int(np.prod(entry["shape"])) if stop is None else stop
        out, end = np.empty(stop - start, np.dtype(entry["dtype"])), start
        for shard in sorted(entry["shards"], key=lambda shard: shard["start"]):
            low, high = max(start, shard["start"]), min(stop, shard["stop"])
            if low < high and low == end:
                values = self._read_shard(shard, out.dtype)
                out[low - start:high - start] = values[low - shard["start"]:high - shard["start"]]
                end = high
        if end != stop:
            raise CheckpointError(
                f"checkpoint {self.path}: of the elements {start} to {stop} of {kind} of {name}, those from {end} "
                "are missing"
            )
        return out

    def _read_shard(self, shard, dtype):
        """Read one shard and hold it against its digest; follows no link out of the file."""
        file_path, where = self.path / Path(shard["file"]).name, shard["dataset"]
        try:
            with h5py.File(file_path, "r") as file:
                link = file.get(where, getlink=True)
                dataset = file[where] if isinstance(link, h5py.HardLink) else None
                if dataset is None or dataset.is_virtual or dataset.external or dataset.shape != (
                        shard["stop"] - shard["start"],) or dataset.dtype != dtype:
                    raise CheckpointError(
                        f"checkpoint file {file_path}: {where} is not the shard the manifest lists"
                    )
                values = dataset[:]
        except (OSError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint file {file_path}: {where} cannot be read ({error})") from error
        if hashlib.sha256(values).hexdigest() != shard["sha256"]:
            raise CheckpointError(f"checkpoint file {file_path}: {where} is damaged, its digest does not match")
        return values


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
    with h5py.File(path, "w") as file:
        for name, shape, start, tensors in shards:
            for kind, tensor in tensors.items():
                values = _as_numpy(tensor)
                where = f"{kind}/{name}/{start}"
                file.create_dataset(where, data=values)
                shard = {"file": path.name, "dataset": where, "start": start, "stop": start + len(values),
                         "sha256": hashlib.sha256(values).hexdigest()}
                entries.append((kind, name, list(shape), values.dtype.name, shard))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return entries


def _as_numpy(tensor):
    return np.ascontiguousarray(tensor.detach().cpu().numpy() if torch.is_tensor(tensor) else tensor)


def _write_manifest(folder, manifest):
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _clear(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writing of checkpoints (:mod:`mpillm.checkpoint.reading`): every rank its file, announced by one rename."""

import hashlib
import json
import os
import shutil
import threading
import warnings
from itertools import count

import numpy as np
import torch

from mpillm import hdf5
from mpillm.checkpoint.reading import VERSION, complete_checkpoints, digest_of, step_of
from mpillm.errors import DataError, agreed, on_rank_0
from mpillm.files import remedy, sync

SHARD_ELEMENTS = 1 << 20  # at most: who reads a part of a shard has all of it in memory for a moment


def save(folder, step, shards, manifest, comm, keep=3):
    """Write the checkpoint of ``step`` below ``folder``; of those up to it keep the newest ``keep``, or all for None.

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
    keep : int or None
        How many stay, the newest of those up to this step; all for None.
    in_background : bool
        Let a thread copy the tensors and write them. They must not change before :meth:`wait_copied`. MPI is left to
        the calling thread.

    Raises
    ------
    CollectiveError
        On every rank if any could not write; nothing is announced then, and older checkpoints stay.
    """

    def __init__(self, folder, step, shards, manifest, comm, keep=3, in_background=False):
        self.step, self._comm, self._keep, self._manifest = step, comm, keep, manifest
        self._final, self._temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
        self._action, self._error, self._entries, self._thread = f"save {self._final}", None, None, None
        on_rank_0(comm, self._action, self._clear)
        self._is_copied = threading.Event()
        if in_background:
            self._thread = threading.Thread(target=self._write, args=(shards,), daemon=True)
            self._thread.start()
        else:
            self._write(shards)

    def _write(self, shards):
        try:
            if self._thread:
                shards = self._copied(shards)
            self._entries = _write_file(self._temporary / f"rank-{self._comm.rank:05d}.h5", shards)
        except Exception as error:  # the thread has nobody to raise it to
            self._error = error

    def _copied(self, shards):
        try:
            return [(*where, {kind: tensor.detach().clone() for kind, tensor in tensors.items()})
                    for *where, tensors in shards]
        finally:
            self._is_copied.set()

    def wait_copied(self):
        """Wait until this rank's tensors may change. Local; of what is saved in the background."""
        self._is_copied.wait()

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
        with agreed(self._comm, self._action):
            if self._error:
                what = f"{type(self._error).__name__}: {self._error}"
                raise DataError(f"{self._action}: {what}: {remedy(self._error)}, or choose another train.run_dir"
                                ) from self._error
        on_rank_0(self._comm, self._action, self._announce, self._comm.gather(self._entries))
        return self._final

    def _announce(self, gathered):
        """Write the manifest from all ranks' entries and give the checkpoint its name; drop old ones."""
        tensors = {}
        for kind, name, shape, dtype, shard in (entry for part in gathered for entry in part):
            known = tensors.setdefault(kind, {}).setdefault(name, {"shape": shape, "dtype": dtype, "shards": []})
            known["shards"].append(shard)
        _write_manifest(self._temporary, {"version": VERSION, "step": self.step, **self._manifest, "tensors": tensors})
        folder, replaced = self._final.parent, self._final.with_suffix(".replaced")
        if self._final.exists():
            _make_way(replaced)
            os.rename(self._final, replaced)  # which stands for it until the next line is done
        os.rename(self._temporary, self._final)
        sync(folder)
        try:
            replaced = [path for path in folder.glob("step-*.replaced") if path.with_suffix("").exists()]
            # newer ones are there where they turned out to be damaged: they must not push out what is whole
            up_to_this = [path for path in complete_checkpoints(folder) if step_of(path) <= self.step]
            bad = [path for path in folder.glob(f"step-{'[0-9]' * 8}.bad") if path.stem <= self._final.name]
            for old in (*replaced, *bad, *up_to_this[:-(self._keep or len(up_to_this))]):
                _retire(old)
        except OSError as error:
            _warn(folder, error)
        if self._thread:
            threading.Thread(target=_remove_retired, args=(folder,)).start()
        else:
            _remove_retired(folder)

    def _clear(self):
        """Make an empty temporary folder; remove those of saves that were interrupted."""
        for left in self._final.parent.glob("step-*.tmp"):
            _make_way(left)
        self._temporary.mkdir(parents=True)


def set_aside(folder, first):
    """Take their names from the checkpoints of step ``first`` or later, which nobody should go on from.

    Local. ``step-00000005.bad`` stays until a checkpoint of that step or later is announced; it can be named.

    Returns
    -------
    list of str
        Their new names.
    """
    bad = [path for path in complete_checkpoints(folder) if step_of(path) >= first]
    for path in bad:
        _make_way(path.with_suffix(".bad"))
        path.rename(path.with_suffix(".bad"))
    return [f"{path.stem}.bad" for path in bad]


def _write_file(path, shards):
    """Write this rank's shards, sync, and return their manifest entries."""
    entries = []
    with hdf5.writing(path) as file:
        for kind, name, shape, start, tensor in _cut(shards):
            values, where = _as_numpy(tensor), f"{kind}/{name}/{start}"
            file.create_dataset(where, data=values)
            shard = {"file": path.name, "dataset": where, "start": start, "stop": start + len(values),
                     "sha256": hashlib.sha256(values).hexdigest()}
            entries.append((kind, name, list(shape), values.dtype.name, shard))
    return entries


def _cut(shards):
    """Yield ``(kind, name, shape, start, tensor)`` of no more than :data:`SHARD_ELEMENTS` each."""
    for name, shape, start, tensors in shards:
        for kind, tensor in tensors.items():
            for low in range(0, len(tensor), SHARD_ELEMENTS):
                yield kind, name, shape, start + low, tensor[low:low + SHARD_ELEMENTS]


def _as_numpy(tensor):
    if torch.is_tensor(tensor):  # frozen weights have no wider masters, and numpy no bfloat16
        tensor = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
    return np.ascontiguousarray(tensor)


def _write_manifest(folder, manifest):
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": digest_of(manifest)}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def _make_way(path):
    """Remove a folder, or at least take its name: over NFS files stay while somebody has them open."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        _retire(path)


def _retire(path):
    """Take its name from a folder by one rename: a checkpoint removed file by file would look complete to the last."""
    used = {retired.name for retired in path.parent.glob(f"{path.stem}.*.old")}
    path.rename(next(retired for number in count() if (retired := path.with_suffix(f".{number}.old")).name not in used))


def _remove_retired(folder):
    """Remove what lost its name, also what an earlier launch did not come to; a large file takes its time."""
    for retired in folder.glob("step-*.old"):
        try:
            shutil.rmtree(retired)
        except FileNotFoundError:
            pass  # the save before is at it
        except OSError as error:  # such as a file that somebody reads over NFS
            _warn(folder, error)


def _warn(folder, error):
    warnings.warn(f"{folder}: an old checkpoint cannot be removed ({error}); the next save tries again", stacklevel=3)



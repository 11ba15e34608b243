"""Checkpoints that somebody changed who knows the format: data or manifest are edited, and all digests made to match.

    python tests/tools/mutations.py CHECKPOINT FIRST COUNT

Each of COUNT copies is changed in a way that its seed decides, and read in this process, whose memory is limited: what
is read has the model's shapes and comes from the copy alone, everything else is refused, and nothing large is made
room for. Prints how many were read and refused, by kind of change.
"""

import hashlib
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from mpillm.checkpoint import reading
from mpillm.errors import CheckpointError, ConfigError

CANARY = np.float32(12345.678)
ROOM_BYTES = 16 << 20
NASTY = [None, True, -1, 0, 1, 3, 64, 1 << 31, 1 << 40, 1 << 62, 1 << 200, 0.5, float("nan"), float("inf"), "", "x",
         "..", "/etc/passwd", "a\0b", "\ud800", "float64", "object", [], {}, [[]], [-1], [1 << 40], {"x": 1}, "x" * 100_000]


def nodes(value, path=()):
    """Yield the path of every value in nested JSON but the whole."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


class Mutation:
    """One change of the checkpoint in ``path``; kinds are its methods. ``elsewhere`` has the canaries."""

    def __init__(self, path, elsewhere, rng):
        self.path, self.file, self.elsewhere, self.rng = path, path / "rank-00000.h5", elsewhere, rng
        self.manifest = json.loads((path / "manifest.json").read_text())
        del self.manifest["sha256"]
        kinds = self.manifest["tensors"]
        self.entry = self.pick(list(self.pick(list(kinds.values())).values()))
        self.shard = self.pick(self.entry["shards"])

    def pick(self, of):
        return of[self.rng.integers(len(of))]

    def save(self):
        """Write the manifest with a digest that matches."""
        text = json.dumps(self.manifest, sort_keys=True)
        (self.path / "manifest.json").write_text(
            json.dumps({**self.manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}))

    def count(self):
        return self.shard["stop"] - self.shard["start"]

    def replace(self, make):
        with h5py.File(self.file, "a") as file:
            del file[self.shard["dataset"]]
            make(file, self.shard["dataset"])

    def values(self):
        """Other values, which are to be read."""
        values = self.rng.standard_normal(self.count()).astype(np.float32)
        with h5py.File(self.file, "a") as file:
            file[self.shard["dataset"]][:] = values
        self.shard["sha256"] = hashlib.sha256(values).hexdigest()

    def link(self):
        """What lies elsewhere, with the digest of what is there."""
        self.shard["sha256"] = hashlib.sha256(np.full(self.count(), CANARY)).hexdigest()
        canary, raw, count = self.elsewhere / "canary.h5", self.elsewhere / "canary.raw", self.count()

        def virtual(file, where):
            layout = h5py.VirtualLayout((count,), np.float32)
            layout[:] = h5py.VirtualSource(canary, "x", (count,))
            file.create_virtual_dataset(where, layout)

        with h5py.File(canary, "w") as file:
            file["x"] = np.full(count, CANARY)
            file[self.shard["dataset"]] = file["x"]
        raw.write_bytes(np.full(count, CANARY).tobytes())
        way = self.rng.integers(6)
        if way == 0:
            self.file.unlink()
            self.file.symlink_to(canary)
        elif way == 1:
            self.shard.update(file=f"../{self.elsewhere.name}/canary.h5", dataset="x")
        else:
            self.replace([
                lambda file, where: file.__setitem__(where, h5py.ExternalLink(canary, "x")), virtual,
                lambda file, where: file.create_dataset(where, (count,), np.float32, external=[(raw, 0, 4 * count)]),
                lambda file, where: file.__setitem__(where, h5py.SoftLink("/weight")),
            ][way - 2])

    def size(self):
        """Another number of elements; file and manifest agree on it."""
        count = int(self.pick([1, 62, 64, 10**6, 10**9, 10**10]))
        self.entry["shape"] = self.pick([self.entry["shape"], [count], [count, 1]])
        self.entry["shards"] = [self.shard]
        self.shard.update(start=0, stop=count)

        def sparse(file, where):
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            h5py.h5d.create(file.id, where.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((count,)), plist)

        self.replace(sparse)

    def json(self):
        """Something else, or nothing, somewhere in the manifest."""
        *way, last = self.pick(list(nodes(self.manifest)))
        place = self.manifest
        for key in way:
            place = place[key]
        if self.rng.random() < 0.2:
            del place[last]
        else:
            place[last] = self.pick(NASTY)

    def deep(self):
        """Nested further than anybody reads."""
        value = self.pick(NASTY)
        for _ in range(900):
            value = [value]
        self.entry["shape"] = value

    def special(self):
        """Something that is no HDF5 file."""
        self.file.unlink()
        self.pick([lambda: os.mkfifo(self.file), self.file.mkdir, self.file.touch,
                   lambda: self.file.write_bytes(pickle.dumps(NASTY))])()

    def bytes(self):
        """A byte of the file, and the digest of what is then read."""
        raw = bytearray(self.file.read_bytes())
        raw[int(self.rng.integers(len(raw)))] ^= 1 << int(self.rng.integers(8))
        self.file.write_bytes(raw)
        try:
            with h5py.File(self.file) as file:
                self.shard["sha256"] = hashlib.sha256(file[self.shard["dataset"]][:]).hexdigest()
        except Exception:  # whatever HDF5 says; the reader is tried next
            pass


KINDS = ("values", "link", "size", "json", "deep", "special", "bytes")


def read(path, shapes):
    """Read everything that the model has; return it, or None if anything was refused."""
    found = None
    try:
        source = reading.Checkpoint(path)
        found = [source.read(name, kind, shape=shape)
                 for kind in ("weight", "exp_avg") for name, shape in shapes.items()]
        source.model()
    except ConfigError:  # of the model that the manifest names
        return found
    except CheckpointError:
        return None
    return found


def main(original, first, count):
    """Change and read; return the exit code."""
    whole = reading.Checkpoint(original)
    shapes, outcomes = {name: whole.shape(name) for name in whole.names()}, Counter()
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (256 << 20),) * 2)
    # Where memory was asked for that is not there, it was too much.
    reading._MALFORMED = tuple(kind for kind in reading._MALFORMED if kind is not MemoryError)
    tracemalloc.start()
    for seed in range(first, first + count):
        kind = KINDS[seed % len(KINDS)]
        with tempfile.TemporaryDirectory() as name:
            path, elsewhere = Path(name) / "step-00000003", Path(name) / "elsewhere"
            elsewhere.mkdir()
            shutil.copytree(original, path)
            mutation = Mutation(path, elsewhere, np.random.default_rng(seed))
            getattr(mutation, kind)()
            mutation.save()
            tracemalloc.reset_peak()
            found = read(path, shapes)
            room_bytes = tracemalloc.get_traced_memory()[1]
        assert room_bytes < ROOM_BYTES, f"seed {seed}, {kind}: made room for {room_bytes} bytes"
        for values, shape in zip(found or (), [*shapes.values()] * 2):
            assert values.size == np.prod(shape) and values.dtype == np.float32, f"seed {seed}, {kind}: {values}"
            assert CANARY not in values, f"seed {seed}, {kind}: read what lies elsewhere"
        assert found or kind != "values", f"seed {seed}: refused other values"
        assert not found or kind not in ("link", "size", "deep", "special"), f"seed {seed}: read after {kind}"
        outcomes[f"{kind} {'read' if found else 'refused'}"] += 1
    print(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

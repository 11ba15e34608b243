"""Checkpoints on one process: written, read with h5py and numpy alone, joined at other ranges, damaged."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mpillm.checkpoint import reading, saving
from mpillm.checkpoint import start as starting
from mpillm.checkpoint.reading import Checkpoint, complete_checkpoints, interrupted_saves, step_of
from mpillm.checkpoint.saving import Saving, save
from mpillm.comm.single import SingleComm
from mpillm.config import Model
from mpillm.errors import INPUT_OUTPUT, CheckpointError, DataError
from mpillm.model.parameters import parameters

SHAPES = {"embedding.weight": (9, 7), "norm.weight": (7,)}
MUTATIONS = int(os.environ.get("MPILLM_MUTATIONS", "100"))
CUTS = {"embedding.weight": (0, 5, 32, 63), "norm.weight": (0, 7)}


def values(name, kind, dtype=torch.float32):
    seed = int.from_bytes(hashlib.sha256(f"{name}/{kind}".encode()).digest()[:4], "big")
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=torch.Generator().manual_seed(seed)).to(dtype)


def shards(dtype=torch.float32):
    for name, cuts in CUTS.items():
        for start, stop in pairwise(cuts):
            tensors = {kind: values(name, kind, dtype)[start:stop] for kind in ("weight", "exp_avg")}
            yield name, SHAPES[name], start, tensors


def write(folder, step=3, keep=3, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    return save(folder, step, shards(dtype), {"seed": 5}, SingleComm(), keep)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "checkpoints")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_written_is_read(tmp_path, dtype):
    found = Checkpoint(write(tmp_path / "checkpoints", dtype=dtype))
    assert found.step == 3 and found.manifest["seed"] == 5
    assert sorted(found.names()) == sorted(found.names("exp_avg")) == sorted(SHAPES)
    for name, shape in SHAPES.items():
        assert found.shape(name) == shape
        for kind in ("weight", "exp_avg"):
            read = found.read(name, kind)
            assert read.dtype == values(name, kind, dtype).numpy().dtype
            assert read.tobytes() == values(name, kind, dtype).numpy().tobytes()


def test_any_range_is_joined_from_the_shards(path):
    found, whole = Checkpoint(path), values("embedding.weight", "weight").numpy()
    for start in range(0, 64, 3):
        for stop in range(start, 64, 4):
            assert (found.read("embedding.weight", "weight", start, stop) == whole[start:stop]).all()


def test_who_reads_a_part_has_little_more_than_that_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_ELEMENTS", 10)
    found, whole = Checkpoint(write(tmp_path / "checkpoints")), values("embedding.weight", "weight").numpy()
    read_shard, seen = Checkpoint._read_shard, []

    def watched(self, shard, *where):
        seen.append(shard.stop - shard.start)
        return read_shard(self, shard, *where)

    monkeypatch.setattr(Checkpoint, "_read_shard", watched)
    assert (found.read("embedding.weight", "weight", 35, 50) == whole[35:50]).all()
    assert seen == [10, 10]  # from 32 and 42 on, as the third part was cut
    assert (found.read("embedding.weight") == whole).all() and sum(seen[2:]) == 63


def test_the_format_needs_only_h5py_and_numpy(path):
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 1 and manifest["step"] == 3
    for kind, tensors in manifest["tensors"].items():
        for name, entry in tensors.items():
            whole = np.full(np.prod(entry["shape"]), np.nan, entry["dtype"])
            for shard in entry["shards"]:
                with h5py.File(path / shard["file"]) as file:
                    part = file[shard["dataset"]][:]
                assert hashlib.sha256(part.tobytes()).hexdigest() == shard["sha256"]
                whole[shard["start"]:shard["stop"]] = part
            assert (whole.reshape(entry["shape"]) == values(name, kind).numpy().reshape(SHAPES[name])).all()


def test_a_run_and_its_checkpoints_stand_for_the_newest(tmp_path, path):
    newer = write(tmp_path / "checkpoints", step=12)
    for given in (tmp_path, tmp_path / "checkpoints", newer):
        assert Checkpoint(given).step == 12
    assert Checkpoint(path).step == 3


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        write(tmp_path / "checkpoints", step, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-00000010", "step-00000011"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000011"]


def test_a_newer_one_that_is_damaged_does_not_push_out_what_is_whole(tmp_path):
    for step in (4, 9):
        write(tmp_path, step, keep=1)
    for path in (tmp_path / "step-00000009").glob("rank-*.h5"):
        path.unlink()
    for step in (6, 7):  # as a run does that went back behind it
        write(tmp_path, step, keep=1)
        assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [step, 9]


def test_unfinished_and_foreign_folders_are_ignored(tmp_path, path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(path, folder / "step-00000009.tmp")
    (folder / "step-00000008").mkdir()
    (folder / "step-9").mkdir()
    (folder / "notes").mkdir()
    assert complete_checkpoints(folder) == [path] and Checkpoint(folder).step == 3


def test_left_over_temporary_files_do_not_enter_the_next_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-00000003.tmp", "step-00000002.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rank-00007.h5").write_text("left over")
    assert interrupted_saves(folder) == ["step-00000002.tmp", "step-00000003.tmp"]
    assert sorted(file.name for file in write(folder).iterdir()) == ["manifest.json", "rank-00000.h5"]
    assert os.listdir(folder) == ["step-00000003"]


class Killed(BaseException):
    pass


def test_a_step_that_is_saved_again_is_there_at_every_moment(path, monkeypatch):
    folder, rename, left = path.parent, os.rename, 1

    def dies(*names):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        rename(*names)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(Killed):  # between taking the old one's name away and giving it to the new one
        write(folder)
    monkeypatch.undo()
    (kept,) = complete_checkpoints(folder)
    assert not path.exists() and step_of(kept) == Checkpoint(folder).step == 3
    assert Checkpoint(folder).read("norm.weight").tobytes() == values("norm.weight", "weight").numpy().tobytes()
    assert write(folder) == path and os.listdir(folder) == [path.name]
    shutil.copytree(path, folder / "step-00000003.replaced")  # as a kill after giving the name leaves it
    write(folder, 4)
    assert sorted(os.listdir(folder)) == [path.name, "step-00000004"]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    folder, remove = tmp_path / "checkpoints", shutil.rmtree

    def busy(path, ignore_errors=False):
        if path.suffix == ".old" and not ignore_errors:
            raise OSError(39, "Directory not empty")
        remove(path, ignore_errors)

    write(folder, 1)
    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.warns(UserWarning, match="cannot be removed.*not empty"):
        write(folder, 2, keep=1)
    assert [path.name for path in complete_checkpoints(folder)] == ["step-00000002"]
    monkeypatch.undo()
    write(folder, 3, keep=1)
    assert os.listdir(folder) == ["step-00000003"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path, path):
    (path / "manifest.json").write_text("{}")
    assert Checkpoint(write(tmp_path / "checkpoints")).step == 3


def test_a_failure_to_write_leaves_the_older_checkpoint(tmp_path, path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full_disk)
    with pytest.raises(DataError, match="save .*No space left"):
        write(tmp_path / "checkpoints", step=4)
    assert complete_checkpoints(tmp_path / "checkpoints") == [path]


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        found = Checkpoint(path)
        for kind in ("weight", "exp_avg"):
            for name in SHAPES:
                found.read(name, kind)
    assert caught.value.exit_code == INPUT_OUTPUT and "\n" not in str(caught.value)


def test_a_checkpoint_that_somebody_has_locked(path):
    with open(path / "rank-00000.h5", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert Checkpoint(path).read("norm.weight").shape == (7,)


def test_nothing_there(tmp_path):
    refused(tmp_path / "absent", "absent: neither a checkpoint nor a run")
    refused(tmp_path, "neither a checkpoint nor a run")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"version": 1}', '{"version": 1, "step": "x"}', "\ud800",
                                  "[" * 100_000, " " * 2000])
def test_a_manifest_that_cannot_be_used(path, text, monkeypatch):
    (path / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    if not text.strip() and text:
        monkeypatch.setattr(reading, "MANIFEST_BYTES", 1999)
        text = "longer than 1999"
    else:
        text = "manifest.json cannot be used"
    refused(path, text)


@pytest.mark.parametrize("step", [-1, True, 1.0, "3", None, 1 << 70])
def test_a_step_that_is_none(path, step):
    change_manifest(path, lambda manifest: manifest.update(step=step))
    refused(path, "manifest.json cannot be used")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(path):
    (path / "rank-00000.h5").unlink()
    os.mkfifo(path / "rank-00000.h5")
    refused(path, "is a link or device")


MODEL = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_size": 8, "vocab_size": 16}


def with_model(folder):
    folder.mkdir()
    shards = [(name, parameter.shape, 0, {"weight": torch.zeros(parameter.size)})
              for name, parameter in parameters(Model(**MODEL)).items()]
    return save(folder, 3, shards, {"model": MODEL}, SingleComm())


def test_the_model_is_the_one_whose_weights_are_there(tmp_path):
    assert Checkpoint(with_model(tmp_path / "checkpoints")).model() == Model(**MODEL)


@pytest.mark.parametrize("change, match", [
    ({"num_layers": 10**12}, "holds 12 weights, fewer than model.num_layers"), ({"num_layers": 2}, "holds no weight"),
    ({"vocab_size": 17}, r"has the shape \(16, 8\), the model's is \(17, 8\)"),
    ({"vocab_size": 10**12}, "less than the model has"),
])
def test_a_model_that_is_not_there_is_refused_before_room_is_made(tmp_path, change, match):
    path = with_model(tmp_path / "checkpoints")

    def lie(manifest):
        manifest["model"].update(change)
        if change.get("vocab_size") == 10**12:  # in the shapes too, of a file that is as large, but a hole
            for name in ("embedding.weight", "head.weight"):
                manifest["tensors"]["weight"][name].update(shape=[10**12, 8])
            os.truncate(path / "rank-00000.h5", 10**12)

    change_manifest(path, lie)
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(path).model()


def hole(file, where, count):
    """Make a dataset to which nothing was written, and whose file has nothing there."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    h5py.h5d.create(file.id, where.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((count,)), plist)


def test_a_hole_in_a_file_is_refused_before_room_is_made(tmp_path):
    """All sizes agree, and shards cover the weights; what lies on the disk is asked of nobody."""
    path, count, number = with_model(tmp_path / "checkpoints"), 1 << 22, 1000

    def lie(manifest):
        manifest["model"].update(vocab_size=number * count // 8)
        for name in ("embedding.weight", "head.weight"):
            entry = manifest["tensors"]["weight"][name]
            shard = {**entry["shards"][0], "dataset": "hole"}
            entry.update(shape=[number * count // 8, 8], shards=[
                {**shard, "start": start, "stop": start + count} for start in range(0, number * count, count)])

    with h5py.File(path / "rank-00000.h5", "a") as file:
        hole(file, "hole", count)
    change_manifest(path, lie)
    with pytest.raises(CheckpointError, match="less than the model has"):  # one dataset does not stand for many
        Checkpoint(path).model()
    os.truncate(path / "rank-00000.h5", 10**11)
    with pytest.raises(CheckpointError, match="hole is damaged"):
        Checkpoint(path).model()


def test_nothing_is_asked_that_file_systems_need_not_tell(tmp_path, monkeypatch):
    """Blocks, times and numbers of files; folders that cannot be synced."""
    stat, fsync = Path.stat, os.fsync

    def bare(self, **options):
        found = stat(self, **options)
        return os.stat_result((found.st_mode, 0, 0, 1, 0, 0, found.st_size, 0, 0, 0))  # st_blocks is 0 here, too

    def only_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(Path, "stat", bare)
    monkeypatch.setattr(os, "fsync", only_files)
    path = with_model(tmp_path / "checkpoints")
    assert path.stat().st_mtime == 0 and Checkpoint(path).model() == Model(**MODEL)


def test_another_format_version(path):
    change_manifest(path, lambda manifest: manifest.update(version=2))
    refused(path, "format version 2, this mpillm reads 1")
    with pytest.raises(CheckpointError, match="format version 2"):  # which is no reason to take an older one
        write(path.parent, 2)
        starting.newest(path.parents[1])


def fails(monkeypatch, times, number, in_words):
    """Let reading a dataset fail so many times, as the system or as HDF5 tells it."""
    left, original = [times], reading.open_to_read

    def failing(path):
        if left[0]:
            left[0] -= 1
            raise KeyError(f"Unable to open object (file read failed, errno = {number}, error message = 'x')"
                           ) if in_words else OSError(number, "as the system says")
        return original(path)

    monkeypatch.setattr(reading, "open_to_read", failing)
    monkeypatch.setattr(reading, "PAUSES_S", (0, 0))
    return left


@pytest.mark.parametrize("in_words", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EACCES, errno.ENOLCK])
def test_a_file_system_that_fails_says_nothing_of_a_checkpoint(path, monkeypatch, number, in_words):
    passes = number not in (errno.EACCES, errno.ENOLCK)
    write(path.parent, 2)
    fails(monkeypatch, 2 if passes else 0, number, in_words)
    assert Checkpoint(path).read("norm.weight").tobytes() == values("norm.weight", "weight").numpy().tobytes()
    left = fails(monkeypatch, 10, number, in_words)
    with pytest.raises(DataError, match=rf"rank-00000.h5.*\[Errno {number}\].*may be whole") as caught:
        Checkpoint(path).read("norm.weight")
    assert not isinstance(caught.value, CheckpointError)  # for which an older one would be taken
    assert left == [7 if passes else 9]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_looked_at_is_not_taken_for_an_empty_one(path, monkeypatch, number):
    manifest = {"data": {"samples_seen": 0, "sha256": ""}, "model": {}, "optimizer": "sgd", "seed": 0}
    save(path.parent, 4, shards(), manifest, SingleComm())
    monkeypatch.setattr(reading, "PAUSES_S", (0, 0))
    assert starting.find_start(path.parents[1], "auto").step == 4
    assert starting.find_start(path, "auto") is None  # there is no such folder
    for owner, name in ((os, "listdir"), (Path, "stat"), (Path, "read_text")):
        with monkeypatch.context() as patch:
            def failing(*arguments, **options):
                raise OSError(number, "as the system says")

            patch.setattr(owner, name, failing)
            with pytest.raises(OSError, match=f"Errno {number}") as caught:
                starting.find_start(path.parents[1], "auto")
            assert not isinstance(caught.value, CheckpointError)


def test_bad_ones_do_not_push_out_good_ones(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step, keep=2 if step < 6 else None)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [2, 4, 6, 8]
    found = starting.give_up_from(tmp_path, 6)
    assert "step-00000006.bad, step-00000008.bad are set aside; the last checkpoint is of step 4" in found
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [2, 4]
    assert Checkpoint(tmp_path / "step-00000008.bad").step == 8  # to be looked at
    write(tmp_path, 7, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000007", "step-00000008.bad"]
    starting.give_up_from(tmp_path, 7)
    write(tmp_path, 8, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000008"]
    assert "none is of other weights" in starting.give_up_from(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000008"]
    assert "there is no checkpoint" in starting.give_up_from(tmp_path / "none", 4)


def test_what_cannot_be_removed_makes_way(tmp_path, monkeypatch):
    """Over NFS a folder stays as long as somebody has a file of it open; renaming works."""
    write(tmp_path)
    for name in ("step-00000003.tmp", "step-00000003.replaced", "step-00000003.0.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".nfs0001").touch()
    remove = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.warns(UserWarning, match="cannot be removed"):
        path = write(tmp_path)
    assert complete_checkpoints(tmp_path) == [path] and Checkpoint(path).step == 3
    monkeypatch.setattr(shutil, "rmtree", remove)
    write(tmp_path)
    assert os.listdir(tmp_path) == [path.name]


def change_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_a_missing_tensor_or_shard(path):
    with pytest.raises(CheckpointError, match="holds no weight of layers.9"):
        Checkpoint(path).read("layers.9")
    change_manifest(path, lambda manifest: manifest["tensors"]["weight"]["embedding.weight"]["shards"].pop(1))
    refused(path, "of the elements 0 to 63 of weight of embedding.weight, those from 5 are missing")


def test_a_shard_listed_twice_does_not_stand_for_one_that_is_missing(path, monkeypatch):
    monkeypatch.setitem(CUTS, "embedding.weight", (0, 21, 42, 63))
    write(path.parent)

    def change(manifest):
        listed = manifest["tensors"]["weight"]["embedding.weight"]["shards"]
        listed[1] = listed[0]

    change_manifest(path, change)
    refused(path, "of the elements 0 to 63 of weight of embedding.weight, those from 21 are missing")


def test_a_missing_file(path):
    (path / "rank-00000.h5").unlink()
    refused(path, "rank-00000.h5.*cannot be read")


def test_a_flipped_bit_in_the_data(path):
    raw = bytearray((path / "rank-00000.h5").read_bytes())
    pattern = values("embedding.weight", "weight").numpy()[5:32].tobytes()
    raw[raw.index(pattern) + 10] ^= 1
    (path / "rank-00000.h5").write_bytes(raw)
    refused(path, "weight/embedding.weight/5 is damaged")


@pytest.mark.parametrize("left", [0, 100, 2000])
def test_a_cut_off_file(path, left):
    (path / "rank-00000.h5").write_bytes((path / "rank-00000.h5").read_bytes()[:left])
    refused(path, "cannot be read")


@pytest.mark.parametrize("replacement", [np.zeros(5, np.float64), np.zeros(4, np.float32), h5py.SoftLink("/x"),
                                         h5py.ExternalLink("/etc/passwd", "/x")])
def test_another_dataset_in_its_place(path, replacement):
    with h5py.File(path / "rank-00000.h5", "a") as file:
        del file["weight/embedding.weight/0"]
        file["weight/embedding.weight/0"] = replacement
    refused(path, "not the shard the manifest lists")


def test_no_file_outside_the_checkpoint_is_opened(path, tmp_path):
    shutil.move(path / "rank-00000.h5", tmp_path / "elsewhere.h5")

    def change(manifest):
        for tensors in manifest["tensors"].values():
            for entry in tensors.values():
                for shard in entry["shards"]:
                    shard["file"] = "../../elsewhere.h5"

    change_manifest(path, change)
    refused(path, "cannot be read")


def put(path, where, make):
    """Let ``make(file, name)`` put something in place of a dataset."""
    with h5py.File(path / "rank-00000.h5", "a") as file:
        del file[where]
        make(file, where)


def virtual(file, where):
    layout = h5py.VirtualLayout((5,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (5,))
    file.create_virtual_dataset(where, layout)


@pytest.mark.parametrize("make", [
    virtual,
    lambda file, where: file.create_dataset(where, (5,), np.float32, external=[("/etc/passwd", 0, 20)]),
    lambda file, where: file.create_dataset(where, (10**15,), np.float32, chunks=(1024,)),
    lambda file, where: file.create_dataset(where, data=np.zeros(5, np.float32), chunks=(5,), compression="gzip"),
    lambda file, where: file.create_group(where),
])
def test_only_plain_data_of_the_file_itself_are_read(path, make):
    put(path, "weight/embedding.weight/0", make)
    refused(path, "not the shard the manifest lists")


def test_a_link_on_the_way_to_a_dataset_is_not_followed(path, tmp_path):
    shutil.copy(path / "rank-00000.h5", tmp_path / "other.h5")
    link = h5py.ExternalLink(tmp_path / "other.h5", "/weight")
    put(path, "weight", lambda file, where: file.__setitem__(where, link))
    refused(path, "not the shard the manifest lists")
    write(path.parent)
    (path / "rank-00000.h5").unlink()
    (path / "rank-00000.h5").symlink_to(tmp_path / "other.h5")
    refused(path, "is a link")


@pytest.mark.parametrize("change", [
    lambda entry: entry.update(shape=[10**9, 10**9]),
    lambda entry: entry.update(shape=[63.0]),
    lambda entry: entry.update(shape=[2] * 9),
    lambda entry: entry["shards"][0].update(start=-1),
    lambda entry: entry["shards"][0].update(start=5),
    lambda entry: entry["shards"][2].update(stop=64),
    lambda entry: entry["shards"][0].update(start=True),
    lambda entry: entry["shards"][0].update(file="a\0b"),
    lambda entry: entry["shards"][0].update(dataset=""),
    lambda entry: entry.update(dtype="object"),
    lambda entry: entry.update(shards=3),
    lambda entry: entry["shards"][0].update(start="x"),
    lambda entry: entry["shards"][0].pop("file"),
    lambda entry: entry["shards"][0].update(stop=10**15),
])
def test_a_manifest_that_lies_is_refused_before_room_is_made(path, change):
    change_manifest(path, lambda manifest: change(manifest["tensors"]["weight"]["embedding.weight"]))
    with pytest.raises(CheckpointError):
        Checkpoint(path).read("embedding.weight", "weight", 0, 63, SHAPES["embedding.weight"])


@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_changed_files_are_refused_or_read_right(path, seed):
    """Bytes flipped, cut, spliced, of data and manifest; what can still be read has the values that were written."""
    rng = np.random.default_rng(seed)
    target = path / ("manifest.json" if rng.random() < 0.3 else "rank-00000.h5")
    raw = bytearray(target.read_bytes())
    place, kind = int(rng.integers(len(raw))), rng.integers(3)
    if kind == 0:
        raw[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del raw[place:]
    else:
        other = int(rng.integers(len(raw)))
        raw[place:place + 50] = raw[other:other + 50]
    target.write_bytes(raw)
    for kind in ("weight", "exp_avg"):
        for name, shape in SHAPES.items():
            try:
                source = Checkpoint(path)
                found = source.read(name, kind, shape=shape)
            except CheckpointError:
                continue
            assert (source.step, source.manifest["seed"]) == (3, 5)
            assert found.tobytes() == values(name, kind).numpy().tobytes()


def test_changed_files_whose_digests_match_are_refused_or_read_as_they_are(path):
    """In a process whose memory is limited, and which a crash would end: see tests/tools/mutations.py."""
    words = [sys.executable, Path(__file__).parents[1] / "tools" / "mutations.py", path, "0", str(MUTATIONS)]
    job = subprocess.run(words, capture_output=True, text=True, timeout=60 + MUTATIONS)
    assert job.returncode == 0, job.stderr
    assert sum(json.loads(job.stdout).values()) == MUTATIONS


def test_in_the_background_nothing_is_announced_early(tmp_path, monkeypatch):
    folder, may_write, original = tmp_path / "checkpoints", threading.Event(), h5py.Group.create_dataset
    folder.mkdir()

    def waiting(*arguments, **options):
        may_write.wait()
        return original(*arguments, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", waiting)
    held = list(shards())
    saving = Saving(folder, 7, held, {"seed": 5}, SingleComm(), in_background=True)
    saving.wait_copied()
    for *_, tensors in held:  # training goes on
        for tensor in tensors.values():
            tensor.zero_()
    assert not saving.is_written() and complete_checkpoints(folder) == []
    may_write.set()
    found = Checkpoint(saving.finish())
    assert found.step == 7
    for name in SHAPES:
        assert found.read(name).tobytes() == values(name, "weight").numpy().tobytes()


FULL = """
import resource, sys
import torch
from mpillm.comm.single import SingleComm
from mpillm.errors import DataError
from mpillm.checkpoint.saving import save
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save(Path(sys.argv[1]), 4, [("w", (90000,), 0, {"weight": torch.ones(90000)})], {}, SingleComm())
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("limit_bytes", [100, 5000, 100_000])
def test_no_room_is_an_error_and_not_the_end_of_the_process(path, limit_bytes):
    """HDF5 that could not write would crash when the process leaves: hence a process of its own."""
    job = subprocess.run([sys.executable, "-c", FULL, path.parent, str(limit_bytes)], capture_output=True, text=True)
    assert job.returncode == 0 and not job.stderr, job.stderr
    assert "File too large" in job.stdout and "free some space" in job.stdout
    assert complete_checkpoints(path.parent) == [path]


def test_a_checkpoint_that_is_being_removed_is_none(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    remove, seen = shutil.rmtree, []

    def watched(path, **options):
        if path.exists():  # what a kill at this moment, and at every later one, would leave
            seen.append([step.name for step in complete_checkpoints(folder)])
        remove(path, **options)

    for step in (1, 2, 3):
        write(folder, step, keep=2)
    monkeypatch.setattr(shutil, "rmtree", watched)
    write(folder, 4, keep=2)
    write(folder, 4, keep=2)  # in the place of one of the same step
    assert seen == [["step-00000003", "step-00000004"]] * 2
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]

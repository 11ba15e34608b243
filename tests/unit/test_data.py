"""Token files: which tokens a sample has, in which order samples come, and what is refused."""

import fcntl
import hashlib
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections import Counter

import h5py
import numpy as np
import pytest
from scipy.stats import chisquare, kstest
from tiny import write_token_file

from mpillm import files
from mpillm.data.samples import ORDERS, training_order
from mpillm.data.tokenizers import ByteTokenizer, load_tokenizer
from mpillm.data.tokens import TokenFile, file_digest, fingerprint, write_tokens
from mpillm.errors import INPUT_OUTPUT, USAGE, ConfigError, DataError


@pytest.fixture
def path(tmp_path):
    return write_token_file(tmp_path / "tokens.h5", tokens=100)


def read(path, split="train"):
    with h5py.File(path) as file:
        return file[split]["tokens"][:].astype(np.int64), file[split]["documents"][:]


@pytest.mark.parametrize("seq_len", [1, 7, 12, 99])
def test_a_sample_has_the_tokens_of_its_place(path, seq_len):
    tokens, _ = read(path)
    file = TokenFile(path, "train", seq_len)
    assert file.num_samples == 99 // seq_len  # one more token than inputs: the last target
    inputs, targets = file.samples(range(file.num_samples))
    assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == (file.num_samples, seq_len)
    for i in range(file.num_samples):
        whole = tokens[i * seq_len:(i + 1) * seq_len + 1]
        assert (inputs[i] == whole[:-1]).all() and (targets[i] == whole[1:]).all()


def test_samples_come_as_asked_and_may_repeat(path):
    file = TokenFile(path, "train", 12)
    every = file.samples(range(file.num_samples))[0]
    assert (file.samples([5, 0, 5])[0] == every[[5, 0, 5]]).all()


def test_samples_of_integers_of_any_kind(tmp_path):
    """What an index stands for may not fit its type."""
    file = TokenFile(write_token_file(tmp_path / "tokens.h5", tokens=1000), "train", 12)
    for find in (lambda indices: file.samples(indices)[1], file.documents_of):
        assert (find(np.array([80, 3], np.uint8)) == find([80, 3])).all()


def test_splits_are_apart(path):
    tokens, _ = read(path, "validation")
    assert (TokenFile(path, "validation", 12).samples([0])[0][0] == tokens[:12]).all()


def test_every_token_has_its_document(path):
    _, starts = read(path)
    file = TokenFile(path, "train", 12)
    found = file.documents_of([3, 0])
    for row, sample in zip(found, (3, 0)):
        expected = [sum(start <= place for start in starts) for place in range(sample * 12, sample * 12 + 12)]
        assert row.tolist() == expected


@pytest.mark.parametrize("options", [{}, {"chunks": (13,)}, {"compression": "gzip"}])
def test_any_way_of_storing_reads_alike(path, options):
    tokens, _ = read(path)
    with h5py.File(path, "a") as file:
        del file["train/tokens"]
        file["train"].create_dataset("tokens", data=tokens.astype(np.uint32), **options)
    file = TokenFile(path, "train", 12)
    assert (file.samples([1])[1][0] == tokens[13:25]).all()
    assert isinstance(file.tokens, np.memmap) == (not options)


@pytest.mark.parametrize("kind", ["grown", "compressed", "virtual", "linked", "kept outside"])
@pytest.mark.parametrize("row", ["tokens", "documents"])
def test_what_cannot_be_mapped_is_read_a_sample_at_a_time(path, tmp_path, kind, row):
    places, mapped = [7, 0, 3], TokenFile(path, "train", 12)
    expected = *mapped.samples(places), mapped.documents_of(places)
    with h5py.File(path) as file, h5py.File(tmp_path / "other.h5", "w", userblock_size=512) as other:
        values = file["train"][row][:]
        other["elsewhere"] = values
    with h5py.File(path, "a") as file:
        group = file["train"]
        del group[row]
        if kind == "grown":
            group.create_dataset(row, data=values, maxshape=(None,), chunks=(4,))
        elif kind == "compressed":
            group.create_dataset(row, data=values, chunks=(4,), compression="gzip")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "elsewhere", values.shape)
            group.create_virtual_dataset(row, layout)
        elif kind == "linked":
            group[row] = h5py.ExternalLink(tmp_path / "other.h5", "/elsewhere")
        else:
            values.tofile(tmp_path / "raw")
            group.create_dataset(row, values.shape, values.dtype,
                                 external=[(tmp_path / "raw", 0, h5py.h5f.UNLIMITED)])
    file = TokenFile(path, "train", 12)
    found = getattr(file, row)
    assert isinstance(found, np.memmap) == (kind == "linked")
    for part, of_mapped in zip((*file.samples(places), file.documents_of(places)), expected):
        assert (part == of_mapped).all()
    if kind in ("grown", "compressed"):  # of chunks that only have to be copied, none is kept
        in_memory = found.id.get_access_plist().get_chunk_cache()[1]
        assert in_memory == (4 * values.itemsize if kind == "compressed" else 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 50, 997])
def test_every_epoch_visits_every_sample_once(num_samples, order):
    found = training_order(num_samples, 3, 0, 4 * num_samples, order)
    epochs = [found[i * num_samples:(i + 1) * num_samples] for i in range(4)]
    assert all(sorted(epoch) == list(range(num_samples)) for epoch in epochs)
    assert num_samples < 7 or len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_depends_on_seed_and_sample_number_alone(order):
    whole = training_order(50, 3, 0, 200, order)
    for first, count in ((0, 9), (45, 9), (99, 1), (149, 51)):  # across the ends of epochs, in any portions
        assert training_order(50, 3, first, count, order) == whole[first:first + count]
    assert whole != training_order(50, 4, 0, 200, order)
    code = f"from mpillm.data.samples import training_order; print(training_order(50, 3, 0, 200, {order!r}))"
    again = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(again) == whole


def test_orders_stay_what_they_are():
    """A run that goes on with another mpillm must not see samples twice; the second is numpy's."""
    assert training_order(10, 3, 0, 20) == [6, 5, 0, 3, 9, 1, 8, 7, 4, 2, 2, 9, 6, 4, 8, 3, 5, 7, 0, 1]
    drawn = [np.random.Generator(np.random.Philox(key=[3, epoch])).permutation(10) for epoch in range(2)]
    assert training_order(10, 3, 0, 20, "permutation") == np.concatenate(drawn).tolist()


@pytest.mark.parametrize("num_samples", [2, 3, 5, 24])
def test_every_sample_is_as_likely_in_every_place_and_after_every_other(num_samples):
    """And, where they can be counted, every order as any other: chi-square over 1500 epochs."""
    epochs = np.array(training_order(num_samples, 7, 0, 1500 * num_samples)).reshape(1500, num_samples)
    places, after = np.zeros((2, num_samples, num_samples))
    for place in range(num_samples):
        np.add.at(places[place], epochs[:, place], 1)
    np.add.at(after, (epochs[:, :-1], epochs[:, 1:]), 1)
    counts = [*places, after[~np.eye(num_samples, dtype=bool)]]
    if num_samples < 6:
        orders = Counter(map(tuple, epochs.tolist()))
        counts.append([orders[order] for order in itertools.permutations(range(num_samples))])
    chances = [chisquare(count).pvalue for count in counts]
    assert min(chances) > 1e-3 / len(chances)


def test_an_order_of_many_samples_costs_no_more_than_those_asked_for():
    tracemalloc.start()
    found = np.array(training_order(10**12 + 39, 0, 5 * 10**11, 1000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20 and len(set(found.tolist())) == 1000 and 0 <= found.min() < found.max() < 10**12 + 39
    assert kstest(found / 10**12, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / 1000**0.5


def test_the_digest_is_of_the_bytes(path, tmp_path):
    same = write_token_file(tmp_path / "same.h5", tokens=100)
    other = write_token_file(tmp_path / "other.h5", tokens=100, seed=1)
    assert file_digest(path) == file_digest(path) != file_digest(other)
    same.write_bytes(path.read_bytes())
    assert file_digest(same) == file_digest(path)


def test_a_file_is_known_again_by_its_fingerprint(path, tmp_path):
    same = tmp_path / "same.h5"
    same.write_bytes(path.read_bytes())
    others = [write_token_file(tmp_path / f"{name}.h5", **what) for name, what in {
        "seed": {"tokens": 100, "seed": 1}, "length": {"tokens": 101}, "validation": {"tokens": 100, "validation": 201}
    }.items()]
    assert fingerprint(same) == fingerprint(path)
    assert len({fingerprint(path), *map(fingerprint, others)}) == 4


def test_a_larger_file_is_known_by_blocks_of_it_and_by_the_digests_that_it_states(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCKS", 3)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 64)
    text, path, other = bytearray(b"x" * 9000), tmp_path / "tokens.h5", tmp_path / "other.h5"
    write_tokens(path, [bytes(text)], [], ByteTokenizer())
    with h5py.File(path) as file:
        row, starts = file["train/tokens"], file["train/documents"]
        assert file["train"].attrs["sha256"] == hashlib.sha256(row[:].tobytes() + starts[:].tobytes()).hexdigest()
        place = row.id.get_offset() + 2 * 1000  # in no block
    for changed, is_seen in ((place, False), (path.stat().st_size // 2, True)):
        raw = bytearray(path.read_bytes())
        raw[changed] ^= 1
        other.write_bytes(raw)
        assert (fingerprint(other) != fingerprint(path)) == is_seen
    text[1000] ^= 1
    write_tokens(other, [bytes(text)], [], ByteTokenizer())
    assert fingerprint(other) != fingerprint(path)


def refused(path, error=DataError, **options):
    with pytest.raises(error) as caught:
        TokenFile(path, "train", options.pop("seq_len", 12), **options)
    assert str(path) in str(caught.value) and caught.value.exit_code == (
        USAGE if error is ConfigError else INPUT_OUTPUT)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["lock", "r", "a"])
def test_a_file_that_others_have_locked_or_this_process_has_open(path, mode):
    with open(path, "rb") if mode == "lock" else h5py.File(path, mode) as file:
        if mode == "lock":
            fcntl.flock(file, fcntl.LOCK_EX)
        assert TokenFile(path, "train", 12).num_samples == 8
        assert load_tokenizer(path).vocab_size == 257


def test_a_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.h5")


@pytest.mark.parametrize("content", [b"", b"text, not HDF5\n" * 100])
def test_an_empty_or_foreign_file(tmp_path, content):
    (tmp_path / "foreign.h5").write_bytes(content)
    assert "cannot be read as HDF5" in refused(tmp_path / "foreign.h5")


def test_a_cut_off_file(path):
    path.write_bytes(path.read_bytes()[:-500])
    refused(path)


def test_a_directory(tmp_path):
    message = refused(tmp_path)
    assert "it is a directory" in message and "\n" not in message


def test_hdf5_of_something_else(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1, 2, 3]
    assert "not a token file" in refused(tmp_path / "other.h5")


@pytest.mark.parametrize("lacking", ["train", "train/tokens", "train/documents"])
def test_a_file_without_a_part(path, lacking):
    with h5py.File(path, "a") as file:
        del file[lacking]
    assert "mpillm data" in refused(path)


@pytest.mark.parametrize("tokens", [np.zeros((9, 9), np.uint16), np.zeros(100, np.float32), np.zeros(100, np.int32)])
def test_tokens_that_are_no_row_of_unsigned_integers(path, tokens):
    with h5py.File(path, "a") as file:
        del file["train/tokens"]
        file["train/tokens"] = tokens
    assert "unsigned integers" in refused(path)


def test_a_sequence_longer_than_the_data(path):
    assert TokenFile(path, "train", 99).num_samples == 1
    message = refused(path, seq_len=100)
    assert "100 tokens" in message and "101" in message and "train.seq_len" in message


def test_an_empty_split(tmp_path):
    assert "0 tokens" in refused(write_token_file(tmp_path / "tokens.h5", tokens=0))


def test_a_vocabulary_larger_than_the_model(path):
    assert TokenFile(path, "train", 12, vocab_size=257).vocab_size == 257
    message = refused(path, ConfigError, vocab_size=256)
    assert "model.vocab_size = 256" in message and ">= 257" in message


def test_tokens_beyond_the_vocabulary_the_file_states(tmp_path):
    path = write_token_file(tmp_path / "tokens.h5", largest=300)
    file = TokenFile(path, "train", 12)
    with pytest.raises(DataError, match="damaged"):
        file.samples(range(file.num_samples))

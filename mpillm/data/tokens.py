"""Token files, written and read: HDF5, whose tokens are memory-mapped, or read a sample at a time."""

import contextlib
import hashlib
import os
import tempfile
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mpillm.data.settings import TOKENIZER_CONFIG
from mpillm.data.tokenizers import token_dtype
from mpillm.errors import ConfigError, DataError
from mpillm.files import replacing, sampled_digest
from mpillm.hdf5 import open_to_read, writing

_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Split:
    """How much one split of a token file holds."""

    documents: int
    bytes: int
    tokens: int


def write_tokens(path, train, validation, tokenizer):
    """Write a token file: both splits, the tokenizer, and the bytes of text behind each split.

    Local. The file appears whole or not at all. Tokens are contiguous, so that they can be memory-mapped.

    Parameters
    ----------
    path : str or Path
    train, validation : iterable of bytes or str
        Documents, read once.
    tokenizer : ByteTokenizer or LibraryTokenizer

    Returns
    -------
    train, validation : Split

    Raises
    ------
    ConfigError
        If the tokenizer names no token that ends a document, and the model that goes with it has no room for one.
    DataError
        If the file cannot be written.
    """
    if tokenizer.end is None:
        raise ConfigError(
            f"token file {path}: the tokenizer names no token that ends a document, and its model of "
            f"{tokenizer.vocab_size} tokens has no room for one: name one, perhaps a reserved one, as \"eos_token\" in "
            f"{TOKENIZER_CONFIG} beside the tokenizer"
        )
    try:
        with replacing(Path(path)) as temporary, writing(temporary) as file:
            file.attrs.update(tokenizer=tokenizer.kind, vocab_size=tokenizer.vocab_size, end=tokenizer.end)
            file["tokenizer"] = tokenizer.to_json()
            if tokenizer.settings is not None:
                file["tokenizer_settings"] = tokenizer.settings.to_json()
            return tuple(
                _write_split(file.create_group(name), documents, tokenizer, temporary.parent)
                for name, documents in (("train", train), ("validation", validation))
            )
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"token file {path}: cannot be written ({error.strerror or error})") from error


def _write_split(group, documents, tokenizer, folder):
    """Write tokens, starts of documents and bytes of text; tokens are spooled until their number is known."""
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    end, starts, start, num_tokens, num_bytes = dtype.type(tokenizer.end).tobytes(), array("Q"), 0, 0, 0
    digest = hashlib.sha256()

    def counted():
        nonlocal num_bytes
        for document in documents:
            num_bytes += len(document.encode() if isinstance(document, str) else document)
            yield document

    with tempfile.TemporaryFile(dir=folder) as spool:
        for tokens, is_last in tokenizer.encode_documents(counted()):
            data = tokens.astype(dtype, copy=False).tobytes() + (end if is_last else b"")
            spool.write(data)
            digest.update(data)
            num_tokens += len(tokens)
            if is_last:
                starts.append(start)
                start = num_tokens = num_tokens + 1
        spool.seek(0)
        dataset = group.create_dataset("tokens", (num_tokens,), dtype)
        for first in range(0, num_tokens, _BLOCK_TOKENS):
            block = np.frombuffer(spool.read(_BLOCK_TOKENS * dtype.itemsize), dtype)
            dataset[first:first + len(block)] = block
    group["documents"] = np.frombuffer(starts, np.uint64) if starts else np.empty(0, np.uint64)
    digest.update(starts)
    group.attrs.update(bytes=num_bytes, sha256=digest.hexdigest())
    return Split(len(starts), num_bytes, num_tokens)


class TokenFile:
    """The samples of one split of a ``tokens.h5``.

    Sample ``i`` is tokens ``i * seq_len`` to ``(i + 1) * seq_len`` inclusive. Local: every rank opens the file itself.
    Contiguous rows are mapped. Others (chunked, compressed, virtual) are read a sample at a time, through the file, which
    then stays open; of a compressed one a chunk is in memory.

    Parameters
    ----------
    path : str or Path
    split : {"train", "validation"}
    seq_len : int
    vocab_size : int, optional
        Of the model; by default the file's.

    Attributes
    ----------
    tokens, documents : numpy.memmap or h5py.Dataset
        All tokens of the split, and where each document starts.
    num_samples, vocab_size : int
    bytes : int
        Of the text behind the split; 0 where the tokens are no text.

    Raises
    ------
    DataError
        If the file is missing, not a token file, or shorter than one sample.
    ConfigError
        If its tokens exceed the model's vocabulary.
    """

    def __init__(self, path, split, seq_len, vocab_size=None):
        self.path, self.split, self.seq_len = Path(path), split, seq_len
        with contextlib.ExitStack() as closing:
            self._file = closing.enter_context(_open(path))
            try:
                group = self._file[split]
                self.vocab_size, self.bytes = int(self._file.attrs["vocab_size"]), int(group.attrs.get("bytes", 0))
                self.tokens, self.documents = _row(path, group, "tokens", "u"), _row(path, group, "documents", "iu")
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    f"data.path = {path}: not a token file ({error}): make one with `mpillm data FILES -o {path}`"
                ) from None
            self._check(vocab_size)
            if not all(isinstance(row, np.memmap) for row in (self.tokens, self.documents)):
                closing.pop_all()

    def _check(self, vocab_size):
        """Refuse a split without a sample, and one that the model has no words for."""
        seq_len = self.seq_len
        self.num_samples = (len(self.tokens) - 1) // seq_len
        if self.num_samples < 1:
            remedy = ", or set train.eval_every = 0" if self.split == "validation" else ""
            raise DataError(
                f"data.path = {self.path}: its {self.split} split has {len(self.tokens)} tokens, one sample needs "
                f"train.seq_len + 1 = {seq_len + 1}: lower train.seq_len or add text{remedy}"
            )
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}, but the tokens of {self.path} go up to {self.vocab_size - 1}: "
                f"set model.vocab_size >= {self.vocab_size}, or leave it out"
            )

    def samples(self, indices):
        """Return samples as ``(inputs, targets)``, int64 arrays ``[len(indices), seq_len]``.

        Raises
        ------
        DataError
            If a token exceeds the vocabulary that the file states.
        """
        starts = [int(i) * self.seq_len for i in indices]
        rows = np.stack([self.tokens[start:start + self.seq_len + 1] for start in starts]).astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise DataError(
                f"data.path = {self.path}: token {rows.max()} in samples {list(indices)}, but the file states "
                f"vocab_size {self.vocab_size}: the file is damaged, make it anew"
            )
        return rows[:, :-1], rows[:, 1:]

    def documents_of(self, indices):
        """Return the number of the document of every input token, ``[len(indices), seq_len]``."""
        starts = [int(i) * self.seq_len for i in indices]
        return np.stack([self._documents_between(start, start + self.seq_len) for start in starts])

    def _documents_between(self, start, stop):
        first = bisect_right(self.documents, start)
        begun = self.documents[first:bisect_right(self.documents, stop - 1, first)].astype(np.int64)
        return first + np.searchsorted(begun, np.arange(start, stop), side="right")


def has_rows(path, split):
    """Return whether a file of tokens or samples has anything in a split. Local."""
    with _open(path) as file:
        group = file.get(split, {})
        return any(name in group and group[name].size > 0 for name in ("tokens", "inputs"))


def fingerprint(path):
    """Return a SHA-256, in hexadecimal, by which a token file is known again.

    Local. Of the file's length, of the digests of all its tokens that :func:`write_tokens` left in it, and of 256 blocks
    that are spread over it; a file up to 16 MiB is read whole, no more of any other. A few tokens of a large file that
    another program changed in place go unseen.
    """
    with _open(path) as file:
        stated = [str(file[split].attrs.get("sha256")) for split in ("train", "validation") if split in file]
    return sampled_digest(path, stated)


def file_digest(path):
    """Return the SHA-256 of a file, in hexadecimal: what checkpoints held before there was :func:`fingerprint`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _open(path):
    try:
        return open_to_read(path)
    except FileNotFoundError:
        raise DataError(f"data.path = {path}: no such file: make one with `mpillm data FILES -o {path}`") from None
    except OSError as error:
        why = "it is a directory" if os.path.isdir(path) else str(error).partition("\n")[0][:200]
        raise DataError(f"data.path = {path}: cannot be read as HDF5 ({why}): is it a token file? `mpillm data` makes one "
                        "of text") from None


def _row(path, group, name, kinds):
    """Map a row of integers from the file, or return the dataset to read slices of."""
    dataset = group[name]
    if dataset.dtype.kind not in kinds or dataset.ndim != 1:
        raise DataError(
            f"data.path = {path}: {dataset.name} is {dataset.dtype} {dataset.shape}, not a row of unsigned integers: "
            "make it with `mpillm data`"
        )
    offset, dtype, shape = dataset.id.get_offset(), dataset.dtype, dataset.shape
    if offset is not None:  # else compressed, chunked, virtual or empty: nothing to map
        return np.memmap(dataset.file.filename, dtype=dtype, mode="r", offset=offset, shape=shape)
    if dataset.chunks is None:
        return dataset
    # As read, a chunk that passed no filter need not be in memory whole; one that did is kept for the next sample.
    chunk_bytes = dataset.chunks[0] * dtype.itemsize if dataset.id.get_create_plist().get_nfilters() else 0
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(1, chunk_bytes, 1.0)
    del dataset  # while it is open, its cache stays as it is
    return h5py.Dataset(h5py.h5d.open(group.id, name.encode(), access))

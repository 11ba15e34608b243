"""Token files: memory-mapped samples in an order that depends only on the seed and the global sample number."""

import hashlib
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from mpillm.errors import ConfigError, DataError


class TokenFile:
    """The samples of one split of a ``tokens.h5``.

    Sample ``i`` is tokens ``i * seq_len`` to ``(i + 1) * seq_len`` inclusive. Local: every rank opens the file itself.

    Parameters
    ----------
    path : str or Path
    split : {"train", "validation"}
    seq_len : int
    vocab_size : int, optional
        Of the model; by default the file's.

    Raises
    ------
    DataError
        If the file is missing, not a token file, or shorter than one sample.
    ConfigError
        If its tokens exceed the model's vocabulary.
    """

    def __init__(self, path, split, seq_len, vocab_size=None):
        self.path, self.split, self.seq_len = Path(path), split, seq_len
        with _open(path) as file:
            try:
                dataset, documents = file[split]["tokens"], file[split]["documents"]
                self.vocab_size, self.bytes = int(file.attrs["vocab_size"]), int(file[split].attrs["bytes"])
                self.documents = documents[:].astype(np.int64)
                self.tokens = _map(self.path, dataset)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    f"data.path = {path}: not a token file ({error}): make one with `mpillm data FILES -o {path}`"
                ) from None
        self.num_samples = (len(self.tokens) - 1) // seq_len
        if self.num_samples < 1:
            remedy = ", or set train.eval_every = 0" if split == "validation" else ""
            raise DataError(
                f"data.path = {path}: its {split} split has {len(self.tokens)} tokens, one sample needs "
                f"train.seq_len + 1 = {seq_len + 1}: lower train.seq_len or add text{remedy}"
            )
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}, but the tokens of {path} go up to {self.vocab_size - 1}: "
                f"set model.vocab_size >= {self.vocab_size}, or leave it out"
            )

    def samples(self, indices):
        """Return samples as ``(inputs, targets)``, int64 arrays ``[len(indices), seq_len]``.

        Raises
        ------
        DataError
            If a token exceeds the vocabulary that the file states.
        """
        rows = np.stack([self.tokens[i * self.seq_len:(i + 1) * self.seq_len + 1] for i in indices]).astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise DataError(
                f"data.path = {self.path}: token {rows.max()} in samples {list(indices)}, but the file states "
                f"vocab_size {self.vocab_size}: the file is damaged, make it anew"
            )
        return rows[:, :-1], rows[:, 1:]

    def documents_of(self, indices):
        """Return the number of the document of every input token, ``[len(indices), seq_len]``."""
        places = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len)
        return np.searchsorted(self.documents, places, side="right")


def with_vocabulary(config):
    """Return the configuration with the vocabulary of its data, unless it names one itself. Local."""
    if config.model.vocab_size is not None:
        return config
    tokens = TokenFile(config.data.path, "train", config.train.seq_len)
    return config.with_values({"model.vocab_size": tokens.vocab_size})


def training_order(num_samples, seed, first, count):
    """Return the samples that global sample numbers ``first ... first + count`` stand for.

    Local. Epoch ``e`` visits all samples once, in an order drawn from ``(seed, e)``.
    """
    places = (divmod(number, num_samples) for number in range(first, first + count))
    return [int(_epoch_order(num_samples, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)  # a step may see the end of one epoch and the beginning of the next
def _epoch_order(num_samples, seed, epoch):
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)


def file_digest(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _open(path):
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"data.path = {path}: no such file: make one with `mpillm data FILES -o {path}`") from None
    except OSError as error:
        raise DataError(f"data.path = {path}: cannot be read as HDF5 ({error}): is it a token file?") from None


def _map(path, dataset):
    """Map a contiguous dataset of unsigned integers from the file."""
    if dataset.dtype.kind != "u" or dataset.ndim != 1:
        raise DataError(
            f"data.path = {path}: {dataset.name} is {dataset.dtype} {dataset.shape}, not a row of unsigned integers: "
            "make it with `mpillm data`"
        )
    offset = dataset.id.get_offset()
    if offset is None:  # compressed, chunked or empty: nothing to map
        return dataset[:]
    return np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)

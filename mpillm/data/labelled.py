"""Sample files: inputs with labels, in HDF5. A sample is a row: tokens, or patches of real numbers, and what is to be said of
it.

``/train/inputs`` is ``[n, S]`` of tokens or ``[n, S, P]`` of patches; ``/train/labels`` is ``[n]`` or ``[n, S]`` of classes or
tags, or real numbers ``[n]``, ``[n, K]``, ``[n, S]`` or ``[n, S, K]``; ``/train/lengths`` is ``[n]`` where sequences differ.
``/validation`` alike.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from mpillm.errors import ConfigError, DataError
from mpillm.files import replacing, unwritable
from mpillm.hdf5 import open_to_read, writing

NOT_COUNTED = -100  # a class or tag that counts for nothing, as in PyTorch
SPLITS = ("train", "validation")
_BLOCK_ROWS = 1 << 12  # that are looked at together


def write_samples(path, split, inputs, labels, lengths=None):
    """Write one split of a sample file; what else the file holds stays.

    Local. The file appears whole or not at all.

    Parameters
    ----------
    path : str or Path
    split : {"train", "validation"}
    inputs : array of shape (n, S) or (n, S, P)
        Tokens, or patches of P real numbers.
    labels : array of shape (n,), (n, S), (n, K) or (n, S, K)
        Classes or tags (integers, -100 for what is not counted), or real numbers (NaN for what is not counted).
    lengths : array of shape (n,), optional
        Positions that a sequence has, where it is shorter than S.

    Raises
    ------
    ConfigError
        If shapes or types do not fit together.
    DataError
        If the file cannot be written.
    """
    rows = {"inputs": np.asarray(inputs), "labels": np.asarray(labels)}
    if lengths is not None:
        rows["lengths"] = np.asarray(lengths)
    what = f"samples {path}: {split}"
    if split not in SPLITS:
        raise ConfigError(f"samples {path}: split {split!r}: it is one of {', '.join(SPLITS)}")
    _check_shapes(what, rows, ConfigError)
    path = Path(path)
    try:
        with replacing(path) as temporary, writing(temporary) as file:
            if path.exists():
                with open_to_read(path) as old:
                    for name in old.keys() - {split}:
                        old.copy(name, file)
            group, digest = file.create_group(split), hashlib.sha256()
            for name, values in rows.items():
                group[name] = values
                digest.update(np.ascontiguousarray(values))
            group.attrs["sha256"] = digest.hexdigest()
    except OSError as error:
        raise unwritable(path, error) from error


class SampleFile:
    """One split of a sample file, as a model reads it.

    Local: every rank opens the file itself, and reads the rows that it asks for.

    Parameters
    ----------
    path : str or Path
    split : {"train", "validation"}
    model : mpillm.model.description.Model
    seq_len : int
        Positions of the model: those of a sample, and one before them with ``class_position``.

    Attributes
    ----------
    num_samples : int

    Raises
    ------
    DataError
        If the file is missing, or no sample file.
    ConfigError
        If its samples are not what the model reads, or its labels not what the model's head gives.
    """

    def __init__(self, path, split, model, seq_len):
        self.path, self.split, self.model, self.seq_len = path, split, model, seq_len
        self.what = f"data.path = {path}: its {split} split"
        with contextlib.ExitStack() as closing:
            self._rows = closing.enter_context(_open(path, split, self.what))
            self.num_samples = len(self._rows["inputs"])
            self._check_model()
            self._closing = closing.pop_all()

    def samples(self, indices):
        """Return ``(inputs, labels, lengths)`` of some samples, the last ``None`` where none is shorter.

        Tokens and labels are int64; before patches with a class position stands a label that is not counted.
        """
        inputs, labels = (self._read(name, indices) for name in ("inputs", "labels"))
        lengths = self._read("lengths", indices).astype(np.int64) if "lengths" in self._rows else None
        if self.model.inputs == "tokens":
            inputs = inputs.astype(np.int64)
            self._check_range(indices, "token", inputs, self.model.vocab_size)
        elif not np.isfinite(inputs).all():
            raise DataError(f"{self.what} has inputs that are not finite in samples {list(indices)}: write it anew")
        labels = self._labels(indices, labels, lengths)
        if lengths is not None:
            if not ((lengths > 0) & (lengths <= self.seq_len - self.model.class_position)).all():
                raise DataError(f"{self.what} has lengths beside 1 to {self.seq_len - self.model.class_position} in samples "
                                f"{list(indices)}: write it anew")
            lengths = lengths + self.model.class_position
        return inputs, labels, lengths

    def counted(self, indices):
        """Return how many labels of some samples count."""
        return counted(self.samples(indices)[1])

    def _labels(self, indices, labels, lengths):
        """Return labels for every position that the model has, those behind a sequence's end not counted."""
        model = self.model
        are_real = model.head == "values"
        labels = labels.astype(np.float64 if are_real else np.int64)
        if not are_real:
            self._check_range(indices, "label", np.where(labels == NOT_COUNTED, 0, labels), model.num_labels)
        if model.pooling != "none":
            return labels
        nothing = np.nan if are_real else NOT_COUNTED
        if lengths is not None:
            labels[np.arange(labels.shape[1]) >= lengths[:, None]] = nothing
        if model.class_position:
            labels = np.concatenate((np.full_like(labels[:, :1], nothing), labels), 1)
        return labels

    def _read(self, name, indices):
        """Read rows in any order: HDF5 wants each once, in growing order."""
        wanted, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        return self._rows[name][wanted][places]

    def _check_range(self, indices, what, values, count):
        if values.size and not 0 <= values.min() <= values.max() < count:
            raise DataError(f"{self.what} has a {what} of {values.min()} or {values.max()} in samples {list(indices)}, the "
                            f"model has 0 to {count - 1}: write it anew, or raise the model's number")

    def _check_model(self):
        """Refuse samples that are not what the model reads and says."""
        model, inputs, labels = self.model, self._rows["inputs"], self._rows["labels"]
        wanted = f"[n, {self.seq_len - model.class_position}" + (f", {model.patch_size}]" if model.inputs == "patches" else "]")
        sizes = (self.seq_len - model.class_position, *([model.patch_size] if model.inputs == "patches" else []))
        kinds = "f" if model.inputs == "patches" else "iu"
        if inputs.shape[1:] != sizes or inputs.dtype.kind not in kinds:
            raise ConfigError(f"{self.what} has inputs {inputs.dtype} {list(inputs.shape)}, the model reads "
                              f"{model.inputs} {wanted}: set train.seq_len, model.inputs and model.patch_size to the data's")
        numbers = [model.num_labels] if model.head == "values" and (model.num_labels or 1) > 1 else []
        places = [] if model.pooling != "none" else [inputs.shape[1]]
        sizes, kinds = (*places, *numbers), "f" if model.head == "values" else "iu"
        if labels.shape[1:] not in {sizes, (*sizes, 1) if model.head == "values" and not numbers else sizes} or (
                labels.dtype.kind not in kinds):
            raise ConfigError(f"{self.what} has labels {labels.dtype} {list(labels.shape)}, head {model.head} with pooling "
                              f"{model.pooling} gives {['n', *sizes]} of {'real numbers' if kinds == 'f' else 'integers'}: set "
                              "model.head, model.pooling and model.num_labels to the data's")


def counted(targets):
    """Return how many of some targets count. Local."""
    return int((~np.isnan(targets)).sum() if np.issubdtype(targets.dtype, np.floating) else (targets >= 0).sum())


def num_labels(path):
    """Return how many classes or tags the training labels of a sample file have. Local; reads them all."""
    with _open(path, "train", f"data.path = {path}: its train split") as rows:
        labels = rows["labels"]
        return 1 + max(int(labels[first:first + _BLOCK_ROWS].max()) for first in range(0, len(labels), _BLOCK_ROWS))


def num_tokens(path):
    """Return how many different tokens the training inputs of a sample file may have. Local; reads them all."""
    with _open(path, "train", f"data.path = {path}: its train split") as rows:
        inputs = rows["inputs"]
        return 1 + max(int(inputs[first:first + _BLOCK_ROWS].max()) for first in range(0, len(inputs), _BLOCK_ROWS))


@contextlib.contextmanager
def _open(path, split, what):
    """Give the datasets of a split by name, whose shapes fit together."""
    try:
        file = open_to_read(path)
    except OSError as error:
        raise DataError(f"data.path = {path}: cannot be read as HDF5 ({str(error)[:200]}): mpillm.write_samples makes a file "
                        "of samples") from None
    with file:
        group = file.get(split)
        rows = {name: group[name] for name in ("inputs", "labels", "lengths") if name in group} if group is not None else {}
        if not {"inputs", "labels"} <= rows.keys():
            raise DataError(f"{what} has no inputs and labels: write it with mpillm.write_samples")
        _check_shapes(what, rows, DataError)
        yield rows


def _check_shapes(what, rows, refusal):
    """Refuse rows that do not fit together."""
    inputs, labels, lengths = (rows.get(name) for name in ("inputs", "labels", "lengths"))
    found = ", ".join(f"{name} {values.dtype} {list(values.shape)}" for name, values in rows.items())
    is_sound = (inputs.ndim in (2, 3) and inputs.dtype.kind in ("iu" if inputs.ndim == 2 else "f")
                and len(labels) == len(inputs) > 0 and labels.dtype.kind in "iuf"
                and (lengths is None or lengths.shape == inputs.shape[:1] and lengths.dtype.kind in "iu"))
    if not is_sound:
        raise refusal(f"{what} has {found}: needs inputs [n, S] of integers or [n, S, P] of real numbers, as many labels, and, "
                      "if given, lengths [n] of integers")

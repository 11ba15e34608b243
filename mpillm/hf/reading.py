"""Weights from elsewhere: any range of any parameter, by the table of their family; those of a Hugging Face folder."""

import hashlib
import json
import math
from pathlib import Path

import torch

from mpillm.data.settings import MODEL_CONFIG, TOKENIZER, Settings, read_json, read_text
from mpillm.errors import ConfigError, DataError
from mpillm.files import sampled_digest
from mpillm.hf.families import FAMILIES
from mpillm.hf.folder import INDEX, reporting, safetensors_library
from mpillm.hf.tensors import copies_of, is_ignored, tensors_of

RUN_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}
OLDER_ENDS = {".gamma": ".weight", ".beta": ".bias"}  # of norms
PIECE = 1 << 24  # numbers that are in memory at a time
NAMED = 4  # tensors in an error


class Source:
    """Weights in tensors that the table of a family names, open for reading. Local.

    Attributes
    ----------
    family : mpillm.hf.family.Family
    model : mpillm.model.description.Model
    dtype : str
        To compute in.

    Parameters
    ----------
    path : Path
    family : mpillm.hf.family.Family
    model : mpillm.model.description.Model
    described_by : str
        What says of the model, for messages.

    Raises
    ------
    DataError
        If the tensors are not those of the model.
    """

    def __init__(self, path, family, model, described_by):
        self.path, self.family, self.model, self.described_by = path, family, model, described_by
        self._tensors = tensors_of(family, model)
        self._places = {part.name: tensor for tensor in self._tensors.values() for part in tensor.parts}
        self._slices = self._open()
        self._check_tensors()
        self.dtype = RUN_DTYPES[self._slices[self._places["embedding.weight"].name].get_dtype()]

    def _open(self):
        """Return what slices each tensor, by the name that the family's table gives it."""
        raise NotImplementedError

    def tokenizer(self):
        """Return the text of a file ``tokenizer.json``, or None, and the :class:`.Settings` beside it."""
        raise NotImplementedError

    def read(self, name, start=0, stop=None):
        """Return elements ``[start, stop)`` of the row-major order of a parameter, to its end unless ``stop`` is given.

        Local. Reads little more than these.

        Returns
        -------
        Tensor, shape (stop - start,)
            In float64 or float32.
        """
        tensor = self._places[name]
        shape = next(part.shape for part in tensor.parts if part.name == name)
        stop = math.prod(shape) if stop is None else stop
        row_size = math.prod(shape[1:])
        low, high = start // row_size, -(-stop // row_size)
        rows = tensor.rows(self._slices[tensor.name], name, low, high)
        if name in self.family.added:
            row = self._slices[self.family.added[name]][:1].to(rows.dtype)
            rows = rows + row if row.any() else rows  # adding a zero changes the sign of another
        return rows.reshape(-1)[start - low * row_size:stop - low * row_size]

    def _check_tensors(self):
        """Hold names, shapes and types against the parameters of the model, copies against what they repeat."""
        wanted = {name: tensor.shape for name, tensor in self._tensors.items()}
        copies = copies_of(self.family, self.model)
        for copy, name in copies.items():
            if copy in self._slices and name not in self._slices:
                self._slices[name] = self._slices.pop(copy)
        known = {*wanted, *copies, *self.family.added.values()}
        missing = sorted({*wanted, *self.family.added.values()} - self._slices.keys())
        extra = sorted(name for name in self._slices if name not in known and not is_ignored(self.family, name))
        if missing or extra:
            raise DataError(f"{self.path}: its tensors are not those of its {self.described_by}: missing {_some(missing)}, "
                            f"unknown {_some(extra)}")
        for copy, name in copies.items():
            if copy in self._slices:
                wanted[copy] = wanted[name]
        for name in self.family.added.values():
            wanted[name] = (self._slices[name].get_shape()[0], self.model.hidden_size)
        for name, shape in wanted.items():
            found = self._slices[name]
            if tuple(found.get_shape()) != shape or found.get_dtype() not in RUN_DTYPES:
                raise DataError(f"{self.path}: {name} is {found.get_dtype()} {found.get_shape()}, its {self.described_by} asks "
                                f"for {list(shape)} of {', '.join(RUN_DTYPES)}")
        for copy, name in copies.items():
            if copy in self._slices and not self._are_equal(copy, name):
                raise DataError(f"{self.path}: {copy} and {name} differ, but {MODEL_CONFIG} ties them: set "
                                "tie_word_embeddings to false in it")

    def _are_equal(self, *names):
        first, second = (self._slices[name] for name in names)
        rows, *rest = first.get_shape()
        step = max(PIECE // math.prod(rest), 1)
        return all(torch.equal(first[low:low + step], second[low:low + step]) for low in range(0, rows, step))


class HFFolder(Source):
    """A folder with ``config.json`` and safetensors files, open for reading. Local.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        If the model computes something that mpillm's does not, or the safetensors package is missing.
    DataError
        If something cannot be read, or the tensors are not those of ``config.json``.
    """

    def __init__(self, path):
        self._library = safetensors_library()
        with reporting(path, self._library.SafetensorError):
            super().__init__(path, *read_model(path / MODEL_CONFIG), MODEL_CONFIG)

    def tokenizer(self):
        """Return the text of ``tokenizer.json``, or None, and what the files beside it say."""
        file = self.path / TOKENIZER
        return read_text(file) if file.is_file() else None, Settings.of_folder(self.path)

    @property
    def digest(self):
        """By which the weights are known again: of ``config.json`` and of parts of every file."""
        with reporting(self.path):
            said = [read_text(self.path / MODEL_CONFIG), *(sampled_digest(self.path / file) for file in self._files())]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _files(self):
        """Return the names of the files with weights."""
        files = ["model.safetensors"]
        if (self.path / INDEX).is_file():
            try:
                files = sorted({Path(file).name for file in read_json(self.path / INDEX)["weight_map"].values()})
            except (KeyError, AttributeError, TypeError) as error:
                raise DataError(f"{self.path / INDEX}: not an index of safetensors files ({error!r})") from None
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise DataError(f"{self.path}: has no {missing[0]}: weights are read from safetensors files only")
        return files

    def _open(self):
        """Return what slices each tensor, by the name that the family's table gives it."""
        opened = [self._library.safe_open(self.path / file, framework="pt") for file in self._files()]
        return {self._known_as(name): file.get_slice(name) for file in opened for name in file.keys()}

    def _known_as(self, name):
        """Return the name of a tensor as of today, and as the class with a head writes it."""
        for older, newer in OLDER_ENDS.items():
            name = name.removesuffix(older) + newer if name.endswith(older) else name
        known = {*self._tensors, *self.family.added.values()}
        with_base = self.family.base + name
        is_older = name not in known and (with_base in known or is_ignored(self.family, with_base))
        return with_base if is_older else name


def read_model(path):
    """Return the family and the model that a ``config.json`` describes. Local.

    Raises
    ------
    ConfigError
        If mpillm does not compute the same.
    DataError
        If the file cannot be read.
    """
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in [*FAMILIES]:
        raise ConfigError(f"{path}: model_type = {json.dumps(kind)}: mpillm knows {', '.join(FAMILIES)}: convert another model")
    family = FAMILIES[kind].of_class(values.get("architectures"))
    return family, family.model(values, path)


def _some(names):
    return f"{names[:NAMED]} and {len(names) - NAMED} more" if len(names) > NAMED else f"{names}"

"""Weights of a Hugging Face folder: any range of any parameter, and all of them into a new run."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from mpillm.checkpoint import saving
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Train
from mpillm.data.settings import MODEL_CONFIG, SETTINGS, TOKENIZER, Settings, read_json
from mpillm.errors import ConfigError, DataError
from mpillm.files import write_text
from mpillm.hf.families import FAMILIES
from mpillm.hf.folder import INDEX, refuse_used, reporting, safetensors_library
from mpillm.hf.tensors import copies_of, is_ignored, tensors_of
from mpillm.model.parameters import parameters

RUN_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}
OLDER_ENDS = {".gamma": ".weight", ".beta": ".bias"}  # of norms
PIECE = 1 << 24  # numbers that are in memory at a time
NAMED = 4  # tensors in an error


def from_hf(run, folder):
    """Make a run directory of Hugging Face weights: a configuration, and a checkpoint of step 0.

    Local. One can generate from it and name it as ``train.init_from``. Half types become float32, as in all
    checkpoints; others keep their bits. A piece of a tensor is in memory at a time.

    Parameters
    ----------
    run, folder : str or Path
        ``run`` must be empty, or not there yet. ``folder`` holds ``config.json``, the weights as safetensors and,
        perhaps, ``tokenizer.json``; what its files say of special tokens and chats is kept.

    Returns
    -------
    mpillm.hf.family.Family
        Whose table was used.

    Raises
    ------
    ConfigError
        If the model computes something that mpillm's does not, ``run`` is in use, or the safetensors package is
        missing.
    DataError
        If something cannot be read or written, or the tensors are not those of ``config.json``.
    """
    safetensors, run, folder = safetensors_library(), Path(run), Path(folder)
    with reporting(safetensors, folder):
        refuse_used(run, "RUN")
        source = HFFolder(folder)
        model, settings = source.model, Settings.of_folder(folder)
        train = Train(run_dir=str(run), seq_len=min(Train.seq_len, model.max_seq_len), dtype=source.dtype)
        manifest = {"model": asdict(model), "optimizer": "none", "seed": train.seed,
                    "data": {"fingerprint": None, "samples_seen": 0}}
        saving.save(run / "checkpoints", 0, _shards(source), manifest, SingleComm())
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, run / TOKENIZER)
        if settings.files or (folder / TOKENIZER).is_file():
            write_text(run / SETTINGS, settings.to_json())
        write_text(run / "config.toml", Config(model=model, train=train).to_toml())
    return source.family


def _shards(source):
    """Yield what a checkpoint holds of each parameter, piece by piece."""
    for name, parameter in parameters(source.model).items():
        for start in range(0, parameter.size, PIECE):
            stop = min(start + PIECE, parameter.size)
            yield name, parameter.shape, start, {"weight": source.read(name, start, stop)}


class HFFolder:
    """A folder with ``config.json`` and safetensors files, open for reading. Local.

    Attributes
    ----------
    family : mpillm.hf.family.Family
    model : mpillm.model.description.Model
    dtype : str
        To compute in.

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
        self.path, library = path, safetensors_library()
        with reporting(library, path):
            self.family, self.model = read_model(path / MODEL_CONFIG)
            self._tensors = tensors_of(self.family, self.model)
            self._places = {part.name: tensor for tensor in self._tensors.values() for part in tensor.parts}
            self._slices = self._open(library)
            self._check_tensors()
        self.dtype = RUN_DTYPES[self._slices[self._places["embedding.weight"].name].get_dtype()]

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

    def _open(self, library):
        """Return what slices each tensor, by the name that the family's table gives it."""
        files = ["model.safetensors"]
        if (self.path / INDEX).is_file():
            try:
                files = sorted({Path(file).name for file in read_json(self.path / INDEX)["weight_map"].values()})
            except (KeyError, AttributeError, TypeError) as error:
                raise DataError(f"{self.path / INDEX}: not an index of safetensors files ({error!r})") from None
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise DataError(f"{self.path}: has no {missing[0]}: weights are read from safetensors files only")
        opened = [library.safe_open(self.path / file, framework="pt") for file in files]
        return {self._known_as(name): file.get_slice(name) for file in opened for name in file.keys()}

    def _known_as(self, name):
        """Return the name of a tensor as of today, and as the class with a head writes it."""
        for older, newer in OLDER_ENDS.items():
            name = name.removesuffix(older) + newer if name.endswith(older) else name
        known = {*self._tensors, *self.family.added.values()}
        with_base = self.family.base + name
        is_older = name not in known and (with_base in known or is_ignored(self.family, with_base))
        return with_base if is_older else name

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
            raise DataError(f"{self.path}: its tensors are not those of its {MODEL_CONFIG}: missing {_some(missing)}, "
                            f"unknown {_some(extra)}")
        for copy, name in copies.items():
            if copy in self._slices:
                wanted[copy] = wanted[name]
        for name in self.family.added.values():
            wanted[name] = (self._slices[name].get_shape()[0], self.model.hidden_size)
        for name, shape in wanted.items():
            found = self._slices[name]
            if tuple(found.get_shape()) != shape or found.get_dtype() not in RUN_DTYPES:
                raise DataError(f"{self.path}: {name} is {found.get_dtype()} {found.get_shape()}, its {MODEL_CONFIG} asks for "
                                f"{list(shape)} of {', '.join(RUN_DTYPES)}")
        for copy, name in copies.items():
            if copy in self._slices and not self._are_equal(copy, name):
                raise DataError(f"{self.path}: {copy} and {name} differ, but {MODEL_CONFIG} ties them: set "
                                "tie_word_embeddings to false in it")

    def _are_equal(self, *names):
        first, second = (self._slices[name] for name in names)
        rows, *rest = first.get_shape()
        step = max(PIECE // math.prod(rest), 1)
        return all(torch.equal(first[low:low + step], second[low:low + step]) for low in range(0, rows, step))


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
    return FAMILIES[kind], FAMILIES[kind].model(values, path)


def _some(names):
    return f"{names[:NAMED]} and {len(names) - NAMED} more" if len(names) > NAMED else f"{names}"

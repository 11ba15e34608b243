"""Weights out of a run into a folder that ``transformers`` loads."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch

from mpillm.checkpoint.reading import Checkpoint
from mpillm.data.settings import GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Settings
from mpillm.data.tokenizers import load_tokenizer
from mpillm.errors import ConfigError
from mpillm.files import write_json, write_text
from mpillm.hf.families import FAMILIES
from mpillm.hf.folder import INDEX, refuse_used, reporting, safetensors_library
from mpillm.hf.tensors import tensors_of

FILE_BYTES = 5_000_000_000  # of the weights in one safetensors file
DTYPES = {"float64": "F64", "float32": "F32"}  # of checkpoints, in such a file
# Special tokens of config.json, which classes would take from models of theirs.
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def to_hf(run, folder, family=None, file_bytes=FILE_BYTES):
    """Write the newest weights of a run as a folder that ``transformers`` loads.

    Local. Weights keep the bits of the checkpoint. The tokenizer of the run goes along, unless its tokens are bytes,
    and what is known of special tokens and chats.

    Parameters
    ----------
    run, folder : str or Path
        ``folder`` must be empty, or not there yet.
    family : str, optional
        As ``model_type`` names it. Left out: the first of :data:`mpillm.hf.families.FAMILIES` that computes the same.
    file_bytes : int
        No file has more, unless for a single tensor; one tensor at a time is in memory.

    Returns
    -------
    mpillm.hf.family.Family
        Whose first class loads the folder.

    Raises
    ------
    ConfigError
        If no family, or not the one asked for, computes the same, ``folder`` is in use, or the safetensors package is
        missing.
    DataError
        If something cannot be read or written.
    """
    safetensors, run, folder = safetensors_library(), Path(run), Path(folder)
    with reporting(folder, safetensors.SafetensorError):
        refuse_used(folder, "--to-hf")
        source = Checkpoint(run)
        model = source.model()
        family = family_of(model, family)
        tokenizer = load_tokenizer(run, model.vocab_size) if (run / TOKENIZER).is_file() else None
        files_beside = _beside(tokenizer, Settings.beside(run / TOKENIZER) or Settings(), model)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = source.dtype("embedding.weight")
        tensors = tensors_of(family, model)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        shapes.update({name: (2, model.hidden_size) for name in family.added.values()})
        files = _spread(shapes, np.dtype(dtype).itemsize, file_bytes)
        for file, names in files.items():
            _write_file(folder / file, {name: shapes[name] for name in names}, dtype,
                        (_values(source, tensors.get(name), shapes[name], dtype) for name in names))
        if len(files) > 1:
            total = np.dtype(dtype).itemsize * sum(map(math.prod, shapes.values()))
            write_json(folder / INDEX, {"metadata": {"total_size": total},
                                        "weight_map": {name: file for file, names in files.items() for name in names}})
        if tokenizer is not None and tokenizer.kind != "bytes":
            shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
        tokens = {**NO_TOKENS, **files_beside.pop(MODEL_CONFIG, {})}
        for name, content in files_beside.items():
            (write_json if name.endswith(".json") else write_text)(folder / name, content)
        write_json(folder / MODEL_CONFIG, {**family.config(model), "torch_dtype": dtype, "dtype": dtype, **tokens})
    return family


def family_of(model, name=None, asked="--to-hf", remedy="share the run itself"):
    """Return the family that computes a model, with its head: of the one named, or of the first. Local.

    Raises
    ------
    ConfigError
        If none does, saying what ``asked`` for it, and the ``remedy``.
    """
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"--family {name}: mpillm knows {', '.join(FAMILIES)}")
    families = [one for kind, family in FAMILIES.items() if name in (None, kind) for one in family.all_heads]
    nearest = min(families, key=lambda one: len(one.differences(model)))
    if differing := nearest.differences(model):
        values = {key: json.dumps(getattr(model, key), default=vars, allow_nan=False) for key in differing}
        keys = ", ".join(f"{key} = {value}" for key, value in values.items())
        who = (f"{nearest.architectures[0]} does not compute" if name else
               f"none of {', '.join(FAMILIES)} computes, nearest is {nearest.architectures[0]}:")
        raise ConfigError(f"{asked}: {who} model.{keys}: {remedy}")
    return nearest


def _values(source, tensor, shape, dtype):
    """Return the values of a tensor of the folder; there is none of what is added to another."""
    if tensor is None:
        return np.zeros(shape, dtype)
    parts = [torch.from_numpy(source.read(part.name, shape=part.shape)).view(part.shape) for part in tensor.parts]
    return tensor.joined(parts).numpy()


def _spread(shapes, item_bytes, file_bytes):
    """Spread tensors over files; return the names in each by file name."""
    groups, held_bytes = [[]], 0
    for name, shape in shapes.items():
        size = item_bytes * math.prod(shape)
        if groups[-1] and held_bytes + size > file_bytes:
            groups.append([])
            held_bytes = 0
        groups[-1].append(name)
        held_bytes += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_file(path, shapes, dtype, values):
    """Write a safetensors file, a tensor at a time: the library wants all of them at once.

    Its first eight bytes are the length of a JSON object, which says where each tensor lies in what follows.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in values:
            file.write(np.ascontiguousarray(part).data)


def _beside(tokenizer, settings, model):
    """Return the files that say of tokens and chats what came along, and where nothing did what the tokenizer knows.

    Of ``config.json`` they hold the special tokens. A document begins where another ended, if nothing else begins it.
    """
    files = dict(settings.files)
    if tokenizer is None or tokenizer.end is None:
        return files
    ends = list(tokenizer.ends)
    tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    files.setdefault(GENERATION_CONFIG, files.setdefault(MODEL_CONFIG, tokens))
    if tokenizer.kind != "bytes" and settings.name("eos_token") is None:
        default = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                   "model_max_length": model.max_seq_len, "bos_token": tokenizer.name(tokenizer.bos)}
        files[TOKENIZER_CONFIG] = {**default, **files.get(TOKENIZER_CONFIG, {}),
                                   "eos_token": tokenizer.name(tokenizer.end)}
    return files

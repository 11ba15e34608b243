"""Weights out of a run into a folder that ``transformers`` loads."""

import math
import shutil
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np

from mpillm.checkpoint.reading import Checkpoint
from mpillm.data.settings import GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Settings
from mpillm.data.tokenizers import load_tokenizer
from mpillm.files import write_json, write_text
from mpillm.hf.folder import INDEX, refuse_used, reporting, safetensors_library
from mpillm.hf.llama import KEYS, hf_name, turned
from mpillm.nn.init import parameter_table

FILE_ELEMENTS = 1 << 28  # of the weights in one safetensors file


def to_hf(run, folder, file_elements=FILE_ELEMENTS):
    """Write the newest weights of a run as a folder that ``transformers.LlamaForCausalLM`` loads.

    Local. Weights keep the bits of the checkpoint. The tokenizer of the run goes along, unless its tokens are bytes,
    and what is known of special tokens and chats.

    Parameters
    ----------
    run, folder : str or Path
        ``folder`` must be empty, or not there yet.
    file_elements : int
        Weights are spread over files of about this many; one file at a time is in memory.

    Raises
    ------
    ConfigError
        If ``folder`` is in use, or the safetensors package is missing.
    DataError
        If something cannot be read or written.
    """
    safetensors, run, folder = safetensors_library(), Path(run), Path(folder)
    with reporting(safetensors, folder):
        refuse_used(folder, "--to-hf")
        source = Checkpoint(run)
        model = source.model()
        tokenizer = load_tokenizer(run, model.vocab_size) if (run / TOKENIZER).is_file() else None
        files_beside = _beside(tokenizer, Settings.beside(run / TOKENIZER) or Settings(), model)
        folder.mkdir(parents=True, exist_ok=True)
        table = parameter_table(model)
        weight_files = _spread(table, file_elements)
        for file, names in weight_files.items():
            read = {name: source.read(name, shape=table[name][0]).reshape(table[name][0]) for name in names}
            tensors = {hf_name(name): np.ascontiguousarray(turned(name, values)) for name, values in read.items()}
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library leaves it to its owner alone
        if len(weight_files) > 1:
            places = {hf_name(name): file for file, names in weight_files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
        dtype = next(iter(tensors.values())).dtype.name
        if tokenizer is not None and tokenizer.kind != "bytes":
            shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
        tokens = files_beside.pop(MODEL_CONFIG, {})
        for name, content in files_beside.items():
            (write_json if name.endswith(".json") else write_text)(folder / name, content)
        write_json(folder / MODEL_CONFIG, _hf_config(model, dtype, tokens))


def _spread(table, file_elements):
    """Spread parameters over files; return the names in each by file name."""
    starts = accumulate((math.prod(shape) for shape, _ in table.values()), initial=0)
    parts = groupby(zip(table, starts), key=lambda item: item[1] // file_elements)
    groups = [[name for name, _ in part] for _, part in parts]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


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


def _hf_config(model, dtype, tokens):
    """Return ``config.json``, in the words of older and newer releases."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "torch_dtype": dtype, "dtype": dtype,
        "bos_token_id": None, "eos_token_id": None, **tokens, "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **{theirs: getattr(model, ours) for ours, theirs in KEYS.items()},
    }

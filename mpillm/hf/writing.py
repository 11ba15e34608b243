"""Weights out of a run into a folder that ``transformers`` loads."""

import math
import shutil
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np

from mpillm.checkpoint.reading import Checkpoint
from mpillm.data.tokenizers import load_tokenizer
from mpillm.hf.folder import CONFIG, INDEX, TOKENIZER, refuse_used, reporting, safetensors_library, write_json
from mpillm.hf.llama import KEYS, hf_name, turned
from mpillm.nn.init import parameter_table

FILE_ELEMENTS = 1 << 28  # of the weights in one safetensors file


def to_hf(run, folder, file_elements=FILE_ELEMENTS):
    """Write the newest weights of a run as a folder that ``transformers.LlamaForCausalLM`` loads.

    Local. Weights keep the bits of the checkpoint. The tokenizer of the run goes along, unless its tokens are bytes.

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
        tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
        folder.mkdir(parents=True, exist_ok=True)
        table = parameter_table(model)
        files = _spread(table, file_elements)
        for file, names in files.items():
            read = {name: source.read(name, shape=table[name][0]).reshape(table[name][0]) for name in names}
            tensors = {hf_name(name): np.ascontiguousarray(turned(name, values)) for name, values in read.items()}
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library leaves it to its owner alone
        if len(files) > 1:
            places = {hf_name(name): file for file, names in files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
        if tokenizer is not None and tokenizer.kind != "bytes":
            shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        dtype = next(iter(tensors.values())).dtype.name
        write_json(folder / CONFIG, _hf_config(model, dtype, tokenizer and tokenizer.end))


def _spread(table, file_elements):
    """Spread parameters over files; return the names in each by file name."""
    starts = accumulate((math.prod(shape) for shape, _ in table.values()), initial=0)
    parts = groupby(zip(table, starts), key=lambda item: item[1] // file_elements)
    groups = [[name for name, _ in part] for _, part in parts]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _hf_config(model, dtype, end):
    """Return ``config.json``, in the words of older and newer releases; a document begins where another ended."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "torch_dtype": dtype, "dtype": dtype,
        "bos_token_id": end, "eos_token_id": end, "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **{theirs: getattr(model, ours) for ours, theirs in KEYS.items()},
    }

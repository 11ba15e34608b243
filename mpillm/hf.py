"""Hugging Face Llama weights out of a run and into a new one, tensor by tensor.

Both sides turn the pairs ``(i, i + N/2)`` of a head, so that rotary positions need nothing. Weights that mpillm splits
along their input are stored input-first: these are transposed.
"""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Train
from mpillm.errors import ConfigError, DataError, MpillmError
from mpillm.nn.init import parameter_table
from mpillm.train import checkpoint, saving
from mpillm.train.text import load_tokenizer

FILE_ELEMENTS = 1 << 28  # of the weights in one safetensors file
CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer.json"

_NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_TRANSPOSED = ("attention.output.weight", "ffn.down.weight")
_RUN_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}

# Keys of [model] and of config.json that mean the same.
_KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "ffn_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# Keys of config.json that change what is computed, with the values for which mpillm computes the same.
_SUPPORTED = {
    "model_type": ["llama"], "architectures": [["LlamaForCausalLM"], None], "hidden_act": ["silu", "swish", None],
    "attention_bias": [False, None], "mlp_bias": [False, None], "quantization_config": [None],
    "partial_rotary_factor": [1.0, None],
}


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
    safetensors, run, folder = _safetensors(), Path(run), Path(folder)
    with _reporting(safetensors, folder):
        _refuse_used(folder, "--to-hf")
        source = checkpoint.Checkpoint(run)
        model = source.model()
        tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
        folder.mkdir(parents=True, exist_ok=True)
        table = parameter_table(model)
        files = _spread(table, file_elements)
        for file, names in files.items():
            read = {name: source.read(name, shape=table[name][0]).reshape(table[name][0]) for name in names}
            tensors = {_hf_name(name): np.ascontiguousarray(_turned(name, values)) for name, values in read.items()}
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library leaves it to its owner alone
        if len(files) > 1:
            places = {_hf_name(name): file for file, names in files.items() for name in names}
            _write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
        if tokenizer is not None and tokenizer.kind != "bytes":
            shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
            _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        dtype = next(iter(tensors.values())).dtype.name
        _write_json(folder / CONFIG, _hf_config(model, dtype, tokenizer and tokenizer.end))


def from_hf(run, folder):
    """Make a run directory of Hugging Face Llama weights: a configuration, and a checkpoint of step 0.

    Local. One can generate from it and name it as ``train.init_from``. Half types become float32, as in all
    checkpoints; others keep their bits.

    Parameters
    ----------
    run, folder : str or Path
        ``run`` must be empty, or not there yet. ``folder`` holds ``config.json``, the weights as safetensors and,
        perhaps, ``tokenizer.json``.

    Raises
    ------
    ConfigError
        If the model computes something that mpillm's does not, ``run`` is in use, or the safetensors package is
        missing.
    DataError
        If something cannot be read or written, or the tensors are not those of ``config.json``.
    """
    safetensors, run, folder = _safetensors(), Path(run), Path(folder)
    with _reporting(safetensors, folder):
        _refuse_used(run, "RUN")
        model = _read_model(folder / CONFIG)
        tensors = _open_tensors(safetensors, folder)
        table = parameter_table(model)
        dtype = _check_tensors(tensors, table, folder)
        train = Train(run_dir=str(run), seq_len=min(Train.seq_len, model.max_seq_len), dtype=dtype)
        manifest = {"model": asdict(model), "optimizer": "none", "seed": train.seed,
                    "data": {"sha256": None, "samples_seen": 0}}
        saving.save(run / "checkpoints", 0, _shards(tensors, table), manifest, SingleComm())
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, run / TOKENIZER)
        (run / "config.toml").write_text(Config(model=model, train=train).to_toml(), encoding="utf-8")


def _hf_name(name):
    """Translate the name of a parameter: ``layers.0.ffn.up.weight`` → ``model.layers.0.mlp.up_proj.weight``."""
    part = name.removesuffix(".weight")
    if not part.startswith("layers."):
        return f"{_NAMES[part]}.weight"
    _, layer, part = part.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _turned(name, matrix):
    """Turn a weight from one side's storage to the other's."""
    return matrix.T if name.endswith(_TRANSPOSED) else matrix


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
        **{theirs: getattr(model, ours) for ours, theirs in _KEYS.items()},
    }


def _read_model(path):
    """Return the model that a ``config.json`` describes."""
    values = _read_json(path)
    for key, supported in _SUPPORTED.items():
        if values.get(key) not in supported:
            named = [json.dumps(value) for value in supported if value is not None]
            raise _unsupported(path, key, values.get(key), " or ".join(named))
    theta = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise _unsupported(path, key, rope, 'rope_type "default" over whole heads')
        theta = rope.get("rope_theta", theta)
    model = {"rope_theta": theta}
    for ours, theirs in _KEYS.items():
        value = values.get(theirs)
        model[ours] = _DEFAULTS.get(theirs) if value is None else value
        if model[ours] is None and ours not in ("num_kv_heads", "head_dim"):
            raise ConfigError(f"{path}: {theirs}: required, but not given")
    return Config.from_dict({"model": model}, source=path).model


def _unsupported(path, key, value, supported):
    return ConfigError(
        f"{path}: {key} = {json.dumps(value)}: mpillm has the plain Llama model only, here {supported or 'none'}: "
        "convert another model"
    )


def _open_tensors(safetensors, folder):
    """Return the open file of every tensor by the tensor's name."""
    files = ["model.safetensors"]
    if (folder / INDEX).is_file():
        try:
            files = sorted({Path(file).name for file in _read_json(folder / INDEX)["weight_map"].values()})
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{folder / INDEX}: not an index of safetensors files ({error!r})") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{folder}: has no {missing[0]}: weights are read from safetensors files only")
    opened = [safetensors.safe_open(folder / file, framework="pt") for file in files]
    return {name: file for file in opened for name in file.keys()}


def _check_tensors(tensors, table, folder):
    """Hold names, shapes and types against the parameters of the model; return the dtype to compute in."""
    wanted = {_hf_name(name): shape[::-1] if name.endswith(_TRANSPOSED) else shape
              for name, (shape, _) in table.items()}
    missing = sorted(wanted.keys() - tensors)
    # the copy of a tied head, and tables of angles that old files hold
    extra = [name for name in tensors if name not in wanted and name != "lm_head.weight"
             and not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        raise DataError(f"{folder}: its tensors are not those of its {CONFIG}: missing {missing}, unknown {extra}")
    for name, shape in wanted.items():
        found = tensors[name].get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() not in _RUN_DTYPES:
            raise DataError(
                f"{folder}: {name} is {found.get_dtype()} {found.get_shape()}, its {CONFIG} asks for {list(shape)} of "
                f"{', '.join(_RUN_DTYPES)}"
            )
    return _RUN_DTYPES[found.get_dtype()]


def _shards(tensors, table):
    """Yield what a checkpoint holds of each tensor, one tensor in memory at a time."""
    for name, (shape, _) in table.items():
        values = tensors[_hf_name(name)].get_tensor(_hf_name(name))
        values = _turned(name, values.float() if values.dtype in HALF_TYPES else values)
        yield name, shape, 0, {"weight": values.reshape(-1)}


def _refuse_used(folder, what):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{what} {folder}: is in use already: name an empty directory or a new one")


def _read_json(path):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object")
    return values


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _reporting(safetensors, folder):
    """Turn what the system and the library raise into errors that name the folder."""
    try:
        yield
    except MpillmError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{folder}: {error}") from error


def _safetensors():
    """Import the safetensors library, which is optional."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError(f"convert needs the safetensors package ({error}): pip install 'mpillm[hf]'") from error
    return safetensors

"""Weights of a Hugging Face folder into a new run, tensor by tensor."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from mpillm.checkpoint import saving
from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Train
from mpillm.data.settings import MODEL_CONFIG, SETTINGS, TOKENIZER, Settings, read_json
from mpillm.errors import ConfigError, DataError
from mpillm.files import write_text
from mpillm.hf.folder import INDEX, refuse_used, reporting, safetensors_library
from mpillm.hf.llama import DEFAULTS, KEYS, RUN_DTYPES, SUPPORTED, TRANSPOSED, hf_name, turned
from mpillm.nn.init import parameter_table


def from_hf(run, folder):
    """Make a run directory of Hugging Face Llama weights: a configuration, and a checkpoint of step 0.

    Local. One can generate from it and name it as ``train.init_from``. Half types become float32, as in all
    checkpoints; others keep their bits.

    Parameters
    ----------
    run, folder : str or Path
        ``run`` must be empty, or not there yet. ``folder`` holds ``config.json``, the weights as safetensors and,
        perhaps, ``tokenizer.json``; what its files say of special tokens and chats is kept.

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
        model = _read_model(folder / MODEL_CONFIG)
        settings = Settings.of_folder(folder)
        tensors = _open_tensors(safetensors, folder)
        table = parameter_table(model)
        dtype = _check_tensors(tensors, table, folder)
        train = Train(run_dir=str(run), seq_len=min(Train.seq_len, model.max_seq_len), dtype=dtype)
        manifest = {"model": asdict(model), "optimizer": "none", "seed": train.seed,
                    "data": {"fingerprint": None, "samples_seen": 0}}
        saving.save(run / "checkpoints", 0, _shards(tensors, table), manifest, SingleComm())
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, run / TOKENIZER)
        if settings.files or (folder / TOKENIZER).is_file():
            write_text(run / SETTINGS, settings.to_json())
        write_text(run / "config.toml", Config(model=model, train=train).to_toml())


def _read_model(path):
    """Return the model that a ``config.json`` describes."""
    values = read_json(path)
    for key, supported in SUPPORTED.items():
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
    for ours, theirs in KEYS.items():
        value = values.get(theirs)
        model[ours] = DEFAULTS.get(theirs) if value is None else value
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
            files = sorted({Path(file).name for file in read_json(folder / INDEX)["weight_map"].values()})
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{folder / INDEX}: not an index of safetensors files ({error!r})") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{folder}: has no {missing[0]}: weights are read from safetensors files only")
    opened = [safetensors.safe_open(folder / file, framework="pt") for file in files]
    return {name: file for file in opened for name in file.keys()}


def _check_tensors(tensors, table, folder):
    """Hold names, shapes and types against the parameters of the model; return the dtype to compute in."""
    wanted = {hf_name(name): shape[::-1] if name.endswith(TRANSPOSED) else shape
              for name, (shape, _) in table.items()}
    missing = sorted(wanted.keys() - tensors)
    # the copy of a tied head, and tables of angles that old files hold
    extra = [name for name in tensors if name not in wanted and name != "lm_head.weight"
             and not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        raise DataError(
            f"{folder}: its tensors are not those of its {MODEL_CONFIG}: missing {missing}, unknown {extra}"
        )
    for name, shape in wanted.items():
        found = tensors[name].get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() not in RUN_DTYPES:
            raise DataError(
                f"{folder}: {name} is {found.get_dtype()} {found.get_shape()}, its {MODEL_CONFIG} asks for "
                f"{list(shape)} of {', '.join(RUN_DTYPES)}"
            )
    return RUN_DTYPES[found.get_dtype()]


def _shards(tensors, table):
    """Yield what a checkpoint holds of each tensor, one tensor in memory at a time."""
    for name, (shape, _) in table.items():
        values = tensors[hf_name(name)].get_tensor(hf_name(name))
        values = turned(name, values.float() if values.dtype in HALF_TYPES else values)
        yield name, shape, 0, {"weight": values.reshape(-1)}

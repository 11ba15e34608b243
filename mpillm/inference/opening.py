"""What inference starts from: a run, or a folder of Hugging Face weights, laid out for the ranks at hand."""

from dataclasses import replace
from pathlib import Path

import torch

from mpillm.checkpoint.reading import Checkpoint
from mpillm.config import Config, Layout, Train
from mpillm.data.settings import MODEL_CONFIG
from mpillm.data.tokenizers import load_tokenizer
from mpillm.errors import ConfigError
from mpillm.hf.reading import HFFolder

OVERRIDES = ("inference.batch", "inference.cache_bytes", "inference.pass_tokens", "inference.share_prefixes", "layout.data",
             "layout.order", "layout.pipeline", "layout.stage_cuts", "layout.tensor", "train.device", "train.dtype",
             "train.exact_blocks", "train.numerics")


def open_model(path, overrides, ranks):
    """Return what reads the weights at ``path``, the configuration for ``ranks`` ranks, and the tokenizer. Local.

    Where the overrides say nothing of the layout, every rank is a replica of its own.

    Raises
    ------
    MpillmError
        If something cannot be read, or the layout does not fit.
    """
    path, unknown = Path(path), sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise ConfigError(f"--{unknown[0]}: inference takes only --{', --'.join(OVERRIDES)}")
    if (path / MODEL_CONFIG).is_file():
        source = HFFolder(path)
        config, model = Config(model=source.model, train=Train(dtype=source.dtype)), source.model
    else:
        source = Checkpoint(path)
        config, model = Config.load(path / "config.toml"), source.model()
    if model.head != "words" or model.attention != "causal":
        raise ConfigError(f"{path}: model.head = {model.head}, model.attention = {model.attention}: inference needs words, of "
                          "which it says the next, and causal: name a run that has them")
    of_training = {"train.microbatch": 1, "train.seq_len": 1}  # which layouts are checked against
    config = replace(config, model=model, layout=Layout()).with_values({**overrides, **of_training})
    layout = config.layout
    degrees = {axis: getattr(layout, axis) for axis in ("data", "pipeline", "tensor")}
    if degrees["data"] == "auto":
        degrees.update({axis: 1 for axis in ("pipeline", "tensor") if degrees[axis] == "auto"})
    elif degrees["tensor"] == "auto":
        degrees["tensor"] = _tensor_ranks(config, max(1, ranks // degrees["data"]))
    config = replace(config, layout=replace(layout, **degrees))
    replicas = max(1, ranks // (degrees["tensor"] * degrees["pipeline"])) if "auto" not in degrees.values() else ranks
    config = config.with_values({"train.global_batch": replicas})  # a row for each
    return source, config.resolve(ranks), load_tokenizer(path, model.vocab_size)


def _tensor_ranks(config, ranks):
    """Return the largest degree that shares the heads among ``ranks`` ranks, or what pipeline leaves of them."""
    layout, train = config.layout, config.train
    left = max(1, ranks // (1 if layout.pipeline == "auto" else layout.pipeline))
    fitting = [t for t in range(1, min(left, config.model.num_heads) + 1)
               if left % t == 0 and (train.numerics == "fast" or train.exact_blocks % t == 0)]
    return fitting[-1]


def load_weights(module, source):
    """Fill the sharded parameters of ``module`` with their ranges of a source. Local."""
    with torch.no_grad():
        for parameter in module.parameters():
            shard = parameter.shard
            values = torch.as_tensor(source.read(shard.name, start=shard.start, stop=shard.stop))
            parameter.copy_(values.view(parameter.shape))

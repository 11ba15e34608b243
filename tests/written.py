"""Runs that were not trained: written with weights large enough for choices that differ, of norms and biases too."""

from dataclasses import asdict, replace

import torch

from mpillm.checkpoint import reading, saving
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Model
from mpillm.data.tokenizers import ByteTokenizer
from mpillm.model.parameters import initial_values, parameters
from mpillm.verify.reference import Reference


def make_model(**changes):
    return Model(**{"vocab_size": 257, "hidden_size": 24, "num_layers": 4, "num_heads": 4, "ffn_size": 40,
                    "max_seq_len": 32, **changes})


def make_run(path, model, **train):
    """Write a run."""
    shards = [(name, parameter.shape, 0,
               {"weight": initial_values(replace(parameter, std=20 * parameter.std or 0.3), 3, 0, parameter.size)})
              for name, parameter in parameters(model).items()]
    saving.save(path / "checkpoints", 1, shards, {"model": asdict(model)}, SingleComm())
    config = {"model": asdict(model), "train": {"run_dir": str(path), "seq_len": 16, "dtype": "float64", **train}}
    (path / "config.toml").write_text(Config.from_dict(config).to_toml(), encoding="utf-8")
    (path / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")


def shared_run(comm, path, model, **train):
    """Write a run that all ranks of ``comm`` see; return its path."""
    if comm.rank == 0:
        make_run(path, model, **train)
    comm.Barrier()
    return path


def reference_of(run, model):
    """Return the serial reference with the weights of a run."""
    source, reference = reading.Checkpoint(run), Reference(model, 0)
    with torch.no_grad():
        for name, weight in reference.parameters.items():
            weight.copy_(torch.from_numpy(source.read(name)).view(weight.shape))
    return reference

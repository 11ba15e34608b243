"""Weights that a new run starts from: those of another run, of a checkpoint, of a Hugging Face folder or of a GGUF file; a head
of another kind starts at random."""

import warnings
from dataclasses import asdict
from pathlib import Path

from mpillm.checkpoint.reading import Checkpoint
from mpillm.data.settings import MODEL_CONFIG
from mpillm.errors import CheckpointError, agreed
from mpillm.hf.gguf import GGUFFile
from mpillm.hf.reading import HFFolder
from mpillm.model.parameters import parameters

# Keys of [model]: of heads, and those of which one of another value has other weights.
OF_HEAD = ("head", "num_labels", "pooling", "pooler", "value_loss", "head_bias", "logit_softcap", "tie_embeddings")
WITH_WEIGHTS = ("head", "num_labels", "pooler", "value_loss", "head_bias")


def load_initial_weights(engine, path, comm):
    """Take up the weights of ``path``, each rank its own ranges of them.

    Collective over ``comm``; :meth:`mpillm.train.engine.Engine.distribute_weights` is to follow.

    Parameters
    ----------
    engine : mpillm.train.engine.Engine
    path : str
        A run or checkpoint folder, a folder with ``config.json`` and safetensors files, or a GGUF file.
    comm : Comm

    Raises
    ------
    CheckpointError
        On every rank, if the weights are of another body than the engine's model.
    MpillmError
        On every rank, if some rank cannot read them.
    """
    action = f"train.init_from = {path}"
    with agreed(comm, action):
        source, found = open_weights(path)
        check_same_body(found, engine.config.model, action)
    left_out = head_left_out(found, engine.config.model)
    if left_out and comm.rank == 0:
        warnings.warn(f"{action}: its head {found.head} stays behind, a new one ({engine.config.model.head}) starts at random",
                      stacklevel=3)
    with agreed(comm, action):
        engine.optimizer.restore_weights(
            lambda kind, piece: None if piece.name in left_out else source.read(piece.name, start=piece.start, stop=piece.stop))


def open_weights(path):
    """Return what reads ranges of the weights at ``path``, and the model whose weights they are. Local."""
    kind = GGUFFile if Path(path).suffix == ".gguf" else HFFolder if (Path(path) / MODEL_CONFIG).is_file() else None
    if kind is not None:
        elsewhere = kind(Path(path))
        return elsewhere, elsewhere.model
    found = Checkpoint(path)
    return found, found.model_section()


def head_left_out(found, model):
    """Return the names of parameters of ``model`` that weights of the model ``found`` are not for: those of the head, if it is
    of another kind or size. Local."""
    if all(getattr(found, key) == getattr(model, key) for key in WITH_WEIGHTS):
        return set()
    return {name for name in parameters(model) if name.startswith("head.")}


def check_same_body(found, model, action):
    """Refuse weights of another model, their head aside if it is another one. Local."""
    passed = OF_HEAD if head_left_out(found, model) else ()
    values = asdict(model)
    differing = [f"{key} = {value} (this run: {values[key]})" for key, value in asdict(found).items()
                 if value != values[key] and key not in passed]
    if differing:
        raise CheckpointError(f"{action}: weights of another model: {', '.join(differing)}: set these keys of [model] to its "
                              "values")

"""Weights from elsewhere, with their tokenizer, as a new run."""

from dataclasses import asdict
from pathlib import Path

from mpillm.checkpoint import saving
from mpillm.comm.single import SingleComm
from mpillm.config import Config, Train
from mpillm.data.settings import SETTINGS, TOKENIZER
from mpillm.files import write_text
from mpillm.hf.folder import refuse_used, reporting, safetensors_library
from mpillm.hf.gguf import GGUFFile
from mpillm.hf.reading import PIECE, HFFolder
from mpillm.model.parameters import parameters


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
    with reporting(folder, safetensors.SafetensorError):
        refuse_used(run, "RUN")
        return _write(run, HFFolder(folder))


def from_gguf(run, file):
    """Make a run directory of the weights and the tokenizer in a GGUF file, as :func:`from_hf` does of a folder.

    Local. Quantised weights become float32, by the functions of the gguf package.

    Parameters
    ----------
    run, file : str or Path

    Returns
    -------
    mpillm.hf.family.Family
        Whose table was used.

    Raises
    ------
    ConfigError
        If the model or its tokenizer does something that mpillm does not, ``run`` is in use, or the gguf or tokenizers
        package is missing.
    DataError
        If something cannot be read or written, or the tensors are not those of the metadata.
    """
    run, file = Path(run), Path(file)
    with reporting(file):
        refuse_used(run, "RUN")
        return _write(run, GGUFFile(file))


def _write(run, source):
    """Write the run; return the family."""
    model = source.model
    tokenizer, settings = source.tokenizer()
    train = Train(run_dir=str(run), seq_len=min(Train.seq_len, model.max_seq_len), dtype=source.dtype)
    manifest = {"model": asdict(model), "optimizer": "none", "seed": train.seed,
                "data": {"fingerprint": None, "samples_seen": 0}}
    saving.save(run / "checkpoints", 0, _shards(source), manifest, SingleComm())
    if tokenizer is not None:
        write_text(run / TOKENIZER, tokenizer)
    if settings.files or tokenizer is not None:
        write_text(run / SETTINGS, settings.to_json())
    write_text(run / "config.toml", Config(model=model, train=train).to_toml())
    return source.family


def _shards(source):
    """Yield what a checkpoint holds of each parameter, piece by piece."""
    for name, parameter in parameters(source.model).items():
        for start in range(0, parameter.size, PIECE):
            stop = min(start + PIECE, parameter.size)
            yield name, parameter.shape, start, {"weight": source.read(name, start, stop)}

"""``mpillm data``: text files to the HDF5 file of tokens that training reads."""

import codecs
import os
from dataclasses import replace
from pathlib import Path

import click
from tqdm import tqdm

from mpillm.data.text import Documents
from mpillm.data.tokenizers import END_OF_DOCUMENT, ByteTokenizer, load_tokenizer, train_bpe
from mpillm.data.tokens import write_tokens
from mpillm.errors import ConfigError, DataError

DEFAULT_VOCAB_SIZE = 8192


@click.command("data")
@click.argument("files", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="The HDF5 file to write.")
@click.option("--tokenizer", "name", default="bpe", show_default=True, metavar="bytes|bpe|FILE",
              help="The bytes themselves; a byte-level BPE learned from the training documents; or a JSON "
                   "file of the tokenizers library, or a folder with its tokenizer.json.")
@click.option("--vocab-size", type=int, help=f"Tokens of the BPE; {DEFAULT_VOCAB_SIZE} if not given.")
@click.option("--validation-fraction", "fraction", type=float, default=0.0, show_default=True,
              help="Hold out about this part of the documents, chosen by a hash of their text; where they are too few "
                   "for that, this part of each, at its end.")
@click.option("--validation", "held_out", multiple=True, metavar="FILE",
              help="Hold out this file; can be repeated.")
def command(files, output, name, vocab_size, fraction, held_out):
    """Turn text FILES into tokens.

    JSON lines with text under the key "text" are a document each, whatever the file is called; any other file is one
    document. Files of gzip, bzip2 and xz are read unpacked. @LIST stands for the files that the lines of the file LIST
    name. Empty documents are left out.
    """
    _check_launch()
    files, held_out = _expand(files), _expand(held_out)
    _check(files, held_out, output, name, vocab_size, fraction)
    train, validation = _splits(files, held_out, fraction, utf8=name != "bytes")
    size = sum(os.path.getsize(path) for path in files + held_out)
    passes = 2 if name == "bpe" else 1
    with tqdm(total=passes * size, desc="tokens", unit="B", unit_scale=True, disable=None) as bar:
        tokenizer = _tokenizer(name, vocab_size, _shown(train, bar))
        splits = write_tokens(output, _shown(train, bar), _shown(validation, bar), tokenizer)
    click.echo(f"{output}: tokenizer {name}, vocabulary of {tokenizer.vocab_size:,}")
    for label, split in zip(("train", "validation"), splits):
        click.echo(
            f"{label:10} {split.documents:>12,} documents {split.bytes:>16,} bytes {split.tokens:>16,} tokens"
        )
    if train.are_cut:
        click.echo(f"{output}: too few documents to hold out whole ones: the last {fraction:.3g} of each is held out, from "
                   "where a line begins")
    if not splits[1].tokens:
        click.echo(f"{output}: nothing is held out, so training will not be evaluated: --validation-fraction 0.1 holds "
                   "out about a tenth")


def _check_launch():
    """Refuse several processes: each would do all the work, and they would replace one file."""
    from mpillm.comm.world import launch, launched_size

    def refuse():
        raise ConfigError(f"mpillm data: is the work of one process, the launcher started {processes}: start it "
                          "without mpirun or srun")

    _, processes = launched_size()
    if processes > 1:
        launch(refuse)  # all leave, one speaks


def _expand(names):
    """Replace every ``@LIST`` by the paths on its lines."""
    paths = []
    for name in names:
        if not name.startswith("@"):
            paths.append(name)
            continue
        try:
            data = Path(name[1:]).read_bytes()
        except OSError as error:
            raise DataError(f"list of files {name}: cannot be read ({error.strerror or error})") from error
        if b"\0" in data:  # as in UTF-16, or where the @ was not meant
            raise DataError(f"list of files {name}: is not a list of paths: give it a path a line, in UTF-8")
        # paths may hold anything else that some count as the end of a line
        lines = [os.fsdecode(line.removesuffix(b"\r")) for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n")]
        paths += [line for line in lines if line.strip()]
        if not any(map(str.strip, lines)):
            raise DataError(f"list of files {name}: is empty: give it a path a line")
    return tuple(paths)


def _check(files, held_out, output, name, vocab_size, fraction):
    """Refuse what cannot work before any text is read."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"--validation-fraction {fraction}: must be at least 0 and below 1")
    if fraction and held_out:
        raise ConfigError("--validation-fraction and --validation: both choose the held-out text, give one")
    if vocab_size is not None and name != "bpe":
        raise ConfigError(f"--vocab-size {vocab_size}: goes with --tokenizer bpe, this one is {name}")
    if name not in ("bytes", "bpe") and not Path(name).exists():
        raise ConfigError(f"--tokenizer {name}: neither bytes, bpe nor a file")
    for path in files + held_out:
        if not Path(path).is_file():
            problem = "is a directory: name the files in it" if Path(path).is_dir() else "no such file"
            raise DataError(f"text file {path}: {problem}")
    twice = {os.path.realpath(path) for path in files} & {os.path.realpath(path) for path in held_out}
    if twice:
        raise ConfigError(f"{min(twice)}: given both to train on and as --validation")
    if os.path.realpath(output) in map(os.path.realpath, files + held_out):
        raise ConfigError(f"-o {output}: is one of the texts, and would replace it: choose another -o")
    folder = Path(output).parent
    if Path(output).is_dir() or not os.access(folder, os.W_OK):
        problem = "is a directory" if Path(output).is_dir() else f"{folder} is no directory one can write to"
        raise DataError(f"token file {output}: cannot be written: {problem}: choose another -o")


def _splits(files, held_out, fraction, utf8):
    """Return the documents to train on and those held out; refuse splits without any text."""
    train, validation = Documents(files, low=fraction, utf8=utf8), Documents(files, high=fraction, utf8=utf8)
    if held_out:
        validation = Documents(held_out, utf8=utf8)
    elif fraction and not (_has_text(train) and _has_text(validation)):
        train, validation = replace(train, are_cut=True), replace(validation, are_cut=True)
    if not _has_text(train):
        why = f"--validation-fraction {fraction} holds out every document" if fraction else "all are empty"
        raise DataError(f"no training text in {len(files)} files: {why}")
    if (fraction or held_out) and not _has_text(validation):
        raise DataError(
            f"no validation text: {len(validation.paths)} files give none to hold out: raise --validation-fraction, or "
            "hold out files with --validation"
        )
    return train, validation


def _has_text(documents):
    return next(iter(documents), None) is not None


def _tokenizer(name, vocab_size, texts):
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        return train_bpe(texts, DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
    tokenizer = load_tokenizer(name)
    if getattr(tokenizer, "has_grown", False):
        click.echo(f"mpillm data: --tokenizer {name} names no token that ends a document: {END_OF_DOCUMENT} is added "
                   f"as token {tokenizer.end}", err=True)
    return tokenizer


def _shown(documents, bar):
    """Yield the documents and move the bar on."""
    for document in documents:
        yield document
        bar.update(len(document))

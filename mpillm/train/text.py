"""Text to tokens and back: tokenizers, the documents in files, and the HDF5 file that training reads."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mpillm.errors import ConfigError, DataError

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_BPE = 257  # every byte, and the end of a document

# End-of-document tokens that other projects' tokenizer files bring along.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
_RUN_FILE = "tokenizer.json"
_PIECE_CHARACTERS = 1 << 20
_BLOCK_TOKENS = 1 << 20
# The byte-level pattern always cuts here, so that the tokens of the pieces are the tokens of the whole.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


class ByteTokenizer:
    """The bytes of the text are the tokens 0 to 255; token 256 ends a document. Any bytes pass unchanged."""

    kind, vocab_size, end = "bytes", 257, 256

    def encode(self, text):
        """Return the tokens of ``text``, str or bytes, as a row of uint16."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, tokens):
        """Return the bytes that ``tokens`` stand for, ends of documents left out."""
        tokens = np.asarray(tokens)
        return tokens[tokens < self.end].astype(np.uint8).tobytes()

    def to_json(self):
        """Return the tokenizer as the text of a JSON file."""
        return '{"mpillm_tokenizer": "bytes"}'


class LibraryTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Parameters
    ----------
    library : tokenizers.Tokenizer
        Changed: it gets an end-of-document token unless it knows one, and takes special tokens that stand in
        a text for plain text.
    kind : {"bpe", "file"}
        Trained by :func:`train_bpe`, or given.
    """

    def __init__(self, library, kind):
        self.kind, self._library = kind, library
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        known = [name for name in _KNOWN_ENDS if library.token_to_id(name) is not None]
        if not known:
            library.add_special_tokens([END_OF_DOCUMENT])
        self.end = library.token_to_id(known[0] if known else END_OF_DOCUMENT)
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text):
        """Return the tokens of ``text``, str or UTF-8 bytes, as a row of :func:`token_dtype`."""
        text = text if isinstance(text, str) else text.decode()
        pieces = _pieces(text) if self.kind == "bpe" else [text]
        rows = [self._library.encode(piece, add_special_tokens=False).ids for piece in pieces]
        return np.concatenate([np.array(row, token_dtype(self.vocab_size)) for row in rows])

    def decode(self, tokens):
        """Return the UTF-8 bytes that ``tokens`` stand for, ends of documents left out."""
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=True).encode()

    def to_json(self):
        """Return the tokenizer as the text of a JSON file, which the ``tokenizers`` library reads."""
        return self._library.to_str()


def train_bpe(texts, vocab_size):
    """Learn a byte-level byte-pair encoding from an iterable of str or UTF-8 bytes.

    Local. The same texts in the same order give the same tokenizer. Too little text gives fewer than
    ``vocab_size`` tokens.

    Raises
    ------
    ConfigError
        If ``vocab_size`` is below 257, or the ``tokenizers`` package is missing.

    Notes
    -----
    Source: Sennrich, Haddow, Birch (2016); on bytes: Radford et al. (2019).
    """
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"a byte-level BPE of vocab_size {vocab_size}: needs at least {SMALLEST_BPE}, the 256 bytes and "
            "the end of a document: raise --vocab-size, or use --tokenizer bytes"
        )
    tokenizers = _tokenizers()
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = byte_level(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], show_progress=False,
        initial_alphabet=sorted(byte_level.alphabet()),
    )
    decoded = (text if isinstance(text, str) else text.decode() for text in texts)
    library.train_from_iterator((piece for text in decoded for piece in _pieces(text)), trainer)
    return LibraryTokenizer(library, "bpe")


def load_tokenizer(path):
    """Return the tokenizer of a token file, of a run directory, or of a file of the ``tokenizers`` library.

    Local.

    Raises
    ------
    DataError
        If there is none, or it cannot be read.
    ConfigError
        If it needs the ``tokenizers`` package and that is missing.
    """
    path = Path(path)
    source = path / _RUN_FILE if path.is_dir() else path
    try:
        text = _inside(source) if h5py.is_hdf5(source) else source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tokenizer {source}: cannot be read ({error})") from error
    if text is None:
        raise DataError(f"tokenizer of {path}: this token file holds none: make it with `mpillm data`")
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    from_str = _tokenizers().Tokenizer.from_str
    try:
        return LibraryTokenizer(from_str(text), "file")
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"tokenizer {source}: not a file of the tokenizers library ({error})") from error


def copy_tokenizer(tokens_path, folder):
    """Write the tokenizer inside a token file, if there is one, into a run directory. Local."""
    text = _inside(tokens_path)
    if text is not None:
        (Path(folder) / _RUN_FILE).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Documents:
    """The documents in files, as bytes, read anew at every iteration; empty ones are left out.

    Local. A ``.jsonl`` file has a document a line, under the key ``"text"``; any other file is one document.
    One document at a time is in memory.

    Parameters
    ----------
    paths : sequence of str
    low, high : float
        Only documents whose place in [0, 1) lies in ``low <= place < high``. The place is a SHA-256 of the
        path as it was given, or of a JSON line's text, and so does not depend on the other documents.
    utf8 : bool
        Whether documents must be valid UTF-8.

    Raises
    ------
    DataError
        When iterated, if a file cannot be read or does not hold what it must.
    """

    paths: tuple
    low: float = 0.0
    high: float = 1.0
    utf8: bool = True

    def __iter__(self):
        for path in self.paths:
            try:
                for key, text in (_json_lines if path.endswith(".jsonl") else self._whole_file)(path):
                    if text and self.low <= _place(key) < self.high:
                        yield text
            except IsADirectoryError:
                raise DataError(f"text file {path}: is a directory: name the files in it") from None
            except OSError as error:
                raise error if isinstance(error, DataError) else DataError(
                    f"text file {path}: cannot be read ({error.strerror or error})") from error

    def _whole_file(self, path):
        """Yield the one document of a text file."""
        data = Path(path).read_bytes()
        if self.utf8:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"text file {path}: byte {error.start} is not UTF-8 ({error.reason}): convert the file, "
                    "or use --tokenizer bytes, which takes any bytes"
                ) from None
        yield os.fsencode(Path(path).as_posix()), data


@dataclass(frozen=True)
class Split:
    """How much one split of a token file holds."""

    documents: int
    bytes: int
    tokens: int


def write_tokens(path, train, validation, tokenizer):
    """Write a token file: both splits, the tokenizer, and the bytes of text behind each split.

    Local. The file appears whole or not at all. Tokens are contiguous, so that they can be memory-mapped.

    Parameters
    ----------
    path : str or Path
    train, validation : iterable of bytes or str
        Documents, read once.
    tokenizer : ByteTokenizer or LibraryTokenizer

    Returns
    -------
    train, validation : Split

    Raises
    ------
    DataError
        If the file cannot be written.
    """
    try:
        with _replacing(Path(path)) as temporary, h5py.File(temporary, "w") as file:
            file.attrs.update(tokenizer=tokenizer.kind, vocab_size=tokenizer.vocab_size, end=tokenizer.end)
            file["tokenizer"] = tokenizer.to_json()
            return tuple(
                _write_split(file.create_group(name), documents, tokenizer, temporary.parent)
                for name, documents in (("train", train), ("validation", validation))
            )
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"token file {path}: cannot be written ({error.strerror or error})") from error


def token_dtype(vocab_size):
    """Return the unsigned integer type that tokens of a vocabulary are stored in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _write_split(group, documents, tokenizer, folder):
    """Write tokens, starts of documents and bytes of text; tokens are spooled until their number is known."""
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    end, starts, num_tokens, num_bytes = dtype.type(tokenizer.end).tobytes(), array("Q"), 0, 0
    with tempfile.TemporaryFile(dir=folder) as spool:
        for document in documents:
            tokens = tokenizer.encode(document)
            starts.append(num_tokens)
            spool.write(tokens.astype(dtype).tobytes() + end)
            num_tokens += len(tokens) + 1
            num_bytes += len(document.encode() if isinstance(document, str) else document)
        spool.seek(0)
        dataset = group.create_dataset("tokens", (num_tokens,), dtype)
        for first in range(0, num_tokens, _BLOCK_TOKENS):
            block = np.frombuffer(spool.read(_BLOCK_TOKENS * dtype.itemsize), dtype)
            dataset[first:first + len(block)] = block
    group["documents"] = np.frombuffer(starts, np.uint64) if starts else np.empty(0, np.uint64)
    group.attrs["bytes"] = num_bytes
    return Split(len(starts), num_bytes, num_tokens)


@contextlib.contextmanager
def _replacing(path):
    """Give a temporary path beside ``path`` that takes its place when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _inside(tokens_path):
    """Return the text of the tokenizer in a token file, or None."""
    with h5py.File(tokens_path, "r") as file:
        return file["tokenizer"].asstr()[()] if "tokenizer" in file else None


def _json_lines(path):
    """Yield the text of every line of a JSON lines file, as its own key."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"text file {path}: line {number} is no JSON object with text under the key \"text\" "
                    f"({type(error).__name__}: {error})"
                ) from None
            yield text, text


def _place(key):
    """Map a key to [0, 1), evenly and for ever the same."""
    return (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 11) / (1 << 53)


def _pieces(text):
    """Cut long text into pieces of about a million characters that the byte-level pattern tokenizes alike."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + _PIECE_CHARACTERS):
        yield text[start:cut.start()]
        start = cut.start()
    yield text[start:]


def _tokenizers():
    """Import the tokenizers library, which is optional."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ConfigError(
            f"this tokenizer needs the tokenizers package ({error}): pip install 'mpillm[text]', or use "
            "--tokenizer bytes"
        ) from error
    return tokenizers

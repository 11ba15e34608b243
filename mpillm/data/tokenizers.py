"""Tokenizers: bytes, byte-pair encodings learned or brought along; where they are kept."""

import re
from pathlib import Path

import h5py
import numpy as np

from mpillm.errors import ConfigError, DataError
from mpillm.hdf5 import open_to_read

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_BPE = 257  # every byte, and the end of a document

# End-of-document tokens that other projects' tokenizer files bring along.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
_RUN_FILE = "tokenizer.json"
_PIECE_CHARACTERS = 1 << 20
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


def token_dtype(vocab_size):
    """Return the unsigned integer type that tokens of a vocabulary are stored in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _inside(tokens_path):
    """Return the text of the tokenizer in a token file, or None."""
    with open_to_read(tokens_path) as file:
        return file["tokenizer"].asstr()[()] if "tokenizer" in file else None


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

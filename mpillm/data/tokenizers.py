"""Tokenizers: bytes, byte-pair encodings learned or brought along; where they are kept."""

import math
import re
from pathlib import Path

import h5py
import numpy as np

from mpillm.data.settings import SETTINGS, TOKENIZER, Settings
from mpillm.data.windows import encode_in_windows
from mpillm.errors import ConfigError, DataError
from mpillm.files import write_text
from mpillm.hdf5 import open_to_read

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_BPE = 257  # every byte, and the end of a document

_PIECE_CHARACTERS = 1 << 20
# The byte-level pattern always cuts here, so that the words of the pieces are the words of the whole.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


class ByteTokenizer:
    """The bytes of the text are the tokens 0 to 255; token 256 ends a document. Any bytes pass unchanged."""

    kind, vocab_size, settings = "bytes", 257, None
    starts, end, ends, bos = (), 256, (256,), 256

    def encode(self, text):
        """Return the tokens of ``text``, str or bytes, as a row of uint16."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def encode_documents(self, documents):
        """Yield the tokens of every document as ``(tokens, True)``: they come in one part."""
        for document in documents:
            yield self.encode(document), True

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
        Changed: it takes special tokens that stand in a text for plain text, and gets an end-of-document token if it
        knows none and the model has room.
    kind : {"bpe", "file"}
        Trained by :func:`train_bpe`, or given.
    settings : Settings, optional
        What stands beside it. Without, as in files from before settings were kept, nothing begins a text.
    vocab_size : int, optional
        Of the model that goes with it; by default the one of ``settings``.

    Attributes
    ----------
    ends : list of int
        Tokens at which generation stops.
    end : int or None
        The one of them that ends a document; None if the tokenizer names none and the model has no room.
    starts : list of int
        Tokens that stand before a text.
    has_grown : bool
        Whether it named no end, and got one.
    bos : int or None
        The token that is named as the first of a text, by default the one that does stand there, else ``end``.
    """

    def __init__(self, library, kind, settings=None, vocab_size=None):
        self.kind, self.settings, self._library = kind, settings or Settings(), library
        library.no_truncation()
        library.no_padding()
        self.starts = [] if settings is None else settings.starts(library)
        self.ends = self.settings.ends(library)
        library.encode_special_tokens = True
        self.has_grown = not self.ends and _size(library) < (vocab_size or self.settings.vocab_size or math.inf)
        if self.has_grown:
            library.add_special_tokens([END_OF_DOCUMENT])
            self.ends = [library.token_to_id(END_OF_DOCUMENT)]
        self.end = next(iter(self.ends), None)
        named = [self.settings.token("bos_token", library), *self.starts, self.end]
        self.bos = next((token for token in named if token is not None), None)
        self.vocab_size = _size(library)

    def encode(self, text):
        """Return the tokens of ``text``, str or UTF-8 bytes, as a row of :func:`token_dtype`.

        They begin as the tokenizer begins a text, often with ``<s>``, and have no end.
        """
        return np.concatenate([tokens for tokens, _ in self.encode_documents([text])])

    def encode_documents(self, documents):
        """Yield the tokens of every document, one part after the other, as ``(tokens, is_last)``.

        Several documents, or pieces of one, are encoded at a time.
        """
        dtype, is_first = token_dtype(self.vocab_size), True
        data = (text.encode() if isinstance(text, str) else text for text in documents)
        for tokens, is_last in encode_in_windows(self._library, data):
            yield np.array(self.starts + tokens if is_first else tokens, dtype), is_last
            is_first = is_last

    def decode(self, tokens):
        """Return the UTF-8 bytes that ``tokens`` stand for, special tokens left out."""
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=True).encode()

    def name(self, token):
        """Return the text of a token."""
        return self._library.id_to_token(token)

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
    tokenizers = tokenizers_library()
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
    return LibraryTokenizer(library, "bpe", Settings())


def load_tokenizer(path, vocab_size=None):
    """Return the tokenizer of a token file, a run directory, a Hugging Face folder, or a ``tokenizers`` library's file.

    Local. A file ``tokenizer.json`` brings along what the files beside it say, see :class:`.Settings`.

    Parameters
    ----------
    path : str or Path
    vocab_size : int, optional
        Of the model that goes with it: the tokenizer gets no tokens beyond.

    Raises
    ------
    DataError
        If there is none, or it cannot be read.
    ConfigError
        If it needs the ``tokenizers`` package and that is missing.
    """
    path = Path(path)
    source = path / TOKENIZER if path.is_dir() else path
    try:
        if h5py.is_hdf5(source):
            text, settings = _inside(source)
        else:
            text, settings = source.read_text(encoding="utf-8"), Settings.beside(source)
    except (OSError, UnicodeDecodeError) as error:
        raise error if isinstance(error, DataError) else DataError(
            f"tokenizer {source}: cannot be read ({error})") from error
    if text is None:
        raise DataError(f"tokenizer of {path}: this token file holds none: make it with `mpillm data`")
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    from_str = tokenizers_library().Tokenizer.from_str
    try:
        library = from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"tokenizer {source}: not a file of the tokenizers library ({error})") from error
    return LibraryTokenizer(library, "file", settings, vocab_size)


def copy_tokenizer(tokens_path, folder):
    """Write the tokenizer inside a token file, if there is one, and its settings into a run directory. Local."""
    text, settings = _inside(tokens_path)
    if text is not None:
        write_text(Path(folder) / TOKENIZER, text)
    if settings is not None:
        write_text(Path(folder) / SETTINGS, settings.to_json())


def new_document(tokenizer):
    """Return the tokens that stand for an empty prompt: what begins a text, else what ends the one before. Local."""
    start = [int(token) for token in tokenizer.encode("")]
    if not start and tokenizer.end is None:
        raise ConfigError(
            "without a prompt: the tokenizer of the run names no token that begins or ends a text: give a prompt"
        )
    return start or [tokenizer.end]


def token_dtype(vocab_size):
    """Return the unsigned integer type that tokens of a vocabulary are stored in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _inside(tokens_path):
    """Return the text of the tokenizer in a token file, and its settings, each None if it is not there."""
    with open_to_read(tokens_path) as file:
        text, settings = (file[name].asstr()[()] if name in file else None
                          for name in ("tokenizer", "tokenizer_settings"))
    return text, settings and Settings.from_json(settings)


def _size(library):
    return max(library.get_vocab(with_added_tokens=True).values()) + 1


def _pieces(text):
    """Cut long text into pieces of about a million characters that the byte-level pattern tokenizes alike."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + _PIECE_CHARACTERS):
        yield text[start:cut.start()]
        start = cut.start()
    yield text[start:]


def tokenizers_library():
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

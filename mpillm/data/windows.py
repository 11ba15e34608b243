"""Text of any length through a tokenizer of the library, in windows that overlap.

The library takes some 180 bytes of memory for every byte of a text, and does not tell where a text may be cut: a
tokenizer may put something before a text, count from its start, or take all of it for one word. So neighbouring windows
overlap, and the tokens of one go over into those of the next where both have the same ``2 * _AGREEING`` tokens at the
same places in the same words.

The tokens are then those of the whole text. Words begin by what stands near, or by what stands since the last place
where both windows had one begin. Within a word of a byte-pair encoding, a merge across the place would have happened in
the left window, too: its left part is made by the same merges there, and so is its right part, a piece of a token that
both windows have. Where windows do not agree, as in a long run of one letter, the left one grows until they do.
"""

from dataclasses import dataclass
from functools import cached_property

from mpillm.errors import DataError

_STEP_BYTES, _OVERLAP_BYTES = 1 << 15, 1 << 10
_BATCH_BYTES = 1 << 19  # encoded at a time, by the threads of the library
_AGREEING, _TRIES = 16, 64  # tokens that agree on either side of a place; places that are looked at


@dataclass
class _Window:
    """A piece of a document and, once encoded, its tokens, of which those from ``first`` on are not yielded yet."""

    document: bytes
    start: int
    stop: int
    encoding: object = None
    first: int = 0

    @property
    def is_last(self):
        return self.stop == len(self.document)

    @cached_property
    def text(self):
        return self.document[self.start:self.stop].decode()

    @cached_property
    def ids(self):
        return self.encoding.ids

    def token_at(self, character):
        """Return the token at a character if there are enough others on both sides, else None."""
        token = self.encoding.char_to_token(character)
        has_room = token is not None and self.first + _AGREEING <= token <= len(self.ids) - _AGREEING
        return token if has_room else None

    def around(self, token, shift):
        """Return the tokens around one: numbers, characters less ``shift``, words counted from its own."""
        found, own = [], self.encoding.token_to_word(token)
        for i in range(token - _AGREEING, token + _AGREEING):
            (begin, end), word = self.encoding.token_to_chars(i), self.encoding.token_to_word(i)
            found.append((self.ids[i], begin - shift, end - shift, word - own))
        return found


def encode_in_windows(library, documents):
    """Yield the tokens of every document, one part after the other, as ``(list of int, is_last)``.

    Local. Memory: a few hundred bytes for every byte of a batch of windows, beside the documents in it.

    Parameters
    ----------
    library : tokenizers.Tokenizer
    documents : iterable of bytes
        UTF-8.

    Raises
    ------
    DataError
        If tokens depend on what stands far behind them.
    """
    left = None
    for window in _encoded(library, documents):
        if left is None and window.start > 0 or left is not None and window.stop <= left.stop:
            continue  # an earlier window has grown over this one
        if left is None:
            left = window
        elif (seam := _seam(left, window)) is None:
            left = _grown(library, left)
        else:
            yield left.ids[left.first:seam[0]], False
            left, window.first = window, seam[1]
        if left.is_last:
            yield left.ids[left.first:], True
            left = None


def _encoded(library, documents):
    """Yield the windows of all documents, encoded batch by batch."""
    batch, size = [], 0
    for document in documents:
        for window in _windows(document):
            batch.append(window)
            size += window.stop - window.start
            if size >= _BATCH_BYTES:
                yield from _encode(library, batch)
                batch, size = [], 0
    yield from _encode(library, batch)


def _windows(document):
    """Cut a document into windows of which each goes a little into the next."""
    start, stop = 0, min(len(document), _STEP_BYTES + _OVERLAP_BYTES)
    while stop < len(document):
        stop = _character(document, stop)
        yield _Window(document, start, stop)
        start, stop = _character(document, stop - _OVERLAP_BYTES), min(len(document), stop + _STEP_BYTES)
    yield _Window(document, start, stop)


def _encode(library, batch):
    """Encode windows; a single one without the library's threads."""
    if len(batch) == 1:
        encodings = [library.encode(batch[0].text, add_special_tokens=False)]
    else:
        encodings = library.encode_batch([window.text for window in batch], add_special_tokens=False)
    for window, window.encoding in zip(batch, encodings):
        yield window


def _seam(left, right):
    """Return the tokens of two overlapping windows at which the one may go over into the other, or None."""
    overlap = len(right.document[right.start:left.stop].decode())
    shift = len(left.text) - overlap
    for number in range(_TRIES):  # in the middle half
        character = overlap // 4 + overlap * number // (2 * _TRIES)
        a, b = left.token_at(shift + character), right.token_at(character)
        if a is None or b is None:
            continue
        tokens = left.around(a, shift)
        begins_character = tokens[_AGREEING - 1][1] < tokens[_AGREEING][1]
        if begins_character and tokens == right.around(b, 0):
            return a, b
    return None


def _grown(library, window):
    """Return a window of twice the length, whose first tokens, as far as they count, must be the same."""
    stop = _character(window.document, min(len(window.document), 2 * window.stop - window.start))
    longer = _Window(window.document, window.start, stop, first=window.first)
    longer.encoding = library.encode(longer.text, add_special_tokens=False)
    settled = window.first and window.first + _AGREEING
    if longer.ids[:settled] != window.ids[:settled]:
        raise DataError(
            f"a text of {len(window.document)} bytes: what this tokenizer makes of its byte {window.start} depends on "
            f"text beyond byte {window.stop}: cut the text into shorter documents"
        )
    return longer


def _character(document, place):
    """Return where the character at a byte begins."""
    while place < len(document) and document[place] & 0xC0 == 0x80:
        place -= 1
    return place

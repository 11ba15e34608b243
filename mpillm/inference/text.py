"""The text of tokens as they come."""


class Text:
    """Turns tokens into pieces of text: whole characters, and nothing that a stop string may begin with.

    Parameters
    ----------
    tokenizer : tokenizer
    stop : tuple of str
    """

    def __init__(self, tokenizer, stop=()):
        self._tokenizer, self._stop, self._tokens, self._given = tokenizer, stop, [], 0

    def add(self, *tokens):
        """Return what tokens add to the text, "" if that is not known yet."""
        self._tokens += tokens
        text = self._text().rstrip("\ufffd")
        places = [place for place in map(text.find, self._stop) if place >= 0]
        return self._up_to(text[:min(places)] if places else text[:len(text) - self._may_begin(text)])

    def rest(self, text=None):
        """Return what is left of the whole text, if that is not all of the tokens."""
        return self._up_to(self._text() if text is None else text)

    def _text(self):
        return self._tokenizer.decode(self._tokens).decode(errors="replace")

    def _up_to(self, text):
        piece = text[self._given:]
        self._given = max(self._given, len(text))
        return piece

    def _may_begin(self, text):
        """Return how many characters at the end may begin a stop string."""
        return max((count for stop in self._stop for count in range(1, len(stop)) if text.endswith(stop[:count])), default=0)

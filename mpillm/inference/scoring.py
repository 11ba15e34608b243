"""How likely texts are: which tokens are scored behind which, in windows and by the rules of ``lm-eval``. Local."""

import math
from dataclasses import dataclass, replace

from mpillm.errors import ConfigError
from mpillm.inference.requests import Request


@dataclass(frozen=True)
class Score:
    """How likely a continuation, or a text, is.

    Attributes
    ----------
    logprob : float
        Sum of the log-probabilities of its tokens.
    num_tokens : int
    is_greedy : bool
        Whether each was the likeliest.
    dropped : int
        Tokens of the context that do not fit into the model, the first ones.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool
    dropped: int = 0


class Scored:
    """Turns what is to be scored into requests.

    Parameters
    ----------
    tokenizer : tokenizer
    max_seq_len : int
        Of the model.
    """

    def __init__(self, tokenizer, max_seq_len):
        self._tokenizer, self._longest = tokenizer, max_seq_len

    def ask(self, what, name=""):
        """Return requests of this name, and how many tokens of the context are dropped.

        Parameters
        ----------
        what : str or (context, continuation)
            A text; or a pair of texts or of rows of tokens.
        name : str

        Raises
        ------
        ConfigError
            If nothing is to be scored, or more than the model takes.
        """
        if isinstance(what, str):
            dropped, rows = 0, self._windows(encode(self._tokenizer, what, "text")[len(self._tokenizer.starts):])
        else:
            context, continuation = self._pair(*what)
            if not continuation or len(continuation) > self._longest:
                raise ConfigError(f"continuation has {len(continuation)} tokens: needs one at least, and no more than "
                                  f"model.max_seq_len = {self._longest}")
            dropped = max(0, len(context) + len(continuation) - self._longest - 1)
            rows = [(context[dropped:] + continuation, len(context) - dropped)]
        return [Request(name, row, 0, scored_from=start) for row, start in rows], dropped

    def _pair(self, context, continuation):
        """Return the tokens of both: those of the whole, cut behind as many as the context has by itself."""
        if not isinstance(context, str):
            return list(context) or [self._first()], list(continuation)
        bare = context.rstrip()
        context, continuation = bare, context[len(bare):] + continuation
        whole = encode(self._tokenizer, context + continuation, "context and continuation")
        if not context:
            return [self._first()], whole[len(self._tokenizer.starts):]
        length = len(encode(self._tokenizer, context, "context"))
        return whole[:length], whole[length:]

    def _windows(self, tokens):
        """Return rows of as many tokens as the model takes, each token scored in one, and from where on."""
        if not tokens:
            raise ConfigError("text has no tokens: give some")
        stop = min(self._longest, len(tokens))
        rows = [([self._first(), *tokens[:stop]], 1)]
        while stop < len(tokens):
            scored = min(len(tokens) - stop, self._longest)
            stop += scored
            row = tokens[stop - self._longest - 1:stop]
            rows.append((row, len(row) - scored))
        return rows

    def _first(self):
        """Return the token that stands before a text."""
        if self._tokenizer.bos is None:
            raise ConfigError("the tokenizer names no token that begins or ends a text: give a context")
        return self._tokenizer.bos


def score_of(results, dropped=0):
    """Return the :class:`Score` that the results of :meth:`Scored.ask`'s requests are together."""
    scores = [score for result in results for score in result.scores]
    return Score(math.fsum(scores), len(scores), all(result.is_greedy for result in results), dropped)


def merged(requests):
    """Return fewer requests, where some differ in their one token that is scored, and of each of ``requests`` which one answers
    it, and as which alternative, or None."""
    fewer, alternatives, found, first = [], [], [], {}
    for request in requests:
        context = request.prompt[:-1]
        is_single = request.scored_from == len(context)
        if is_single and context in first:
            place = first[context]
            found.append((place, len(alternatives[place])))
            alternatives[place].append(request.prompt[-1])
            continue
        if is_single:
            first[context] = len(fewer)
        found.append((len(fewer), None))
        fewer.append(request)
        alternatives.append([])
    return [replace(request, alternatives=tuple(more)) for request, more in zip(fewer, alternatives)], found


def answer_to(place, alternative, results):
    """Return the result of a request that was :func:`merged`."""
    result = results[place]
    if alternative is None:
        return result
    score, is_greedy = result.alternatives[alternative]
    return replace(result, scores=[score], is_greedy=is_greedy)


def by_context(requests):
    """Return the places of requests in portions for a replica each: those of one context, while it is longer than what follows
    it in all of them, which is worth to be computed once."""
    portions, last = [], {}
    for place, request in enumerate(requests):
        context, count = request.prompt[:request.scored_from], len(request.prompt) - request.scored_from
        portion, room = last.get(context, (None, 0))
        if room < count:
            portion, room = [], len(context)
            portions.append(portion)
        portion.append(place)
        last[context] = portion, room - count
    return portions


def encode(tokenizer, text, what):
    """Return the tokens of a text."""
    try:
        return [int(token) for token in tokenizer.encode(text)]
    except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
        raise ConfigError(f"{what}: not a text ({error})") from None

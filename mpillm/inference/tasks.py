"""What a batch is made for: lines become requests, results become lines again. Local."""

import math
from dataclasses import dataclass

from mpillm.data.tokenizers import new_document
from mpillm.errors import ConfigError
from mpillm.inference.chat import Chat
from mpillm.inference.lines import CHOICES, generation_line, name_of, score_line
from mpillm.inference.requests import Request, Sampling, seed_of


@dataclass(frozen=True)
class Asked:
    """What a line asks for.

    Attributes
    ----------
    id : str or int
    requests : list of Request
    dropped : int
        Tokens of its context that do not fit into the model, the first ones.
    """

    id: object
    requests: list
    dropped: int = 0

    @property
    def cost(self):
        """Tokens to compute at most."""
        return sum(len(request.prompt) + request.max_tokens for request in self.requests)


class Generation:
    """Continues prompts.

    Parameters
    ----------
    engine : Engine
    max_tokens, temperature, seed : int, float, int
        For lines that say nothing of them. The seed of a line follows from this one and the line's name.
    """

    def __init__(self, engine, max_tokens, temperature, seed):
        self._tokenizer, self._chat, self._seed = engine.tokenizer, Chat(engine.tokenizer), seed
        self._max_tokens, self._temperature = max_tokens, temperature
        self.settings = {"command": "generate", "tokens": max_tokens, "temperature": temperature, "seed": seed}

    def ask(self, values, number):
        """Return what the object of line ``number`` asks for; raise :class:`ConfigError` if it cannot be."""
        line, name = generation_line(values), name_of(values, number)
        prompt = tuple(self._prompt(line))
        chosen = {key: value for key in CHOICES if (value := getattr(line, key)) is not None}
        requests = []
        for choice in range(line.n or 1):
            if line.seed is None:
                seed = seed_of(self._seed, name, choice)
            else:  # the same whatever the line is called
                seed = line.seed if choice == 0 else seed_of(line.seed, "", choice)
            sampling = Sampling(**{"temperature": self._temperature, **chosen, "seed": seed})
            limit = self._max_tokens if line.max_tokens is None else line.max_tokens
            requests.append(Request(str(name), prompt, limit, sampling, line.stops))
        return Asked(name, requests)

    def answer(self, asked, results):
        """Return the object of the line that tells what came of it."""
        choices = [self._choice(*pair) for pair in zip(asked.requests, results)]
        return {"id": asked.id, **(choices[0] if len(choices) == 1 else {"choices": choices})}

    def tokens(self, results):
        """Return how many tokens were computed that somebody asked for."""
        return sum(len(result.tokens) for result in results)

    def _prompt(self, line):
        if line.tokens is not None:
            return line.tokens
        if line.messages is not None:
            return self._chat.encode(line.messages)
        return encode(self._tokenizer, line.prompt, "prompt") or new_document(self._tokenizer)

    def _choice(self, request, result):
        found = {"text": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason}
        if request.sampling.logprobs is not None:
            found["logprobs"] = result.logprobs
        if request.sampling.logprobs:
            found["top_logprobs"] = result.top_logprobs
        return found


class Scoring:
    """Says how likely texts are, in windows and with the tokens that ``lm-eval`` takes.

    Parameters
    ----------
    engine : Engine
    """

    settings = {"command": "score"}

    def __init__(self, engine):
        self._tokenizer, self._longest = engine.tokenizer, engine.config.model.max_seq_len

    def ask(self, values, number):
        """Return what the object of line ``number`` asks for; raise :class:`ConfigError` if it cannot be."""
        line, name = score_line(values), name_of(values, number)
        if line.text is None:
            context, continuation = self._pair(line.context, line.continuation)
            if not continuation or len(continuation) > self._longest:
                raise ConfigError(f"continuation has {len(continuation)} tokens: needs one at least, and no more than "
                                  f"model.max_seq_len = {self._longest}")
            dropped = max(0, len(context) + len(continuation) - self._longest - 1)
            rows = [(context[dropped:] + continuation, len(context) - dropped)]
        else:
            dropped, rows = 0, self._windows(encode(self._tokenizer, line.text, "text")[len(self._tokenizer.starts):])
        return Asked(name, [Request(str(name), tuple(row), 0, scored_from=start) for row, start in rows], dropped)

    def answer(self, asked, results):
        """Return the object of the line that tells what came of it."""
        scores = [score for result in results for score in result.scores]
        found = {"id": asked.id, "logprob": math.fsum(scores), "num_tokens": len(scores),
                 "is_greedy": all(result.is_greedy for result in results)}
        return {**found, "dropped": asked.dropped} if asked.dropped else found

    def tokens(self, results):
        """Return how many tokens were computed that somebody asked for."""
        return sum(len(result.scores) for result in results)

    def _pair(self, context, continuation):
        """Return the tokens of both: those of the whole, cut behind as many as the context has by itself."""
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


def encode(tokenizer, text, what):
    """Return the tokens of a text."""
    try:
        return [int(token) for token in tokenizer.encode(text)]
    except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
        raise ConfigError(f"{what}: not a text ({error})") from None

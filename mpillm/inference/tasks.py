"""What a batch is made for: lines become requests, results become lines again. Local."""

from dataclasses import asdict, dataclass

from mpillm.data.tokenizers import new_document
from mpillm.inference.chat import Chat
from mpillm.inference.lines import CHOICES, generation_line, name_of, score_line
from mpillm.inference.requests import Request, Sampling, seed_of
from mpillm.inference.scoring import Scored, encode, score_of


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
        self._scored = Scored(engine.tokenizer, engine.config.model.max_seq_len)

    def ask(self, values, number):
        """Return what the object of line ``number`` asks for; raise :class:`ConfigError` if it cannot be."""
        line, name = score_line(values), name_of(values, number)
        what = (line.context, line.continuation) if line.text is None else line.text
        return Asked(name, *self._scored.ask(what, str(name)))

    def answer(self, asked, results):
        """Return the object of the line that tells what came of it."""
        found = {"id": asked.id, **asdict(score_of(results, asked.dropped))}
        if not asked.dropped:
            del found["dropped"]
        return found

    def tokens(self, results):
        """Return how many tokens were computed that somebody asked for."""
        return sum(len(result.scores) for result in results)

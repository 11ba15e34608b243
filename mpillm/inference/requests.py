"""What is asked of the engine, and what comes back. Pure."""

import hashlib
import math
from dataclasses import dataclass, field

from mpillm.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from what the model says.

    Parameters
    ----------
    temperature : float
        Divides the logits; 0 always takes the likeliest token.
    top_k : int
        Choose among so many of the likeliest; 0: among all.
    top_p : float
        Choose among the fewest of the likeliest that together have this probability.
    min_p : float
        Choose among those with at least this share of the likeliest one's probability.
    repetition_penalty : float
        Divides the logits, if they are positive, of tokens that are there already, and multiplies them if not.
    seed : int
        Of the random numbers: with it, and a position, the number is given.
    logprobs : int, optional
        Report the log-probability of the chosen token and of so many of the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self):
        for name, is_allowed, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top_k", 0 <= self.top_k, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0 and finite"),
            ("seed", 0 <= self.seed < 1 << 128, "at least 0 and less than 2^128"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not is_allowed:
                raise ConfigError(f"{name} {getattr(self, name)}: must be {allowed}")


@dataclass(frozen=True)
class Request:
    """A row of tokens to continue.

    Parameters
    ----------
    id : str
    prompt : sequence of int
    max_tokens : int
        Tokens to add at most.
    sampling : Sampling
    stop : tuple of str
        The text ends before any of these.
    ignore_ends : bool
        Go on behind the tokens that end a text.
    scored_from : int, optional
        Position in the prompt, at least 1, of the first token whose log-probability is asked for.
    alternatives : tuple of int
        Of a prompt that is only scored: tokens that are scored in the place of its last one as well.
    """

    id: str
    prompt: tuple
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple = ()
    ignore_ends: bool = False
    scored_from: int | None = None
    alternatives: tuple = ()

    def __post_init__(self):
        object.__setattr__(self, "prompt", tuple(int(token) for token in self.prompt))
        for name, least in (("scored_from", 1), ("max_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} {value}: must be at least {least}")
        object.__setattr__(self, "alternatives", tuple(int(token) for token in self.alternatives))
        if self.alternatives and (self.max_tokens or not (self.scored_from or len(self.prompt)) < len(self.prompt)):
            raise ConfigError("alternatives: the prompt's last token must be scored, and max_tokens be 0")


@dataclass
class Result:
    """What became of a request.

    Attributes
    ----------
    id : str
    tokens : list of int
        Those that were added, without the one that ended the text.
    text : str
    finish_reason : {"stop", "length", "cancelled"}
    logprobs : list of float
        Of ``tokens``, if asked for.
    top_logprobs : list of list of (int, float)
        The likeliest tokens in the place of each.
    scores : list of float
        Log-probabilities of the prompt's tokens from ``scored_from`` on.
    is_greedy : bool
        Whether each of these was the likeliest.
    alternatives : list of (float, bool)
        The same of each of the request's alternatives.
    """

    id: str
    tokens: list = field(default_factory=list)
    text: str | None = None
    finish_reason: str = "length"
    logprobs: list = field(default_factory=list)
    top_logprobs: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    is_greedy: bool = True
    alternatives: list = field(default_factory=list)


def seed_of(seed, name, choice=0):
    """Return the seed of a request that brings none of its own: it follows from the job's and the request's name."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {choice} {name}".encode(), digest_size=16).digest(), "little")

"""Lines of batch files: what may be asked for in one, and as what. Pure."""

import json
from typing import Annotated, Any, Literal

from pydantic import Strict

from mpillm.errors import ConfigError
from mpillm.plain import Count, FractionOfOne, Positive, PositiveReal, Real, Seed, checked, config_section

Text = Annotated[str, Strict()]
Name = Text | Annotated[int, Strict()]
Tokens = list[Count]
Messages = list[dict[str, Any]]
CHOICES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logprobs")  # of a line and of Sampling alike
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


@config_section
class GenerationLine:
    """A prompt in one of three forms; what is left out the command line says. ``metadata`` may be anything, and is not read."""

    id: Name | None = None
    prompt: Text | None = None
    tokens: Tokens | None = None
    messages: Messages | None = None
    max_tokens: Count | None = None
    temperature: Real | None = None
    top_k: Count | None = None
    top_p: FractionOfOne | None = None
    min_p: Real | None = None
    repetition_penalty: PositiveReal | None = None
    stop: Text | list[Text] | None = None
    seed: Seed | None = None
    logprobs: Count | None = None
    n: Positive | None = None
    metadata: Any = None

    def __post_init__(self):
        _exactly_one(prompt=self.prompt, tokens=self.tokens, messages=self.messages)
        if "" in self.stops:
            raise ValueError("stop: an empty text would stop at once")

    @property
    def stops(self):
        """The texts that end the generated one."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@config_section
class ScoreLine:
    """A continuation in its context, or a text by itself."""

    id: Name | None = None
    context: Text | None = None
    continuation: Text | None = None
    text: Text | None = None
    metadata: Any = None

    def __post_init__(self):
        _exactly_one(continuation=self.continuation, text=self.text)
        if (self.context is None) != (self.continuation is None):
            raise ValueError("context and continuation: give both, or a text")


@config_section
class OpenAIBody:
    """The body of a request to OpenAI's endpoints; what would change the answer and is not here is refused."""

    model: Any = None
    prompt: Text | Tokens | None = None
    messages: Messages | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Real | None = None
    top_k: Count | None = None
    top_p: FractionOfOne | None = None
    min_p: Real | None = None
    repetition_penalty: PositiveReal | None = None
    stop: Text | list[Text] | None = None
    seed: Seed | None = None
    logprobs: bool | Count | None = None
    top_logprobs: Count | None = None
    n: Positive | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    stream: Literal[False] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None

    def values(self):
        """Return what the same asks for as a :class:`GenerationLine`."""
        same = ("messages", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "n")
        found = {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.prompt is not None:
            found["prompt" if isinstance(self.prompt, str) else "tokens"] = self.prompt
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is not None:
            found["max_tokens"] = limit
        if self.logprobs is not None and self.logprobs is not False:  # a number for completions, a yes or no for chats
            found["logprobs"] = (self.top_logprobs or 0) if self.logprobs is True else self.logprobs
        return found


@config_section
class OpenAILine:
    """A line of OpenAI's batch files."""

    custom_id: Name
    body: dict[str, Any]
    method: Literal["POST"] = "POST"
    url: Literal[ENDPOINTS] | None = None


def _exactly_one(**values):
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(values)}" + f", not {' and '.join(given)}" * bool(given))


def read_object(data):
    """Return the object that a line holds.

    Raises
    ------
    ConfigError
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError("not a JSON object: a line is one, as in {\"prompt\": \"...\"}")
    return values


def name_of(values, number):
    """Return the name of a line, though it be wrong otherwise: by default its number."""
    found = (values.get("id"), values.get("custom_id"))
    return next((name for name in found if isinstance(name, (str, int)) and not isinstance(name, bool)), number)


def generation_line(values):
    """Return the :class:`GenerationLine` that a line's object is, also one of OpenAI's batch form.

    Raises
    ------
    ConfigError
    """
    if "custom_id" in values or "body" in values:
        line = checked(OpenAILine, values, "")
        values = {"id": line.custom_id, **checked(OpenAIBody, line.body, "body").values()}
    return checked(GenerationLine, values, "")


def score_line(values):
    """Return the :class:`ScoreLine` that a line's object is.

    Raises
    ------
    ConfigError
    """
    return checked(ScoreLine, values, "")

"""Requests and answers in the shapes of OpenAI's completions and chats. Local.

Keys that are not known are left aside, as clients send many.
"""

import secrets
import time
from dataclasses import dataclass, fields, replace
from typing import Any

from mpillm.errors import ConfigError
from mpillm.inference.lines import OpenAIBody
from mpillm.plain import checked, config_section

COMPLETION, CHAT = "text_completion", "chat.completion"
MOST_LOGPROBS = 20
KNOWN = {field.name for field in fields(OpenAIBody)} - {"prompt", "stream"}


@config_section
class StreamOptions:
    """How a stream is to end."""

    include_usage: bool = False


@config_section
class Shape:
    """What a body says of the form of its answer."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None


@dataclass(frozen=True)
class Wanted:
    """What a body asks for: requests, each a choice; how many tokens its prompts have; the form of the answer."""

    kind: str
    requests: list
    prompt_tokens: int
    streams: bool
    includes_usage: bool
    echo: bool


def wanted(kind, body, task, most):
    """Return what a body asks for.

    Parameters
    ----------
    kind : {COMPLETION, CHAT}
    body : dict
    task : mpillm.inference.tasks.Generation
    most : int
        Answers that one body may ask for.

    Raises
    ------
    ConfigError
    """
    if not isinstance(body, dict):
        raise ConfigError("the body is no JSON object")
    options = body.get("stream_options")
    shape = checked(Shape, {
        **{key: body[key] for key in ("stream", "echo", "ignore_eos") if key in body},
        **({"stream_options": {"include_usage": bool(options.get("include_usage"))}} if isinstance(options, dict) else {})}, "")
    asked = {key: value for key, value in body.items() if key in KNOWN and value is not None}
    asked.setdefault("seed", secrets.randbits(63))
    if kind == CHAT:
        prompts = [{}]
        if "messages" not in asked:
            raise ConfigError("messages: a chat needs some")
    else:
        asked.pop("messages", None)
        prompts = [{"prompt": prompt} for prompt in _prompts(body.get("prompt"))]
    if shape.echo and asked.get("logprobs") is not None:
        raise ConfigError("echo with logprobs: not both: `mpillm score` gives the log-probabilities of texts")
    first = checked(OpenAIBody, {**asked, **prompts[0]}, "")
    if len(prompts) * (first.n or 1) > most:
        raise ConfigError(f"{len(prompts)} prompts, n = {first.n or 1}: no more than {most} answers may be asked for at once")
    if max(first.logprobs or 0, first.top_logprobs or 0) > MOST_LOGPROBS:
        raise ConfigError(f"logprobs, top_logprobs: at most {MOST_LOGPROBS}")
    requests, prompt_tokens = [], 0
    for prompt in prompts:
        values = checked(OpenAIBody, {**asked, **prompt}, "").values()
        choices = task.ask(values, 0).requests
        requests += [replace(choice, ignore_ends=bool(shape.ignore_eos)) for choice in choices]
        prompt_tokens += len(choices[0].prompt)
    includes_usage = shape.stream_options is not None and shape.stream_options.include_usage
    return Wanted(kind, requests, prompt_tokens, bool(shape.stream), includes_usage, bool(shape.echo))


def _prompts(prompt):
    """Return the prompts of a completion: one, or a list of them, as texts or as tokens."""
    if prompt is None:
        return [""]
    is_list = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    return prompt if is_list else [prompt]


class Answers:
    """What is sent back for a body.

    Parameters
    ----------
    wanted : Wanted
    model : str
        As it is called.
    tokenizer : tokenizer
    """

    def __init__(self, wanted, model, tokenizer):
        self.wanted, self._tokenizer = wanted, tokenizer
        prefix = "chatcmpl" if wanted.kind == CHAT else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, results):
        """Return the answer of all results."""
        return {**self._head, "object": self.wanted.kind, "choices": [self._choice(*each) for each in enumerate(results)],
                "usage": self._usage(results)}

    def piece(self, index, text, is_first=False, result=None):
        """Return a piece of a stream, the last one of a choice with its result."""
        reason = None if result is None else _reason(result)
        if self.wanted.kind == CHAT:
            delta = {**({"role": "assistant"} if is_first else {}), **({"content": text} if text or is_first else {})}
            choice = {"index": index, "delta": delta, "logprobs": self._logprobs(result), "finish_reason": reason}
        else:
            before = self.text_of(self.wanted.requests[index].prompt) if is_first and self.wanted.echo else ""
            choice = {"index": index, "text": before + text, "logprobs": self._logprobs(result), "finish_reason": reason}
        return {**self._head, "object": f"{CHAT}.chunk" if self.wanted.kind == CHAT else COMPLETION, "choices": [choice]}

    def last(self, results):
        """Return what ends a stream that says how much was used."""
        return {**self.piece(0, ""), "choices": [], "usage": self._usage(results)}

    def text_of(self, tokens):
        """Return the text of tokens."""
        return self._tokenizer.decode(list(tokens)).decode(errors="replace")

    def _choice(self, index, result):
        common = {"index": index, "logprobs": self._logprobs(result), "finish_reason": _reason(result)}
        if self.wanted.kind == CHAT:
            return {**common, "message": {"role": "assistant", "content": result.text}}
        before = self.text_of(self.wanted.requests[index].prompt) if self.wanted.echo else ""
        return {**common, "text": before + result.text}

    def _usage(self, results):
        prompt, new = self.wanted.prompt_tokens, sum(len(result.tokens) for result in results)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _logprobs(self, result) -> Any:
        """Return the log-probabilities of a whole choice, or None."""
        if result is None or not result.logprobs:
            return None
        words = [self.text_of([token]) for token in result.tokens]
        tops = [[(self.text_of([token]), value) for token, value in each] for each in result.top_logprobs]
        if self.wanted.kind == CHAT:
            return {"content": [
                {"token": word, "logprob": value, "bytes": [*word.encode()],
                 "top_logprobs": [{"token": other, "logprob": of, "bytes": [*other.encode()]} for other, of in top]}
                for word, value, top in zip(words, result.logprobs, tops)]}
        offsets = [sum(map(len, words[:i])) for i in range(len(words))]
        return {"tokens": words, "token_logprobs": result.logprobs, "top_logprobs": [dict(top) for top in tops],
                "text_offset": offsets}


def _reason(result):
    return "length" if result.finish_reason == "cancelled" else result.finish_reason

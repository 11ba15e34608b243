"""Chats as prompts: the template of a tokenizer, rendered as ``transformers`` does, with what its special tokens stand for."""

import json
from functools import cached_property

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpillm.data.settings import TOKENIZER_CONFIG
from mpillm.data.tokenizers import tokenizers_library
from mpillm.errors import ConfigError

TEMPLATE = "chat_template.jinja"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Generated(Extension):
    """What training marks as said by the model, which changes nothing here."""

    tags = {"generation"}

    def parse(self, parser):
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Chat:
    """The chat template of a tokenizer. Local.

    A template is not told the time: equal messages are equal prompts on every day.

    Parameters
    ----------
    tokenizer : tokenizer
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, messages):
        """Return the tokens of messages and of what begins the answer.

        Raises
        ------
        ConfigError
            If there is no template, or it does not take these messages.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ConfigError("messages: each needs a role and a content, both texts")
        try:
            text = self._template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                         **self._names)
        except jinja2.TemplateError as error:
            raise ConfigError(f"messages: the chat template refuses them ({error})") from None
        return self._library.encode(text, add_special_tokens=False).ids

    @cached_property
    def _template(self):
        files = self._tokenizer.settings.files if self._tokenizer.settings else {}
        text = files.get(TEMPLATE, files.get(TOKENIZER_CONFIG, {}).get("chat_template"))
        if isinstance(text, list):  # several by name
            text = next((each["template"] for each in text if each["name"] == "default"), None)
        if text is None:
            raise ConfigError("messages: the tokenizer has no chat template: give a prompt or tokens")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generated, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ConfigError(f"messages: the chat template is wrong ({error})") from None

    @cached_property
    def _names(self):
        found = {name: self._tokenizer.settings.name(name) for name in NAMES}
        return {name: token for name, token in found.items() if token is not None}

    @cached_property
    def _library(self):
        """The same tokenizer, but that special tokens in a text are what they are: the template writes them."""
        library = tokenizers_library().Tokenizer.from_str(self._tokenizer.to_json())
        library.encode_special_tokens = False
        return library


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys,
                      allow_nan=False)


def _refuse(message):
    raise jinja2.TemplateError(message)

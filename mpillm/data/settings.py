"""What stands beside a tokenizer: which tokens begin and end a text, how a chat is laid out.

A Hugging Face folder says it in several files. mpillm keeps what they say as one JSON object, the names of the files
with what each holds, in a token file and in a run directory, so that nothing is lost on the way back.
"""

import json
import re
from dataclasses import dataclass, field

from mpillm.errors import DataError
from mpillm.files import to_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_settings.json"
TOKENIZER_CONFIG, GENERATION_CONFIG, MODEL_CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
# Kept whole; of the model's own configuration only the tokens.
_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, "special_tokens_map.json", "chat_template.jinja")
_MODEL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Ends of documents by name, where nothing says which token it is. Special tokens are also known in other spellings,
# such as <｜end▁of▁sentence｜>.
_KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_SPELLED_ENDS = {"endoftext", "endofdocument", "endofsentence", "endofsequence", "eos", "eod"}


@dataclass(frozen=True)
class Settings:
    """What the files beside a tokenizer say.

    Parameters
    ----------
    files : dict
        Names of files of a Hugging Face folder, with the object of a JSON file and the text of another.
    vocab_size : int, optional
        Of the model beside the tokenizer.
    """

    files: dict = field(default_factory=dict)
    vocab_size: int | None = None

    @classmethod
    def from_json(cls, text):
        """Read what :meth:`to_json` wrote."""
        return cls(json.loads(text))

    @classmethod
    def beside(cls, tokenizer):
        """Return what stands beside a file ``tokenizer.json``: of a run directory, or of a Hugging Face folder.

        A file of another name stands for itself. ``None`` for a run from before settings were kept.
        """
        folder = tokenizer.parent
        if tokenizer.name != TOKENIZER:
            return cls()
        if (folder / SETTINGS).is_file():
            return cls(read_json(folder / SETTINGS))
        return None if (folder / "config.toml").is_file() else cls.of_folder(folder)

    @classmethod
    def of_folder(cls, folder):
        """Gather what the files of a Hugging Face folder say."""
        paths = [folder / name for name in _FILES if (folder / name).is_file()]
        files = {path.name: read_json(path) if path.suffix == ".json" else read_text(path) for path in paths}
        model = read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}
        tokens = {key: model[key] for key in _MODEL_KEYS if model.get(key) is not None}
        return cls(files | ({MODEL_CONFIG: tokens} if tokens else {}), model.get("vocab_size"))

    def to_json(self):
        """Return the settings as the text of a JSON file."""
        return to_json(self.files, indent=1) + "\n"

    def name(self, key):
        """Return the text of a token such as ``eos_token``, or None."""
        for file in (TOKENIZER_CONFIG, "special_tokens_map.json"):
            token = self.files.get(file, {}).get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
        return None

    def token(self, key, library):
        """Return the number of a token such as ``eos_token``, or None."""
        name = self.name(key)
        return None if name is None else library.token_to_id(name)

    def ends(self, library):
        """Return the tokens that end a text, the end of a document first; by their names where nothing says them.

        ``generate`` of ``transformers`` goes by the numbers, which may be several: of a turn, of a message, of a
        document. A document ends with the one that bears the name for it, else with the tokenizer's ``eos_token``.
        """
        said = [self.token("eos_token", library)]
        for file in (GENERATION_CONFIG, MODEL_CONFIG):
            tokens = self.files.get(file, {}).get("eos_token_id")
            said += tokens if isinstance(tokens, list) else [tokens]
        said = list(dict.fromkeys(token for token in said if _is_token(library, token)))
        said.sort(key=lambda token: library.id_to_token(token) not in _KNOWN_ENDS)
        return said or _ends_by_name(library)

    def starts(self, library):
        """Return the tokens that stand before a text, as ``transformers`` would put them there."""
        starts, _ = _around(library)
        if starts:
            return starts
        token = self.token("bos_token", library)
        adds = self.files.get(TOKENIZER_CONFIG, {}).get("add_bos_token") is True
        return [token] if adds and token is not None else []


def read_json(path):
    """Return the object in a JSON file."""
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object")
    return values


def read_text(path):
    """Return the text in a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error


def _is_token(library, token):
    return type(token) is int and token >= 0 and library.id_to_token(token) is not None


def _ends_by_name(library):
    """Return what a tokenizer by itself puts after a text, else the first token with a name for an end."""
    special = {token.content: number for number, token in library.get_added_tokens_decoder().items() if token.special}
    _, known = _around(library)
    known += [special[name] for name in _KNOWN_ENDS if name in special]
    known += [number for name, number in special.items() if re.sub(r"[\W_]", "", name).lower() in _SPELLED_ENDS]
    known += [library.token_to_id(name) for name in _KNOWN_ENDS if library.token_to_id(name) is not None]
    return known[:1]


def _around(library):
    """Return the tokens that a tokenizer by itself puts before a text, and those that it puts after."""
    encoding = None if library.post_processor is None else library.encode("a")
    if encoding is None or 0 not in encoding.special_tokens_mask:
        return [], []
    first, last = encoding.special_tokens_mask.index(0), encoding.special_tokens_mask[::-1].index(0)
    return encoding.ids[:first], encoding.ids[len(encoding.ids) - last:]

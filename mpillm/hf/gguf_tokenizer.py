"""The tokenizer in the metadata of a GGUF file, as the ``tokenizers`` library has it, and what stands beside such a one.

A file names the way that texts are cut into words (``tokenizer.ggml.pre``). What is not known here is refused: a wrong cut
gives other tokens, and nobody sees it.
"""

from fnmatch import fnmatchcase

from mpillm.data.settings import GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG, Settings
from mpillm.data.tokenizers import tokenizers_library
from mpillm.errors import ConfigError, DataError
from mpillm.files import to_json

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens
OF_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# tokenizer.ggml.pre: whether digits stand alone, the pattern of words (None: that of GPT-2), and whether a word that is a token
# is taken whole. Whether a text begins with a token, where the file does not say it, is the last.
CUTS = {
    "gpt-2": (False, None, False, False),
    **dict.fromkeys(("smollm", "starcoder", "refact"), (True, None, False, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (False, OF_LLAMA3, True, True)),
}
SPECIAL = {"bos_token": "ggml.bos_token_id", "eos_token": "ggml.eos_token_id", "unk_token": "ggml.unknown_token_id",
           "pad_token": "ggml.padding_token_id"}
ENDS = ("ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id")
# Keys without which no tokens are others, or that are read here; of some only a value.
KNOWN = ("ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.token_type_count", "ggml.merges",
         "ggml.*_token_id", "ggml.*_token_ids", "ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix",
         "ggml.add_sep_token", "ggml.remove_extra_whitespaces", "chat_template", "chat_template.*", "chat_templates")


def read_tokenizer(said, model, path):
    """Return the text of a file ``tokenizer.json`` and its settings; ``None`` for the text where a file has no tokenizer.

    Local.

    Parameters
    ----------
    said : dict
        Of the metadata what begins with ``tokenizer.``, without that.
    model : mpillm.model.description.Model
        That the tokens are for.
    path : Path
        Of the file.

    Raises
    ------
    ConfigError
        If the tokenizer is of a kind that is not known, or the tokenizers package is missing.
    DataError
        If it makes no sense.
    """
    kind = said.get("ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None, Settings()
    if kind not in [*KINDS]:
        raise _refused(path, "ggml.model", kind, f"mpillm knows {', '.join(KINDS)}")
    for key, value in said.items():
        if not any(fnmatchcase(key, name) for name in KNOWN):
            raise _refused(path, key, value, "mpillm does not know what this changes")
    tokenizers = tokenizers_library()
    try:
        library, has_bos = KINDS[kind](tokenizers, said, path)
        special = [tokenizers.AddedToken(said["ggml.tokens"][token], special=kind != USER_DEFINED, normalized=False)
                   for token, kind in enumerate(said.get("ggml.token_type", ())) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
        library.add_tokens(special)
        names = {name: said["ggml.tokens"][said[key]] for name, key in SPECIAL.items() if key in said}
        _surround(tokenizers, library, said, has_bos, names)
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{path}: its metadata hold no tokenizer that mpillm can read ({error!r})") from error
    return library.to_str(), _settings(said, names, model)


def _byte_level(tokenizers, said, path):
    """Return a byte-level byte-pair encoding, and whether a text begins with a token by default."""
    cut = said.get("ggml.pre")
    if cut not in [*CUTS]:
        raise _refused(path, "ggml.pre", cut, f"mpillm knows the cuts of {', '.join(CUTS)}")
    if said.get("ggml.add_space_prefix"):
        raise _refused(path, "ggml.add_space_prefix", True, "mpillm knows none in byte-level encodings")
    has_single_digits, pattern, takes_whole_words, has_bos = CUTS[cut]
    cuts = tokenizers.pre_tokenizers
    steps = [cuts.Digits(individual_digits=True)] if has_single_digits else []
    steps += [cuts.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    library = tokenizers.Tokenizer(tokenizers.models.BPE(
        _vocabulary(said), [tuple(merge.split(" ")) for merge in said["ggml.merges"]], ignore_merges=takes_whole_words))
    library.pre_tokenizer = cuts.Sequence([*steps, cuts.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])
    library.decoder = tokenizers.decoders.ByteLevel()
    return library, has_bos


def _sentence_pieces(tokenizers, said, path):
    """Return an encoding of SentencePiece, whose merges are those of neighbours into tokens, the best score first."""
    if said.get("ggml.remove_extra_whitespaces"):
        raise _refused(path, "ggml.remove_extra_whitespaces", True, "mpillm keeps all spaces")
    vocabulary, tokens = _vocabulary(said), said["ggml.tokens"]
    unknown = tokens[said.get("ggml.unknown_token_id", 0)]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocabulary, _merges(vocabulary, said["ggml.scores"]), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = said.get("ggml.add_space_prefix", True)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    library.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return library, True


KINDS = {"gpt2": _byte_level, "llama": _sentence_pieces}  # tokenizer.ggml.model


def _vocabulary(said):
    return {token: number for number, token in enumerate(said["ggml.tokens"])}


def _merges(vocabulary, scores):
    """Return the pairs of tokens that are tokens together, by the score of these, then in the order of their parts."""
    found = []
    for token, number in vocabulary.items():
        parts = ((token[:place], token[place:]) for place in range(1, len(token)))
        found += [(-scores[number], number, vocabulary[left], vocabulary[right], left, right)
                  for left, right in parts if left in vocabulary and right in vocabulary]
    return [(left, right) for *_, left, right in sorted(found)]


def _surround(tokenizers, library, said, has_bos, names):
    """Let the tokenizer put tokens before and after a text, as the metadata say."""
    around = {"bos_token": said.get("ggml.add_bos_token", has_bos), "eos_token": said.get("ggml.add_eos_token", False)}
    used = [names[name] for name, is_put in around.items() if is_put and name in names]
    if used:
        before, after = (names[name] if is_put and name in names else "" for name, is_put in around.items())
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[(name, library.token_to_id(name)) for name in used])


def _settings(said, names, model):
    """Return what the files of a Hugging Face folder would say of special tokens and chats."""
    ends = [*dict.fromkeys(said[key] for key in ENDS if key in said)]
    ids = {"bos_token_id": said.get("ggml.bos_token_id"), "pad_token_id": said.get("ggml.padding_token_id"),
           "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    ids = {key: value for key, value in ids.items() if value is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": model.max_seq_len, **names}
    if "chat_template" in said:
        config["chat_template"] = said["chat_template"]
    said_of = {GENERATION_CONFIG: ids, MODEL_CONFIG: ids} if ids else {}
    return Settings({TOKENIZER_CONFIG: config, **said_of}, model.vocab_size)


def _refused(path, key, value, why):
    shown = to_json(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return ConfigError(f"{path}: tokenizer.{key} = {shown}: {why}: convert the model's Hugging Face folder")

"""What tokenizers bring along, and long texts in windows; ``transformers`` and the library are the oracles."""

import json
import random

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mpillm import hf
from mpillm.cli.data import command
from mpillm.data import windows
from mpillm.data.settings import SETTINGS, Settings
from mpillm.data.tokenizers import (
    ByteTokenizer,
    LibraryTokenizer,
    copy_tokenizer,
    load_tokenizer,
    new_document,
    train_bpe,
)
from mpillm.data.tokens import write_tokens
from mpillm.errors import ConfigError, DataError
from mpillm.hdf5 import writing
from mpillm.inference.engine import Engine
from mpillm.inference.requests import Request, Sampling

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
pre, norm = library.pre_tokenizers, library.normalizers

WORDS = "what one document says, another may say as well\n"
AWKWARD = ("\n\n  tabs\t \r\n naïve — ελληνικά 漢字漢字。 🙂\u200d🙂\x00\x85 \u00a0end <|endoftext|> </s> e\u0301\u0302 ﷺ "
           "123456789012345678 don't \"quoted text here\" ")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")


def trained(model, trainer, pre_tokenizer=None, normalizer=None, special=("<unk>", "<s>", "</s>"), size=500, **options):
    """Return a tokenizer of the library, trained on a little text."""
    tokenizer = library.Tokenizer(getattr(library.models, model)(**options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    unknown = {"unk_token": "<unk>"} if model == "Unigram" else {}
    texts = (WORDS * 9 + AWKWARD).splitlines() * 9
    tokenizer.train_from_iterator(texts, getattr(library.trainers, trainer)(
        vocab_size=size, special_tokens=list(special), show_progress=False, **unknown,
        **({"initial_alphabet": sorted(pre.ByteLevel.alphabet())} if "ByteLevel" in repr(pre_tokenizer) else {})))
    return tokenizer


def bpe(pre_tokenizer=None, normalizer=None, **options):
    return trained("BPE", "BpeTrainer", pre_tokenizer, normalizer, **options)


def unigram(scheme, split):
    tokenizer = trained("Unigram", "UnigramTrainer", pre.Metaspace(), norm.Sequence(
        [norm.NFKC(), norm.Replace(library.Regex(" {2,}"), " ")]), size=120)
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


def word_piece():
    tokenizer = trained("WordPiece", "WordPieceTrainer", pre.BertPreTokenizer(), norm.BertNormalizer(),
                        special=("[UNK]", "[CLS]", "[SEP]"), size=150, unk_token="[UNK]")
    tokenizer.post_processor = library.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def with_added():
    tokenizer = bpe(pre.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([library.AddedToken("  ", normalized=False), library.AddedToken("says", lstrip=True)])
    return tokenizer


def split(pattern):
    return pre.Sequence([pre.Split(library.Regex(pattern), "isolated"),
                         pre.ByteLevel(add_prefix_space=False, use_regex=False)])


KINDS = {
    "byte-level": lambda: bpe(pre.ByteLevel(add_prefix_space=False)),
    "prefix-space": lambda: bpe(pre.ByteLevel(add_prefix_space=True), norm.NFKC()),
    "groups-of-digits": lambda: bpe(split(LLAMA3)),
    "one-word": lambda: bpe(None, norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")]), unk_token="<unk>",
                            fuse_unk=True),
    "unigram-words": lambda: unigram("always", True),
    "unigram-one-word": lambda: unigram("first", False),
    "word-piece": word_piece,
    "added-tokens": with_added,
    "strip-and-lower": lambda: bpe(pre.ByteLevel(add_prefix_space=False), norm.Sequence(
        [norm.Strip(), norm.Lowercase()])),
    "counted-from-the-start": lambda: bpe(pre.Sequence([pre.FixedLength(7), pre.ByteLevel(use_regex=False)])),
    "quotes": lambda: bpe(split('"[^"]*"')),
}


def texts():
    """Return texts that are hard to cut, by name."""
    number = random.Random(0)
    mixed = [AWKWARD, WORDS, " " * 300, "a" * 500, "\n" * 5, "漢字" * 90, "🙂🎉" * 60,
             *("".join(number.choices(letters, k=500)) for letters in ("acgt", "0123456789"))]
    return {"mixed": "".join(number.choices(mixed, k=80)), "awkward": AWKWARD * 60, "one-letter": "a" * 9001,
            "spaces": f"x{' ' * 9000}y", "letters": "".join(number.choices("acgt", k=9000)), "emoji": "🙂🎉" * 1500,
            "digits": "".join(number.choices("0123456789", k=9000))}


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(windows, "_STEP_BYTES", 1500)
    monkeypatch.setattr(windows, "_OVERLAP_BYTES", 700)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 6000)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_windows_are_those_of_the_whole(kind, short_windows):
    tokenizer = LibraryTokenizer(KINDS[kind](), "file")
    for name, text in texts().items():
        whole = tokenizer._library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == whole, name
        assert len(list(windows._windows(text.encode()))) > 4


@pytest.mark.parametrize("kind", ["byte-level", "unigram-words", "counted-from-the-start"])
def test_documents_come_one_after_the_other(kind, short_windows):
    documents = ["", "a", *texts().values(), "", WORDS, WORDS * 100, "ü"]
    tokenizer = LibraryTokenizer(KINDS[kind](), "file")
    parts, rows = [], []
    for tokens, is_last in tokenizer.encode_documents(documents):
        parts.append(tokens)
        if is_last:
            rows.append(np.concatenate(parts).tolist())
            parts = []
    assert not parts and rows == [tokenizer._library.encode(text, add_special_tokens=False).ids for text in documents]


def test_memory_is_bounded_by_windows():
    """The library, which takes 180 bytes a byte, sees no more than a batch of windows at a time."""
    seen = []

    class Watched:
        def encode_batch(self, texts, **options):
            seen.append((max(map(len, texts)), sum(map(len, texts))))
            return inner.encode_batch(texts, **options)

    inner = KINDS["byte-level"]()
    document = (WORDS * 25000).encode()
    assert sum(len(tokens) for tokens, _ in windows.encode_in_windows(Watched(), [document])) > 100_000
    assert len(document) > 1_000_000 and len(seen) > 1
    longest, batches = map(max, zip(*seen))
    assert longest <= windows._STEP_BYTES + windows._OVERLAP_BYTES and batches <= windows._BATCH_BYTES + longest


def test_tokens_that_depend_on_what_stands_far_behind(monkeypatch, short_windows):
    """A window that grew must not change what was yielded of it."""
    found = list(windows._encoded(KINDS["byte-level"](), [(WORDS * 200).encode()]))
    found[1].first = 20
    windows._grown(KINDS["byte-level"](), found[1])
    found[1].ids[5] += 1
    with pytest.raises(DataError, match="shorter documents"):
        windows._grown(KINDS["byte-level"](), found[1])


def make_hf(folder, **changes):
    """Save a random model of Hugging Face's."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 64, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None, **changes,
    })).save_pretrained(folder)


def trained_run(folder, tokenizer):
    """Return a run whose tokens come from a token file of ``tokenizer``."""
    make_hf(folder / "weights", vocab_size=tokenizer.vocab_size)
    hf.from_hf(folder / "trained", folder / "weights")
    write_tokens(folder / "tokens.h5", [WORDS], [], tokenizer)
    copy_tokenizer(folder / "tokens.h5", folder / "trained")
    return folder / "trained"


def hf_folder(folder, special=("<s>", "</s>"), template=None, model=None, files=None, **named):
    """Write a folder of Hugging Face's with a tokenizer, and perhaps a random model; return it."""
    tokenizer = bpe(pre.ByteLevel(add_prefix_space=False), special=special, size=300)
    tokenizer.decoder = library.decoders.ByteLevel()
    if template:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in special])
    if model is not None:
        make_hf(folder, **model)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    for name, content in (files or {}).items():
        (folder / name).write_text(content if name.endswith("jinja") else json.dumps(content), encoding="utf-8")
    return folder


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<s>")  # tokens 0 to 4


@pytest.mark.parametrize("files,ends", [
    ({}, [0]),
    ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, [2]),
    ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "special": True}}}, [2]),
    ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, [2]),
    ({"generation_config.json": {"eos_token_id": 1}}, [1]),
    ({"generation_config.json": {"eos_token_id": [2, 1]}, "tokenizer_config.json": {"eos_token": "<s>"}}, [4, 2, 1]),
    ({"generation_config.json": {"eos_token_id": [2, 0]}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
     [0, 2]),
    ({"config.json": {"eos_token_id": 3, "vocab_size": 300}}, [3]),
    ({"generation_config.json": {"eos_token_id": [-1, 999, None, True, 2]}}, [2]),
    ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, [0]),
])
def test_ends_are_those_that_the_files_name(tmp_path, files, ends):
    """The end of a document is first: by its name where several are named."""
    hf_folder(tmp_path, SPECIAL)
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.ends == ends and tokenizer.end == ends[0] and tokenizer.vocab_size == 300


@pytest.mark.parametrize("special,template,end", [
    (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), None, "<｜end▁of▁sentence｜>"),
    (("<pad>", "[EOS]"), None, "[EOS]"), (("<s>", "<stop>"), "<s> $A <stop>", "<stop>"),
    (("<eos>", "</s>"), None, "</s>"),
])
def test_ends_of_a_tokenizer_that_comes_alone(tmp_path, special, template, end):
    hf_folder(tmp_path, special, template)
    (tmp_path / "tokenizer.json").rename(tmp_path / "alone.json")
    tokenizer = load_tokenizer(tmp_path / "alone.json")
    assert tokenizer.name(tokenizer.end) == end and tokenizer.vocab_size == 300


def test_no_end_and_no_room_for_one(tmp_path):
    """A pretrained model does not grow; one that has room, or that is not there yet, gets an end."""
    folder = hf_folder(tmp_path / "hf", ("<x>",), model={})
    run = tmp_path / "run"
    hf.from_hf(run, folder)
    full = load_tokenizer(folder)
    assert full.end is None and full.vocab_size == 300 and not full.ends
    with pytest.raises(ConfigError, match='names no token that ends a document.*300 tokens.*"eos_token" in'):
        write_tokens(tmp_path / "tokens.h5", ["text"], [], full)
    engine = Engine(run)
    assert len(continued(engine, "text", 3)) == 3
    with pytest.raises(ConfigError, match="give a prompt"):
        new_document(engine.tokenizer)
    engine.free()
    hf.to_hf(run, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token is None
    assert load_tokenizer(folder, 301).end == 300
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).vocab_size == 301
    (tmp_path / "text.txt").write_text(WORDS)
    words = [str(tmp_path / "text.txt"), "-o", str(tmp_path / "tokens.h5"), "--tokenizer", str(folder)]
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert "names no token that ends a document: <|endoftext|> is added as token 300" in result.output
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<x>"}')
    assert load_tokenizer(folder, 300).end == 0


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "<s> </s> $A", "$A </s>", "$A", None])
def test_texts_begin_as_the_tokenizer_begins_them(tmp_path, template):
    folder = hf_folder(tmp_path, template=template, bos_token="<s>", eos_token="</s>")
    tokenizer, text = load_tokenizer(folder), "what <s> says\n"
    wanted = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)(text).input_ids
    if template and template.endswith("</s>"):
        wanted = wanted[:-1]  # a prompt goes on
    assert tokenizer.encode(text).tolist() == wanted
    assert new_document(tokenizer) == (tokenizer.encode("").tolist() or [1])
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    write_tokens(tmp_path / "tokens.h5", [text, text * 3], [], tokenizer)
    (tmp_path / "run").mkdir()
    copy_tokenizer(tmp_path / "tokens.h5", tmp_path / "run")
    for source in (tmp_path / "tokens.h5", tmp_path / "run"):
        assert load_tokenizer(source).encode(text).tolist() == wanted
        assert load_tokenizer(source).settings.files == tokenizer.settings.files


def test_a_text_begins_with_bos_where_only_the_configuration_says_so(tmp_path):
    folder = hf_folder(tmp_path, files={"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True}})
    assert load_tokenizer(folder).encode("a")[0] == 0
    assert load_tokenizer(folder).encode("a").size == 2


def test_documents_of_training_begin_as_prompts_do(tmp_path):
    tokenizer = load_tokenizer(hf_folder(tmp_path, template="<s> $A", bos_token="<s>", eos_token="</s>"))
    write_tokens(tmp_path / "tokens.h5", [WORDS, "a"], [], tokenizer)
    with writing(tmp_path / "old.h5") as file:
        file["tokenizer"] = tokenizer.to_json()  # as before settings were kept: there documents had no <s>
    plain = load_tokenizer(tmp_path / "old.h5").encode(WORDS).tolist()
    with h5py.File(tmp_path / "tokens.h5") as file:
        assert file["train/tokens"][:].tolist() == [0, *plain, 1, 0, *tokenizer.encode("a")[1:], 1]
        assert file["train/documents"][:].tolist() == [0, len(plain) + 2]


def said(folder):
    """Return what ``transformers`` reads of tokens and chats in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sources = (transformers.AutoConfig.from_pretrained(folder), transformers.GenerationConfig.from_pretrained(folder))
    ids = [getattr(source, f"{name}_token_id") for source in sources for name in ("bos", "eos", "pad")]
    return [*ids, tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token,
            tokenizer.chat_template, tokenizer("what one").input_ids]


CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("config,files", [
    ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, {}),
    ({"bos_token_id": 1, "eos_token_id": 0}, {"generation_config.json": {"eos_token_id": [2, 0], "temperature": 0.6}}),
    ({"bos_token_id": 4, "eos_token_id": [2, 0], "pad_token_id": 3}, {}),
], ids=["plain", "generation", "list"])
def test_settings_survive_the_round_trip(tmp_path, config, files):
    folder = hf_folder(tmp_path / "hf", SPECIAL, "<|im_start|> $A", model=config, bos_token="<|im_start|>",
                       eos_token="<|im_end|>", pad_token="</s>", files={"chat_template.jinja": CHAT, **files})
    wanted = said(folder)
    assert CHAT in wanted
    hf.from_hf(tmp_path / "run", folder)
    hf.to_hf(tmp_path / "run", tmp_path / "back")
    assert said(tmp_path / "back") == wanted
    tuned = trained_run(tmp_path, load_tokenizer(folder / "tokenizer.json"))
    hf.to_hf(tuned, tmp_path / "out")
    assert said(tmp_path / "out") == wanted
    assert load_tokenizer(tuned).ends == load_tokenizer(folder).ends


def test_a_model_without_a_tokenizer_keeps_its_tokens(tmp_path):
    make_hf(tmp_path / "hf", bos_token_id=5, eos_token_id=[7, 8], pad_token_id=9)
    hf.from_hf(tmp_path / "run", tmp_path / "hf")
    hf.to_hf(tmp_path / "run", tmp_path / "back")
    for folder in ("hf", "back"):
        for kind in (transformers.AutoConfig, transformers.GenerationConfig):
            config = kind.from_pretrained(tmp_path / folder)
            assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, [7, 8], 9)


def test_a_trained_tokenizer_names_its_end(tmp_path):
    tokenizer = train_bpe([WORDS * 20], 300)
    hf.to_hf(trained_run(tmp_path, tokenizer), tmp_path / "out")
    end = tokenizer.end
    assert said(tmp_path / "out") == [end, end, None, end, end, None, "<|endoftext|>", "<|endoftext|>", None, None,
                                      None, tokenizer.encode("what one").tolist()]
    hf.from_hf(tmp_path / "again", tmp_path / "out")
    hf.to_hf(tmp_path / "again", tmp_path / "back")
    assert said(tmp_path / "back") == said(tmp_path / "out")
    assert load_tokenizer(tmp_path / "again").ends == [end]


def continued(engine, text, count):
    """Return the likeliest tokens behind a text."""
    request = Request("", engine.tokenizer.encode(text), count, Sampling(temperature=0))
    return engine.generate([request])[0].tokens


def test_generation_is_that_of_transformers(tmp_path):
    """Begin as the tokenizer does, stop at every end that is named, whatever its name."""
    folder = hf_folder(tmp_path / "hf", SPECIAL, "<s> $A", model={"bos_token_id": 4, "eos_token_id": 3},
                       bos_token="<s>", eos_token="</s>")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("what one", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1]:].tolist()
    end = plain[6]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end]}))
    hf.from_hf(tmp_path / "run", folder)
    for path in ("run", "hf"):
        engine = Engine(tmp_path / path)
        assert engine.tokenizer.encode("what one").tolist() == ids[0].tolist()
        assert continued(engine, "what one", 30) == plain[:plain.index(end)]
        assert set(engine.tokenizer.ends) == {3, end}
        engine.free()


def test_prompts_of_integers_of_any_kind(tmp_path):
    hf.from_hf(tmp_path / "run", hf_folder(tmp_path / "hf", model={}, bos_token="<s>", eos_token="</s>"))
    engine = Engine(tmp_path / "run")
    tokens = engine.tokenizer.encode("what one document")
    assert tokens.dtype == np.uint16
    for row in (tokens, tokens.astype(np.uint32), tokens.astype(np.int32), torch.tensor(tokens.tolist()), tuple(tokens)):
        assert Request("", row).prompt == tuple(tokens.tolist())
        assert engine.tokenizer.decode(row) == ByteTokenizer().decode(ByteTokenizer().encode("what one document"))
    engine.free()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_settings_are_named(tmp_path, content):
    folder = hf_folder(tmp_path)
    for name in ("generation_config.json", SETTINGS):
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}: not"):
            load_tokenizer(folder)
    assert Settings.beside(tmp_path / "words.json").files == {}


def test_settings_are_json(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": Infinity, "stop": "\\ud800"}')
    settings = Settings.from_json(Settings.of_folder(tmp_path).to_json().encode("utf-8"))
    assert settings.files == {"generation_config.json": {"top_p": "Infinity", "stop": "\ud800"}}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="chat_template.jinja: not UTF-8"):
        Settings.of_folder(tmp_path)

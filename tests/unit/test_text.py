"""Text to tokens and back, and the command that makes a token file."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from mpillm.cli.data import command
from mpillm.data import tokenizers
from mpillm.data.text import Documents
from mpillm.data.tokenizers import ByteTokenizer, copy_tokenizer, load_tokenizer, token_dtype, train_bpe
from mpillm.data.tokens import Split, write_tokens
from mpillm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "mpillm" / "schedules").glob("check*.py")))
AWKWARD = "\n\n  tabs\t \r\n naïve — ελληνικά 漢字 🙂\u200d\x00\x85 \u00a0end <|endoftext|> </s>\n"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([SOURCE, AWKWARD], 400)


@pytest.mark.parametrize("data", [b"", b"a", bytes(range(256)) * 3, AWKWARD.encode()])
def test_bytes_round_trip(data):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(data)
    assert tokens.tolist() == list(data)
    assert tokenizer.decode([*tokens, tokenizer.end, 300]) == data
    assert tokenizer.vocab_size == 257 and tokenizer.end == 256


@pytest.mark.parametrize("sample", ["", "x", SOURCE, AWKWARD, "never seen: ξ\U0010ffff"])
def test_bpe_round_trip(bpe, sample):
    tokens = bpe.encode(sample)
    assert bpe.end not in tokens
    assert bpe.decode([*tokens, bpe.end]) == sample.encode()
    assert bpe.encode(sample.encode()).tolist() == tokens.tolist()


def test_bpe_has_the_size_asked_for_and_shortens_text(bpe):
    tokens = bpe.encode(SOURCE)
    assert bpe.vocab_size == 400 and tokens.max() < 400
    assert len(tokens) < len(SOURCE) / 2
    assert train_bpe(["aaaa"], 5000).vocab_size < 300


def test_bpe_training_repeats_in_another_process(bpe, tmp_path):
    (tmp_path / "source.txt").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "awkward.txt").write_bytes(AWKWARD.encode())
    script = (
        "import sys\n"
        "from mpillm.data.text import Documents\nfrom mpillm.data.tokenizers import train_bpe\n"
        "print(train_bpe(Documents(tuple(sys.argv[1:])), 400).to_json())"
    )
    files = [str(tmp_path / "source.txt"), str(tmp_path / "awkward.txt")]
    again = subprocess.run([sys.executable, "-c", script, *files], cwd=ROOT, check=True, capture_output=True)
    assert json.loads(again.stdout) == json.loads(bpe.to_json())


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_pieces_of_long_text_give_the_tokens_of_the_whole(bpe, monkeypatch, size):
    whole = bpe.encode(SOURCE + AWKWARD * 5)
    monkeypatch.setattr(tokenizers, "_PIECE_CHARACTERS", size)
    pieces = list(tokenizers._pieces(SOURCE + AWKWARD * 5))
    assert len(list(tokenizers._pieces(SOURCE))) > 10
    assert np.concatenate([bpe.encode(piece) for piece in pieces]).tolist() == whole.tolist()


@pytest.mark.parametrize("vocab_size", [0, 256])
def test_bpe_too_small(vocab_size):
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(["text"], vocab_size)


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>", None])
def test_tokenizer_file_keeps_or_gets_an_end(tmp_path, end):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.enable_truncation(2)
    if end:
        library.add_special_tokens([end])
    library.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert tokenizer.encode("a b c b a").tolist() == [0, 1, 2, 1, 0]
    assert (tokenizer.end, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.decode([0, 1, 3]) == b"a b"


def test_token_dtype():
    assert token_dtype(1 << 16) == np.uint16 and token_dtype((1 << 16) + 1) == np.uint32


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_token_file(tmp_path, bpe, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    train, validation = [b"first", "zweites dökument", SOURCE], [AWKWARD.encode()]
    path = tmp_path / "tokens.h5"
    splits = write_tokens(path, train, validation, tokenizer)
    with h5py.File(path) as file:
        assert file.attrs["tokenizer"] == kind and file.attrs["vocab_size"] == tokenizer.vocab_size
        for name, documents, split in zip(("train", "validation"), (train, validation), splits):
            tokens, starts = file[name]["tokens"][:], file[name]["documents"][:]
            assert tokens.dtype == np.uint16 and starts.dtype == np.uint64
            assert file[name]["tokens"].id.get_offset() is not None  # can be memory-mapped
            raw = [d.encode() if isinstance(d, str) else d for d in documents]
            assert split == Split(len(raw), sum(map(len, raw)), len(tokens))
            assert file[name].attrs["bytes"] == sum(map(len, raw))
            assert tokens[starts[1:] - 1].tolist() == [tokenizer.end] * (len(raw) - 1)
            assert (tokens == tokenizer.end).sum() == len(raw) and tokens[-1] == tokenizer.end
            assert [tokenizer.decode(part) for part in np.split(tokens, starts[1:].astype(int))] == raw
    copy_tokenizer(path, tmp_path)
    for source in (path, tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(source).encode(SOURCE).tolist() == tokenizer.encode(SOURCE).tolist()


def test_large_vocabulary_takes_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, end = 70000, 69999

        def encode(self, text):
            return super().encode(text).astype(np.uint32) + 65536

    write_tokens(tmp_path / "wide.h5", [b"ab"], [], Wide())
    with h5py.File(tmp_path / "wide.h5") as file:
        assert file["train/tokens"].dtype == np.uint32
        assert file["train/tokens"][:].tolist() == [65536 + 97, 65536 + 98, 69999]
        assert file["validation/tokens"].shape == (0,) and file["validation"].attrs["bytes"] == 0


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "tokens.h5"
    path.write_text("old")

    def failing():
        yield b"some text"
        raise OSError("the disk is gone")

    with pytest.raises(DataError, match="cannot be written"):
        write_tokens(path, failing(), [], ByteTokenizer())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_documents_are_held_out_by_a_hash_of_their_text_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"text number {i}\n" for i in range(300)]
    for i, text in enumerate(texts):
        Path(f"{i}.txt").write_text(text)
        Path(f"{i}.gz").write_bytes(gzip.compress(text.encode()))
    Path("all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "\n")

    def place(text):
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256

    expected = [text.encode() for text in texts if place(text) < 0.2]
    assert 30 < len(expected) < 90
    for pattern in ("{}.txt", "./{}.txt", str(tmp_path / "{}.txt"), f"../{tmp_path.name}/{{}}.txt", "{}.gz"):
        names = tuple(pattern.format(i) for i in range(300))
        for utf8 in (True, False):
            assert list(Documents(names, high=0.2, utf8=utf8)) == expected
        assert len(list(Documents(names, low=0.2))) == 300 - len(expected)
    assert list(Documents(("all.jsonl",), high=0.2)) == expected


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"txt": "x"}', '{"text": 3}', '{"text": "\\ud800"}'])
def test_bad_json_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2"):
        list(Documents((str(path),)))


TEXTS = ["a", "naïve \u2028 line", "three\x0c\x85"]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS))
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".json", ".txt", ""])
def test_json_lines_are_known_by_content(tmp_path, suffix, encoding, packing):
    path = tmp_path / f"lines{suffix}{packing}"
    path.write_bytes(PACKED[packing](LINES.encode(encoding)))
    for utf8 in (True, False):
        assert list(Documents((str(path),), utf8=utf8)) == [text.encode() for text in TEXTS]


@pytest.mark.parametrize(("content", "is_unclear"), [
    ('{"name": "x", "version": 3}\n', False), ("{\n  not JSON\n}\n", False), ("[1, 2]\n", False), ("{}", False),
    ('[{"text": "a"}, {"text": "b"}]', True), ('{\n "text": "a"\n}', True), ('{"text": 3}\n{"text": 4}', True),
    ('{"body": "a"}\n{"body": "b"}\n', True), ('{"text": "a"}\nand so on', True), ("[" * 100_000, False),
])
def test_other_json_is_one_document_and_said_to_be_where_lines_may_be_meant(tmp_path, content, is_unclear):
    path = tmp_path / "data.json"
    path.write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(Documents((str(path),))) == [content.encode()]
    assert [str(warning.message).startswith(f"text file {path}: holds JSON") for warning in caught] == [True] * is_unclear


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_text_is_known_by_its_byte_order_mark(tmp_path, encoding):
    path, raw = tmp_path / "text.txt", "naïve 漢字\n".encode(encoding)
    path.write_bytes(raw)
    assert list(Documents((str(path),), utf8=False)) == [raw]
    if encoding == "utf-16-le":  # without a mark
        path.write_bytes("plain text\n".encode(encoding))
        with pytest.raises(DataError, match="looks like UTF-16"):
            list(Documents((str(path),)))
    else:
        assert list(Documents((str(path),))) == ["naïve 漢字\n".encode()]
        if encoding != "utf-8-sig":
            path.write_bytes(raw[:-1])
            with pytest.raises(DataError, match=f"is not {encoding.upper()}"):
                list(Documents((str(path),)))


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["text.txt", "lines.jsonl"])
def test_a_compressed_file_that_is_cut_off_or_damaged(tmp_path, name, packing):
    digits = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(3000)]
    lines = [json.dumps({"text": text}) for text in digits] if name == "lines.jsonl" else digits
    path = tmp_path / (name + packing)
    path.write_bytes(PACKED[packing]("\n".join(lines).encode()))
    assert len(list(Documents((str(path),)))) == (3000 if name == "lines.jsonl" else 1)
    raw = path.read_bytes()
    for damaged in (raw[:len(raw) // 2], raw[:4000] + bytes(20) + raw[4020:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{path.name}: (cannot be read|line [0-9]+ is no JSON)"):
            list(Documents((str(path),)))


@pytest.mark.parametrize(("content", "kind"), [
    (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"\x89HDF\r\n", "HDF5"), (b"PAR1", "Parquet"),
    (bytes(257) + b"ustar", "tar")])
def test_archives_are_no_text(tmp_path, content, kind):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=kind):
        list(Documents((str(path),)))
    with pytest.warns(UserWarning, match=kind):
        assert list(Documents((str(path),), utf8=False)) == [content]


@pytest.mark.parametrize("place", [0, 5, (1 << 20) - 1, (1 << 20) + 7])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, place):
    path = tmp_path / "text"
    raw = bytearray("é".encode() * (1 << 20))
    path.write_bytes(raw)
    assert list(Documents((str(path),))) == [raw]
    raw[place] = 0xFF
    path.write_bytes(raw)
    expected = re.search("position ([0-9]+)", str(pytest.raises(UnicodeDecodeError, raw.decode).value))[1]
    with pytest.raises(DataError, match=f"byte {expected} is not UTF-8"):
        list(Documents((str(path),)))


@pytest.mark.parametrize(("text", "share", "held_out"), [
    ("one\ntwo\nthree\nfour\n", 0.25, "four\n"), ("one\ntwo\nthree\nfour\n", 0.4, "three\nfour\n"),
    ("some words without an end of line", 0.3, "end of line"), ("é" * 10, 0.25, "é" * 3), ("x" * 10, 0.01, ""),
    ("x" * 10, 0.99, "x" * 10), ("head\n" + "x" * 95, 0.1, "x" * 10),
])
def test_documents_are_cut_near_the_place_asked_for(tmp_path, text, share, held_out):
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    parts = [b"".join(Documents((str(path),), are_cut=True, **what)) for what in ({"low": share}, {"high": share})]
    assert b"".join(parts) == text.encode() and parts[1].decode() == held_out


def test_other_encodings_need_the_byte_tokenizer(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: byte 2 is not UTF-8.*--tokenizer bytes"):
        list(Documents((str(path),)))
    assert list(Documents((str(path),), utf8=False)) == [b"na\xefve"]


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b'{"model": 3}', b"[]"])
def test_foreign_tokenizer_file(tmp_path, content):
    (tmp_path / "foreign.json").write_bytes(content)
    with pytest.raises(DataError, match="foreign.json"):
        load_tokenizer(tmp_path / "foreign.json")


def test_token_file_without_tokenizer(tmp_path):
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file["train/tokens"] = np.arange(9, dtype=np.uint16)
    copy_tokenizer(tmp_path / "numbers.h5", tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    with pytest.raises(DataError, match="holds none"):
        load_tokenizer(tmp_path / "numbers.h5")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a working directory with some text in it."""
    monkeypatch.chdir(tmp_path)
    for name, content in {"a.txt": "alpha beta " * 40, "b.txt": "gamma " * 50, "empty.txt": ""}.items():
        Path(name).write_text(content)
    Path("list").write_text("a.txt\n\nempty.txt\n")
    Path("none").write_text("\n")
    Path("foreign.json").write_text("{}")
    return tmp_path


def data(*arguments):
    """Run the command and return what it printed."""
    return CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False).output


@pytest.mark.parametrize("options", [("--tokenizer", "bytes"), ("--vocab-size", "260")])
def test_command(folder, options):
    output = data("@list", "-o", "tokens.h5", "--validation", "b.txt", *options)
    tokenizer = load_tokenizer("tokens.h5")
    with h5py.File("tokens.h5") as file:
        assert tokenizer.decode(file["train/tokens"][:]) == Path("a.txt").read_bytes()
        assert tokenizer.decode(file["validation/tokens"][:]) == Path("b.txt").read_bytes()
        assert f"{len(file['train/tokens'])} tokens" in output
    assert tokenizer.vocab_size == (257 if "bytes" in options else 260)


def test_command_cuts_where_documents_are_too_few(folder):
    text = "".join(f"line {i} of the only text\n" for i in range(1000))
    Path("input.txt").write_text(text)
    output = data("input.txt", "-o", "tokens.h5", "--tokenizer", "bytes", "--validation-fraction", "0.1")
    assert "the last 0.1 of each is held out" in output and "nothing is held out" not in output
    with h5py.File("tokens.h5") as file:
        train, held_out = (ByteTokenizer().decode(file[f"{split}/tokens"][:]).decode() for split in ("train", "validation"))
    assert train + held_out == text and train.endswith("\n") and len(held_out) == pytest.approx(len(text) / 10, abs=30)
    assert "nothing is held out" in data("input.txt", "-o", "tokens.h5", "--tokenizer", "bytes")
    Path("many.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(300)))
    output = data("many.jsonl", "-o", "tokens.h5", "--tokenizer", "bytes", "--validation-fraction", "0.1")
    assert "held out" not in output and re.search(r"train +2[67][0-9] documents", output)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_list_of_files_ends_its_lines_at_line_feeds_alone(folder, start, end):
    names = ["a\u2028b.txt", "c\x0cd.txt", "e\x85f.txt", "g\x1ch.txt", " spaces .txt", "caf\udce9.txt", "i\rj.txt"]
    for name in names:
        Path(name).write_text(name.encode(errors="surrogateescape").decode("latin-1"))
    Path("names").write_bytes(start + b"".join(os.fsencode(name) + end for name in names))
    assert f"train      {len(names):>12} documents" in data("@names", "-o", "tokens.h5", "--tokenizer", "bytes")
    Path("names").write_text("a.txt\n", encoding="utf-16")
    with pytest.raises(DataError, match="not a list of paths"):
        data("@names", "-o", "tokens.h5")


def test_command_learns_the_vocabulary_from_the_training_text_alone(folder):
    data("a.txt", "-o", "alone.h5", "--vocab-size", "300")
    data("a.txt", "-o", "beside.h5", "--vocab-size", "300", "--validation", "b.txt")
    with h5py.File("alone.h5") as alone, h5py.File("beside.h5") as beside:
        assert alone["tokenizer"][()] == beside["tokenizer"][()]


def test_command_takes_a_tokenizer_file(folder, bpe):
    Path("bpe.json").write_text(bpe.to_json())
    data("a.txt", "-o", "tokens.h5", "--tokenizer", "bpe.json")
    with h5py.File("tokens.h5") as file:
        assert file["train/tokens"][:-1].tolist() == bpe.encode(Path("a.txt").read_text()).tolist()
        assert file.attrs["tokenizer"] == "file"


def test_command_warns_in_a_line(folder):
    Path("pretty.json").write_text('[{"text": "a"}]')
    job = subprocess.run([sys.executable, "-m", "mpillm", "data", "pretty.json", "-o", "tokens.h5", "--tokenizer", "bytes"],
                         capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    [line] = [line for line in job.stderr.splitlines() if "JSON" in line]
    assert line.startswith("mpillm: warning: text file pretty.json: holds JSON")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252:strict"])
def test_command_speaks_in_any_encoding(folder, encoding):
    """Of text and of paths that cannot be written so, those characters are escaped, as Python does in its errors."""
    name = b"caf\xe9 \xe6\xbc\xa2.h5"
    job = subprocess.run([sys.executable, "-m", "mpillm", "data", "a.txt", "-o", name, "--tokenizer", "bytes"],
                         capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding})
    assert job.returncode == 0 and job.stdout.startswith(b"caf") and Path(os.fsdecode(name)).exists(), job


@pytest.mark.parametrize("arguments, error, message", [
    (("missing.txt",), DataError, "missing.txt: no such file"),
    ((".",), DataError, "is a directory"),
    (("@none",), DataError, "is empty"),
    (("@missing",), DataError, "@missing: cannot be read"),
    (("empty.txt",), DataError, "no training text in 1 files: all are empty"),
    (("a.txt", "--validation", "empty.txt"), DataError, "no validation text"),
    (("a.txt", "--validation-fraction", "1e-9"), DataError, "no validation text"),
    (("a.txt", "--validation-fraction", "0.999999"), DataError, "holds out every document"),
    (("a.txt", "--validation-fraction", "1"), ConfigError, "below 1"),
    (("a.txt", "--validation-fraction", "0.5", "--validation", "b.txt"), ConfigError, "give one"),
    (("a.txt", "--validation", "./a.txt"), ConfigError, "given both"),
    (("a.txt", "--vocab-size", "256"), ConfigError, "at least 257"),
    (("a.txt", "--tokenizer", "bytes", "--vocab-size", "300"), ConfigError, "goes with --tokenizer bpe"),
    (("a.txt", "--tokenizer", "bep"), ConfigError, "neither bytes, bpe nor a file"),
    (("a.txt", "--tokenizer", "foreign.json"), DataError, "not a file of the tokenizers library"),
    (("a.txt", "-o", "no/such/tokens.h5"), DataError, "no directory one can write to"),
    (("a.txt", "-o", "."), DataError, "is a directory"),
])
def test_command_refuses(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        data("-o", "tokens.h5", *arguments)
    assert not Path("tokens.h5").exists() and not list(Path().glob(".*"))

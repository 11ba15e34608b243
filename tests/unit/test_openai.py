"""The shapes of OpenAI's requests and answers, and text that comes in pieces."""

import random
from types import SimpleNamespace

import pytest

from mpillm.data.tokenizers import ByteTokenizer
from mpillm.errors import ConfigError
from mpillm.inference.openai import CHAT, COMPLETION, Answers, wanted
from mpillm.inference.requests import Result
from mpillm.inference.tasks import Generation
from mpillm.inference.text import Text


@pytest.fixture
def task():
    return Generation(SimpleNamespace(tokenizer=ByteTokenizer()), 16, 1.0, 0)


@pytest.mark.parametrize("prompt, prompts", [
    ("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([97, 98], ["ab"]), ([[97], [98, 99]], ["a", "bc"])])
def test_prompts_in_four_forms(task, prompt, prompts):
    found = wanted(COMPLETION, {"prompt": prompt, "n": 2, "seed": 5, "model": "x", "best": 1, "logit_bias": {}}, task, 100)
    assert [bytes(request.prompt).decode() for request in found.requests] == [each for each in prompts for _ in range(2)]
    assert found.prompt_tokens == sum(map(len, prompts))
    assert len({request.sampling.seed for request in found.requests[:2]}) == 2 and found.requests[0].sampling.seed == 5
    assert found.requests[0].max_tokens == 16 and not found.streams


def test_a_body_without_a_seed_gets_one_of_its_own(task):
    seeds = {wanted(COMPLETION, {"prompt": "a"}, task, 100).requests[0].sampling.seed for _ in range(3)}
    assert len(seeds) == 3


def test_no_prompt_begins_a_document(task):
    assert wanted(COMPLETION, {}, task, 100).requests[0].prompt == (ByteTokenizer.end,)


@pytest.mark.parametrize("kind, body, message", [
    (COMPLETION, [], "no JSON object"), (COMPLETION, {"prompt": {}}, "prompt"), (COMPLETION, {"prompt": [["a"]]}, "prompt"),
    (COMPLETION, {"prompt": "a", "n": 0}, "n = 0"), (COMPLETION, {"prompt": ["a"] * 11, "n": 10}, "no more than 100"),
    (COMPLETION, {"prompt": "a", "logprobs": 21}, "at most 20"), (COMPLETION, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETION, {"prompt": "a", "top_p": 2}, "top_p = 2"), (COMPLETION, {"prompt": "a", "stream": 3}, "stream = 3"),
    (COMPLETION, {"prompt": "a", "frequency_penalty": 1}, "frequency_penalty"),
    (COMPLETION, {"prompt": "a", "echo": True, "logprobs": 0}, "echo with logprobs"),
    (CHAT, {"prompt": "a"}, "messages"), (CHAT, {"messages": [{"role": "user"}]}, "content")])
def test_what_makes_no_sense_is_refused(task, kind, body, message):
    with pytest.raises(ConfigError, match=message):
        wanted(kind, body, task, 100)


def test_answers(task):
    result = Result("", [99, 100], "cd", "stop", [-0.5, -1.5], [[(99, -0.5), (97, -2.0)], [(98, -1.0), (97, -1.2)]])
    whole = Answers(wanted(COMPLETION, {"prompt": "ab", "echo": True}, task, 100), "m", ByteTokenizer()).whole([result])
    choice, = whole["choices"]
    assert (whole["object"], whole["model"], choice["text"], choice["finish_reason"]) == (COMPLETION, "m", "abcd", "stop")
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert choice["logprobs"] == {"tokens": ["c", "d"], "token_logprobs": [-0.5, -1.5], "text_offset": [0, 1],
                                  "top_logprobs": [{"c": -0.5, "a": -2.0}, {"b": -1.0, "a": -1.2}]}


def test_pieces_of_an_answer(task):
    body = {"prompt": "ab", "echo": True, "stream": True, "stream_options": {"include_usage": True}}
    asked = wanted(COMPLETION, body, task, 100)
    answers, result = Answers(asked, "m", ByteTokenizer()), Result("", [99], "c")
    pieces = [answers.piece(0, "c", True), answers.piece(0, "", False, result), answers.last([result])]
    assert [[choice["text"] for choice in piece["choices"]] for piece in pieces] == [["abc"], [""], []]
    assert [piece.get("usage") for piece in pieces[:2]] == [None, None] and pieces[2]["usage"]["total_tokens"] == 3
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:2]] == [None, "length"]
    assert len({piece["id"] for piece in pieces}) == 1 and asked.streams and asked.includes_usage


def ended(data, stop):
    """Return the text that ends before the first of the stop strings, and the tokens until then."""
    for count in range(len(data) + 1):
        text = data[:count].decode(errors="replace")
        places = [place for place in map(text.find, stop) if place >= 0]
        if places:
            return text[:min(places)], data[:count]
    return text, data


@pytest.mark.parametrize("seed", range(40))
def test_text_in_pieces(seed):
    """Whatever comes, no piece is taken back, none ends within a character, and all together are the text."""
    draw = random.Random(seed)
    data = "".join(draw.choice(["a", "b", "ab", "ä", "你", "😀"]) for _ in range(30)).encode()
    stop = tuple("".join(draw.choice("abä你") for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(3)))
    wanted_text, tokens = ended(data, stop)
    text, pieces = Text(ByteTokenizer(), stop), []
    for token in tokens:
        pieces.append(text.add(token))
        assert wanted_text.startswith("".join(pieces)) and "\ufffd" not in pieces[-1]
    assert "".join([*pieces, text.rest(wanted_text)]) == wanted_text


def test_text_is_given_as_soon_as_it_is_known():
    text = Text(ByteTokenizer(), ("stop",))
    assert [text.add(token) for token in "a stow".encode()] == ["a", " ", "", "", "", "stow"]


def test_text_comes_by_whole_characters():
    text = Text(ByteTokenizer())
    seen = [text.add(byte) for byte in "aé漢".encode() + b"\xff!" + "🙂".encode()[:2]]
    assert seen == ["a", "", "é", "", "", "漢", "", "\ufffd!", "", ""]
    assert text.rest() == "\ufffd"

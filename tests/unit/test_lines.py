"""Lines of batch files: what each asks for, and what is said of those that ask for nothing that can be."""

import json
import math
from types import SimpleNamespace

import pytest

from mpillm.data.settings import Settings
from mpillm.data.tokenizers import ByteTokenizer, LibraryTokenizer
from mpillm.errors import ConfigError
from mpillm.inference.chat import Chat
from mpillm.inference.lines import generation_line, name_of, read_object, score_line
from mpillm.inference.requests import Result, seed_of
from mpillm.inference.tasks import Generation, Scoring

LONGEST = 8
CHAT = [{"role": "user", "content": "hi"}]


class Beginning(ByteTokenizer):
    """A tokenizer that puts a token before every text."""

    starts, bos = (200,), 200

    def encode(self, text):
        return [200, *super().encode(text)]


def engine(tokenizer=None):
    """Return as much of an engine as a task asks for."""
    return SimpleNamespace(tokenizer=tokenizer or ByteTokenizer(),
                           config=SimpleNamespace(model=SimpleNamespace(max_seq_len=LONGEST)))


def generation(**values):
    return Generation(engine(), 20, 0.5, 3).ask(values, 7)


def scoring(tokenizer=None, **values):
    asked = Scoring(engine(tokenizer)).ask(values, 7)
    return asked, [([*request.prompt], request.scored_from) for request in asked.requests]


@pytest.mark.parametrize("data, reason", [
    (b"{broken", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff", "not JSON"), (b"[" * 100_000, "not JSON"),
    (b'{"prompt": 5}', "prompt = 5: input should be a valid string"), (b"{}", "exactly one of prompt, tokens, messages"),
    (b'{"prompt": "a", "tokens": [1]}', "not prompt and tokens"), (b'{"tokens": [1, -1]}', "tokens.1 = -1"),
    (b'{"prompt": "a", "max_token": 3}', "max_token: unknown key, did you mean max_tokens"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"), (b'{"prompt": "a", "top_p": 0}', "top_p = 0"),
    (b'{"prompt": "a", "min_p": 1.5}', "min_p"), (b'{"prompt": "a", "stop": ""}', "stop"),
    (b'{"prompt": "a", "n": 0}', "n = 0"), (b'{"prompt": "a", "seed": true}', "seed"),
    (b'{"prompt": "\\ud800"}', "prompt: not a text"),
    (b'{"messages": [{"role": "user"}]}', "each needs a role and a content"),
    (b'{"custom_id": "x"}', "body: required"),
    (b'{"custom_id": "x", "body": {"prompt": "a"}, "url": "/v1/embeddings"}', "url"),
    (b'{"custom_id": "x", "body": {"prompt": "a", "frequency_penalty": 0.5}}', "body: frequency_penalty = 0.5"),
    (b'{"custom_id": "x", "body": {"prompt": "a", "tools": []}}', "tools: unknown key"),
])
def test_lines_that_cannot_be(data, reason):
    with pytest.raises(ConfigError) as caught:
        generation(**read_object(data))
    assert reason in str(caught.value)


@pytest.mark.parametrize("values, reason", [
    ({}, "exactly one of continuation, text"), ({"continuation": "a"}, "give both"), ({"context": "a"}, "exactly one"),
    ({"context": "a", "continuation": "b", "text": "c"}, "exactly one"), ({"context": "a", "continuation": ""}, "has 0 tokens"),
    ({"context": "a", "continuation": "b" * 9}, "9 tokens"), ({"text": ""}, "no tokens"),
    ({"text": "\ud800"}, "text: not a text"), ({"prompt": "a"}, "prompt: unknown key"),
])
def test_score_lines_that_cannot_be(values, reason):
    with pytest.raises(ConfigError) as caught:
        scoring(**values)
    assert reason in str(caught.value)


def test_what_a_line_leaves_out_the_command_says():
    plain, = generation(id="a", prompt="ab").requests
    assert (plain.prompt, plain.max_tokens, plain.stop, plain.scored_from) == ((97, 98), 20, (), None)
    assert (plain.sampling.temperature, plain.sampling.logprobs, plain.sampling.seed) == (0.5, None, seed_of(3, "a"))
    own, = generation(tokens=[5, 6], max_tokens=0, temperature=0, top_k=4, top_p=0.5, min_p=0.1, repetition_penalty=2, seed=9,
                      logprobs=2, stop=["x", "yz"], metadata={"any": "thing"}).requests
    assert (own.prompt, own.max_tokens, own.stop) == ((5, 6), 0, ("x", "yz"))
    sampling = own.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 4, 0.5, 0.1)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logprobs) == (2, 9, 2)
    assert generation(prompt="").requests[0].prompt == (ByteTokenizer.end,)


def test_seeds_follow_from_names_or_are_given():
    def seeds(**values):
        return [request.sampling.seed for request in generation(prompt="a", **values).requests]

    assert len({*seeds(id="a", n=3), *seeds(id="b", n=3)}) == 6
    assert seeds(id="a", n=3)[:2] == seeds(id="a", n=2) and seeds() == seeds(id=7) == seeds(id="7")
    assert seeds(id="a", seed=5, n=3) == seeds(id="b", seed=5, n=3) and len({*seeds(seed=5, n=3)}) == 3
    assert seeds(seed=5) == [5]


@pytest.mark.parametrize("body, same", [
    ({"model": "m", "prompt": "a", "logprobs": 2, "max_tokens": 3, "stop": None, "user": "u"},
     {"prompt": "a", "logprobs": 2, "max_tokens": 3}),
    ({"prompt": [1, 2], "n": 2, "seed": 3, "top_p": 0.5, "frequency_penalty": 0.0, "stream": False},
     {"tokens": [1, 2], "n": 2, "seed": 3, "top_p": 0.5}),
    ({"messages": CHAT, "logprobs": True, "top_logprobs": 4, "max_completion_tokens": 3, "max_tokens": 9},
     {"messages": CHAT, "logprobs": 4, "max_tokens": 3}),
    ({"messages": CHAT, "logprobs": False, "temperature": 0}, {"messages": CHAT, "temperature": 0}),
])
def test_lines_of_openai(body, same):
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body}
    assert generation_line(line) == generation_line({"id": "x", **same})


def test_names():
    lines = {"id": "a"}, {"id": 0}, {"custom_id": "b", "body": 3}, {"id": True}, {"id": []}, {}
    assert [name_of(values, 7) for values in lines] == ["a", 0, "b", 7, 7, 7]


def test_answers_have_what_was_asked_for():
    task = Generation(engine(), 20, 0.5, 3)
    result = Result("a", [97, 98], "ab", "stop", [-1.0, -2.0], [[(97, -1.0)], [(98, -2.0)]])
    plain = {"text": "ab", "tokens": [97, 98], "finish_reason": "stop"}
    assert task.answer(generation(id="a", prompt="x"), [result]) == {"id": "a", **plain}
    assert task.answer(generation(id=5, prompt="x", logprobs=0), [result]) == {"id": 5, **plain, "logprobs": [-1.0, -2.0]}
    many = task.answer(generation(prompt="x", logprobs=1, n=2), [result, result])
    assert many == {"id": 7, "choices": 2 * [{**plain, "logprobs": [-1.0, -2.0], "top_logprobs": result.top_logprobs}]}
    assert task.tokens([result, result]) == 4


def test_a_pair_is_cut_behind_the_tokens_of_its_context():
    assert scoring(context="ab", continuation="cd")[1] == [([*b"abcd"], 2)]
    assert scoring(context="ab \n", continuation="cd")[1] == [([*b"ab \ncd"], 2)]  # spaces go with the continuation
    assert scoring(context="", continuation="cd")[1] == [([ByteTokenizer.end, *b"cd"], 1)]
    assert scoring(context=" ", continuation="cd")[1] == [([ByteTokenizer.end, *b" cd"], 1)]
    assert scoring(Beginning(), context="a", continuation="b")[1] == [([200, *b"ab"], 2)]
    assert scoring(Beginning(), context="", continuation="b")[1] == [([200, *b"b"], 1)]


def test_what_a_context_has_too_much_is_dropped_and_said():
    asked, rows = scoring(context="0123456789", continuation="abc")
    assert rows == [([*b"456789abc"], 6)] and len(rows[0][0]) == LONGEST + 1 and asked.dropped == 4
    answer = Scoring(engine()).answer(asked, [Result("a", scores=[-1.0, -2.0, -0.5], is_greedy=False)])
    assert answer == {"id": 7, "logprob": -3.5, "num_tokens": 3, "is_greedy": False, "dropped": 4}


def windows_of_lm_eval(tokens, prefix, longest):
    """Return contexts and targets as ``get_rolling_token_windows`` and then ``make_disjoint_window`` of lm-eval do."""
    first = min(longest, len(tokens))
    found, done = [([prefix, *tokens[:first - 1]], tokens[:first])], first
    while done < len(tokens):
        count = min(len(tokens) - done, longest)
        end = done + count
        found.append((tokens[end - longest - 1:end - 1], tokens[end - count:end]))
        done += count
    return [(inputs[:len(inputs) - (len(targets) - 1)], targets) for inputs, targets in found]


@pytest.mark.parametrize("tokenizer, prefix", [(ByteTokenizer(), 256), (Beginning(), 200)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 25, 40])
def test_a_text_is_scored_in_the_windows_of_lm_eval(tokenizer, prefix, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    wanted = windows_of_lm_eval([*text.encode()], prefix, LONGEST)
    rows = scoring(tokenizer, text=text)[1]
    assert [(row[:start], row[start:]) for row, start in rows] == wanted
    assert max(len(row) for row, _ in rows) <= LONGEST + 1
    results = [Result("", scores=[-0.1] * len(row[start:])) for row, start in rows]
    answer = Scoring(engine()).answer(scoring(text=text)[0], results)
    assert answer["num_tokens"] == length and math.isclose(answer["logprob"], -0.1 * length) and answer["is_greedy"]


def test_a_text_needs_a_token_before_it():
    tokenizer = SimpleNamespace(encode=ByteTokenizer().encode, bos=None, starts=())
    for values in ({"text": "a"}, {"context": "", "continuation": "a"}):
        with pytest.raises(ConfigError, match="give a context"):
            scoring(tokenizer, **values)


TALK = [{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": "what <|im_end|>\n"},
        {"role": "assistant", "content": "one"}, {"role": "user", "content": "two 漢"}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{{- bos_token }}\n{%- for m in messages %}\n    {%- if loop.index0 == 1 %}{% continue %}{% endif %}\n"
              "    {%- set said = m.content | trim %}\n  {{ said | tojson }}{{ tools is none }}\n{% endfor %}{{ eos_token }}",
    "marked": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
              "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ messages | tojson(indent=2) }}",
}


def tokenizers(folder, template):
    """Return the same tokenizer with a chat template for mpillm and for transformers."""
    library, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    made.train_from_iterator([json.dumps(TALK)] * 9, library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>", "<s>"], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()))
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return LibraryTokenizer(made, "file", Settings.of_folder(folder)), theirs


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_chats_are_the_prompts_of_transformers(tmp_path, template):
    ours, theirs = tokenizers(tmp_path, template)
    wanted = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert Chat(ours).encode(TALK) == wanted and len(wanted) > 20
    assert 1 not in ours.encode("<|im_end|>")  # a plain prompt has none of these tokens


@pytest.mark.parametrize("template, reason", [
    ("{{ raise_exception('no such role') }}", "no such role"), ("{% if %}", "is wrong"), ("{{ messages.pop() }}", "refuses"),
    ("{{ ''.__class__.__mro__ }}", "refuses"), ("{{ strftime_now('%Y') }}", "undefined"), (None, "no chat template"),
])
def test_chats_that_a_template_refuses(template, reason):
    settings = Settings({} if template is None else {"chat_template.jinja": template})
    tokenizer = SimpleNamespace(settings=settings, to_json=ByteTokenizer().to_json)
    with pytest.raises(ConfigError, match=reason):
        Chat(tokenizer).encode(CHAT)
    with pytest.raises(ConfigError, match="no chat template"):
        Chat(ByteTokenizer()).encode(CHAT)


def test_score_lines_may_bring_anything_along():
    assert score_line({"text": "a", "metadata": [1]}).text == "a"

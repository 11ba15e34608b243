"""Scores from Python and by lm-eval: those of the reference, the same on every layout, errors that all ranks know."""

import json
import random
import sys

import pytest
import torch
from helpers import assert_all
from written import make_model, reference_of, shared_run

from mpillm.cli import evaluate as cli
from mpillm.comm.single import SingleComm
from mpillm.errors import CollectiveError, ConfigError, DataError, MpillmError
from mpillm.inference.crew import Crew
from mpillm.inference.engine import Engine

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

LONGEST, QUESTIONS = 150, 6
COMMON = "test_split: test\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: %s/data.jsonl}\n  cache_dir: %s/cache\n"
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
               "metric_list:\n  - metric: byte_perplexity\n",
    "until": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
             "generation_kwargs: {until: [' ', b], max_gen_toks: 6}\nmetric_list:\n  - metric: exact_match\n",
    "unknown-setting": "output_type: generate_until\ndoc_to_text: a\ndoc_to_target: b\ngeneration_kwargs: {num_beams: 3}\n",
    "no-data": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: a\n",
}
MODEL = {"max_seq_len": LONGEST, "num_kv_heads": 2}


def questions():
    """Return questions longer than a block of keys and values, each with four choices, of several tokens or of one."""
    draw, found = random.Random(0), []
    for i in range(QUESTIONS):
        words = ["".join(draw.choice("abcd") for _ in range(5 if i % 2 else 1)) for _ in range(4)]
        question = "".join(draw.choice("abc ") for _ in range(70 + 5 * i)) + "?"
        found.append({"question": question, "choices": words, "answer": i % 4})
    return found


def layouts(ranks):
    """Return every split of ranks over data and pipeline."""
    return [{"layout.data": ranks // p, "layout.pipeline": p} for p in range(1, ranks + 1) if ranks % p == 0]


@pytest.fixture
def path(comm, comm_path):
    """Return a folder with a run and tasks that all ranks of ``comm`` see."""
    shared_run(comm, comm_path / "run", make_model(**MODEL), dtype="float32")
    if comm.rank == 0:
        (comm_path / "tasks").mkdir()
        for name, text in TASKS.items():
            common = COMMON % (comm_path, comm_path)
            text += common.replace("data.jsonl", "none.jsonl") if name == "no-data" else common
            (comm_path / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{text}")
        (comm_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions()))
    comm.Barrier()
    return comm_path


def scores(path, comm, pairs, overrides=()):
    """Return what an engine says of pairs, and how many tokens its replica computed."""
    engine = Engine(path / "run", comm, dict(overrides))
    try:
        return engine.score(pairs), sum(comm.allgather(engine.replica.tokens))
    finally:
        engine.free()


def wanted(path):
    """Return what the serial reference says of every choice of every question: log-probability, and whether it is greedy."""
    reference, found = reference_of(path / "run", make_model(**MODEL)), []
    for each in questions():
        for choice in each["choices"]:
            row, count = list(f"{each['question']} {choice}".encode()), len(choice) + 1
            with torch.no_grad():
                odds = reference.logits(torch.tensor([row[:-1]]))[0].log_softmax(-1)[-count:]
            targets = torch.tensor(row[-count:])
            found.append((odds.gather(1, targets[:, None]).sum().item(), bool((odds.argmax(1) == targets).all())))
    return found


def pairs():
    return [(each["question"], f" {choice}") for each in questions() for choice in each["choices"]]


def test_scores_are_those_of_the_reference_on_every_layout(comm, path):
    alone, computed = scores(path, SingleComm(), pairs())
    for found, (logprob, is_greedy) in zip(alone, wanted(path)):
        assert_all(abs(found.logprob - logprob) < 1e-4 and found.is_greedy == is_greedy, (found, logprob), comm)
    expected = sum(len(each["question"]) + sum(map(len, each["choices"])) + 3 for each in questions())  # contexts once
    assert_all(computed <= expected, f"{computed} tokens, not {expected}", comm)
    for overrides in [*layouts(comm.size), {"inference.share_prefixes": False}, {"inference.batch": 2}]:
        found, _ = scores(path, comm, pairs(), overrides)
        assert_all(found == alone, f"{overrides}: {found}, not {alone}", comm)


def test_pairs_are_texts_or_tokens(comm, path):
    texts = [("", "ab"), ("ab", "c"), ("x" * 200, "c"), "a text"]
    tokens = [((), b"ab"), (b"ab", b"c"), (b"x" * 200, b"c"), ((), b"a text")]
    found, _ = scores(path, comm, texts)
    assert_all(found == scores(path, comm, tokens)[0], found, comm)
    assert_all([each.num_tokens for each in found] == [2, 1, 1, 6] and found[2].dropped == 50, found, comm)
    for wrong, reason in ((("a", ""), "0 tokens"), (("a", "b" * 151), "151 tokens"), ((b"a", (300,)), "the model knows")):
        with pytest.raises(ConfigError, match=reason):
            scores(path, comm, [("a", "b"), wrong])


def test_choices_of_one_token_are_one_row(comm, path):
    context = list(b"abc" * 40)
    asked = [(context, [token]) for token in b"abca"] + [(context, b"ab"), (context[:7], b"a")]
    alone = [scores(path, SingleComm(), [each])[0][0] for each in asked]
    found, computed = scores(path, comm, asked)
    assert_all(found == alone and sum(each.is_greedy for each in found[:3]) <= 1, (found, alone), comm)
    assert_all(computed <= 120 + 2 + 7, computed, comm)


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval")
    from mpillm.inference import harness

    return harness


def evaluated(harness, path, comm, names, overrides=(), **options):
    """Return what the harness finds, on rank 0."""
    crew = Crew(comm)
    crew.open(path / "run", dict(overrides))
    try:
        return crew.run(lambda: harness.evaluate(crew, names, str(path / "tasks"), **options))
    finally:
        crew.engine.free()


def test_the_harness_finds_the_same_on_every_layout(comm, path, harness):
    names = ["choices", "rolling", "until"]
    found = [evaluated(harness, path, comm, names, overrides) for overrides in layouts(comm.size)]
    if comm.rank == 0:
        assert all(each == found[0] for each in found)
        results = found[0]["results"]
        odds, rolled = wanted(path), Engine(path / "run", SingleComm()).score([each["question"] for each in questions()])
        best = [max(range(4), key=lambda i: odds[4 * question + i][0]) for question in range(QUESTIONS)]
        right = [choice == each["answer"] for choice, each in zip(best, questions())]
        assert results["choices"]["acc,none"] == sum(right) / QUESTIONS
        assert results["until"]["exact_match,none"] == 0
        size = sum(len(each["question"]) for each in questions())
        perplexity = torch.tensor(-sum(each.logprob for each in rolled) / size, dtype=torch.float64).exp().item()
        assert abs(results["rolling"]["byte_perplexity,none"] / perplexity - 1) < 1e-12


def test_without_the_harness_all_ranks_say_what_to_install(comm, monkeypatch):
    monkeypatch.delitem(sys.modules, "mpillm.inference.harness", raising=False)
    monkeypatch.delattr("mpillm.inference.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpillm\[eval\]'"):
        Crew(comm).run(cli._harness)


@pytest.mark.parametrize("name, kind, reason", [
    ("no-data", DataError, "cannot be loaded"), ("unknown-setting", ConfigError, "generation_kwargs.num_beams"),
])
def test_what_cannot_be_evaluated_all_ranks_know(comm, path, harness, name, kind, reason):
    with pytest.raises(MpillmError, match=reason) as caught:
        evaluated(harness, path, comm, [name])
    assert_all(isinstance(caught.value, (kind, CollectiveError)), caught.value, comm)
    assert_all(caught.value.exit_code == kind.exit_code, caught.value.exit_code, comm)

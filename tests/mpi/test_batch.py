"""Batches on ranks: the same files on every layout, stopped and gone on with elsewhere, errors that all ranks know."""

import json
import os
import random
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_all
from mpi4py import MPI
from written import make_model, reference_of, shared_run

from mpillm.cli import generate, score
from mpillm.comm.single import SingleComm
from mpillm.errors import ConfigError, DataError, MpillmError
from mpillm.guard.stop import SIGNALS, StopRequest
from mpillm.inference import batch
from mpillm.inference.batch import run_batch
from mpillm.inference.engine import Engine
from mpillm.inference.tasks import Generation, Scoring

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

NEVER = SimpleNamespace(asked=lambda _: None, agreed=lambda _: None, settle=lambda: None)
LINES = 30


def write_lines(path):
    """Write prompts of all kinds, and lines that cannot be."""
    draw, lines = random.Random(0), []
    for i in range(LINES):
        line = {"id": f"line {i}", "prompt": "".join(draw.choice("abc ") for _ in range(draw.randrange(40)))}
        line |= [{}, {"temperature": 0, "max_tokens": 12}, {"n": 3, "logprobs": 2}, {"seed": 4, "stop": ["e", "a"]}][i % 4]
        lines.append(json.dumps(line))
    body = {"prompt": [1, 2, 3], "max_tokens": 4}
    lines += ["", '{"broken', '{"id": "line 3", "prompt": "again"}', json.dumps({"custom_id": "o", "body": body}),
              json.dumps({"prompt": "x" * 70}), '{"tokens": [5, 257]}', '{"prompt": "without a name"}']
    path.write_text("\n".join(lines))


def write_scores(path):
    """Write texts of several windows, and pairs."""
    draw, lines = random.Random(1), []
    for i in range(LINES):
        text = "".join(draw.choice("abc ") for _ in range(1 + draw.randrange(180)))
        pair = {"context": text[:-1], "continuation": text[-1:] + "ab"}
        lines.append({"id": i, **({"text": text} if i % 3 == 0 else pair)})
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "none", "text": ""}]))


@pytest.fixture
def path(comm, comm_path):
    """Return a folder with a run and batch files that all ranks of ``comm`` see."""
    shared_run(comm, comm_path / "run", make_model(max_seq_len=64, num_kv_heads=2), dtype="float32")
    if comm.rank == 0:
        write_lines(comm_path / "generate.jsonl")
        write_scores(comm_path / "score.jsonl")
    comm.Barrier()
    return comm_path


def run(path, name, comm, overrides=(), stop=NEVER, target=None, show=None, **options):
    """Run a batch; return the outcome and the file, or None."""
    engine = Engine(path / "run", comm, dict(overrides))
    options = {"max_tokens": 8, "temperature": 0.7, "seed": 5} | options
    task = Scoring(engine) if name == "score" else Generation(engine, **options)
    target = path / (target or f"{name}.{comm.size}")
    try:
        outcome = run_batch(engine, task, path / f"{name}.jsonl", target, stop, show)
    finally:
        engine.free()
    return outcome, target.read_bytes() if target.exists() else None


def layouts(ranks):
    """Return every split of ranks over data and pipeline."""
    return [{"layout.data": ranks // p, "layout.pipeline": p} for p in range(1, ranks + 1) if ranks % p == 0]


@pytest.mark.parametrize("name", ["generate", "score"])
def test_the_same_file_on_every_layout(comm, path, name):
    outcome, wanted = run(path, name, SingleComm(), target=f"alone.{comm.rank}")
    assert outcome.stopped_by is None
    for i, overrides in enumerate([*layouts(comm.size), {"inference.batch": 2, "inference.pass_tokens": 64}]):
        again, found = run(path, name, comm, overrides, target=f"out.{i}")
        assert_all(found == wanted, f"{overrides}: {found}, not {wanted}", comm)
        assert_all((again.lines, again.stopped_by) == (outcome.lines, None), again, comm)


def test_results_are_in_order_and_bad_lines_say_why(comm, path):
    outcome, data = run(path, "generate", comm)
    found = [json.loads(line) for line in data.splitlines()]
    names = [*(f"line {i}" for i in range(LINES)), LINES + 2, "line 3", "o", LINES + 5, LINES + 6, LINES + 7]
    assert_all([each["id"] for each in found] == names, found, comm)
    bad = {each["line"]: each["error"] for each in found if "error" in each}
    reasons = {LINES + 2: "not JSON", LINES + 3: "id line 3 is that of line 4 already", LINES + 5: "max_seq_len = 64",
               LINES + 6: "the model knows 0 to 256"}
    assert_all(bad.keys() == reasons.keys() and all(reasons[line] in bad[line] for line in bad), bad, comm)
    assert_all(len(found[2]["choices"]) == 3 and len(found[1]["tokens"]) <= 12, found[:3], comm)
    assert_all(comm.rank > 0 or outcome.refused.keys() == bad.keys(), outcome.refused, comm)
    wanted = {"run", "score.jsonl", "generate.jsonl", f"generate.{comm.size}", f"generate.{comm.size}.job"}
    assert_all({*os.listdir(path)} == wanted, os.listdir(path), comm)


def test_scores_are_those_of_the_reference(comm, path):
    _, data = run(path, "score", comm)
    reference = reference_of(path / "run", make_model(max_seq_len=64, num_kv_heads=2))
    asked = [json.loads(line) for line in (path / "score.jsonl").read_text().splitlines()]
    for line, found in list(zip(asked, map(json.loads, data.splitlines())))[1:LINES:5]:
        if "text" in line:
            continue
        bare = line["context"].rstrip()
        row, start = list((line["context"] + line["continuation"]).encode())[-65:], len(line["context"] + line["continuation"])
        count = start - len(bare)
        row, first = (row, len(row) - count) if bare else ([256, *row], 1)
        with torch.no_grad():
            odds = reference.logits(torch.tensor([row[:-1]]))[0].log_softmax(-1)[first - 1:, :]
        targets = torch.tensor(row[first:])
        wanted = odds.gather(1, targets[:, None]).sum().item()
        assert_all(abs(found["logprob"] - wanted) < 1e-4 and found["num_tokens"] == count, (line, found, wanted), comm)
        assert_all(found["is_greedy"] == bool((odds.argmax(1) == targets).all()), (line, found), comm)


class StopAfter:
    """A request that some rank gets once it has been asked so many times whether there is one."""

    def __init__(self, times):
        self.left = times

    def asked(self, _):
        self.left -= 1
        return "SIGUSR1" if self.left < 0 else None

    def agreed(self, comm):
        return next(filter(None, comm.allgather(self.asked(False))), None)

    def settle(self):
        self.left = 10**9


def test_a_stopped_batch_goes_on_elsewhere(comm, path):
    _, wanted = run(path, "generate", SingleComm(), target=f"alone.{comm.rank}")
    found, tries = None, 0
    while found is None:
        overrides = layouts(comm.size)[tries % len(layouts(comm.size))]
        stop = StopAfter(5 + 10 * tries) if comm.rank == tries % comm.size else StopAfter(10**9)
        outcome, found = run(path, "generate", comm, overrides, stop)
        assert_all((outcome.stopped_by is None) == (found is not None), outcome, comm)
        assert_all(found is not None or outcome.stopped_by == "SIGUSR1", outcome, comm)
        tries += 1
    assert_all(found == wanted and tries > 1, f"after {tries}: {found}, not {wanted}", comm)


def test_a_signal_to_the_last_rank_stops_all(comm, path, monkeypatch):
    monkeypatch.setattr(batch, "LOOK_S", 0)  # for the batch is done sooner than the next look
    with StopRequest({}) as stop:
        if comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        outcome, found = run(path, "generate", comm, layouts(comm.size)[-1], stop)
        assert_all(outcome.stopped_by == "SIGUSR1" and found is None, outcome, comm)
        for number in SIGNALS:  # ignored once all have agreed
            signal.signal(number, signal.SIG_DFL)
    assert_all(run(path, "generate", comm)[0].stopped_by is None, "goes on", comm)


def test_another_job_is_refused_on_every_rank(comm, path):
    run(path, "generate", comm, stop=StopAfter(0))
    for changes in ({"seed": 6}, {"temperature": 0.5}, {"overrides": {"train.dtype": "float64"}}):
        with pytest.raises(ConfigError, match="holds results of another job"):
            run(path, "generate", comm, **changes)
    with pytest.raises(ConfigError, match="command = generate there, score now"):
        run(path, "score", comm, target=f"generate.{comm.size}")
    _, found = run(path, "generate", comm)
    again, same = run(path, "generate", comm)
    assert_all(found is not None and again.was_done and same == found, again, comm)
    with pytest.raises(ConfigError, match="seed = 5 there, 6 now"):
        run(path, "generate", comm, seed=6)


def test_files_that_are_not_there(comm, path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        run(path, "none", comm)
    with pytest.raises(DataError, match="make its folder first"):
        run(path, "generate", comm, target="no/out")


def test_a_full_disk_stops_all_with_one_error(comm, path):
    """A limit on the size of files, on the last rank alone, stands for a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if comm.rank == comm.size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        with pytest.raises(MpillmError, match="cannot be written") as caught:
            run(path, "generate", comm, {"layout.data": comm.size})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_all(caught.value.exit_code == 74 and len(set(comm.allgather(str(caught.value)))) == 1, caught.value, comm)
    _, wanted = run(path, "generate", SingleComm(), target=f"alone.{comm.rank}")
    assert_all(run(path, "generate", comm)[1] == wanted, "other results", comm)


def test_weights_that_are_not_finite(comm, path, monkeypatch):
    with monkeypatch.context() as patch:
        if comm.rank in (comm.size - 1, comm.size - 2):  # one replica of several, where there are four ranks
            patch.setattr("mpillm.inference.replica.choose", lambda *_: -1)
        with pytest.raises(MpillmError, match="not finite") as caught:
            run(path, "generate", comm, layouts(comm.size)[-2 if comm.size == 4 else -1])
    assert_all(caught.value.exit_code == 74, caught.value, comm)


def test_a_file_that_changes_meanwhile(comm, path, monkeypatch):
    def changed(*arguments):
        found = survey(*arguments)
        if comm.rank == 0:
            (path / "generate.jsonl").write_text("x" * 9000)
        comm.Barrier()
        return found

    survey = batch._survey
    monkeypatch.setattr(batch, "_survey", changed)
    with pytest.raises(MpillmError, match="no longer what it was"):
        run(path, "generate", comm)


def test_an_empty_file(comm, path):
    if comm.rank == 0:
        (path / "score.jsonl").write_text("\n\n")
    comm.Barrier()
    outcome, found = run(path, "score", comm)
    assert_all((outcome.lines, found) == (0, b""), (outcome, found), comm)


def test_progress_is_that_of_all_ranks(comm, path):
    seen = []
    run(path, "generate", comm, show=seen.append)
    last = seen[-1] if seen else None
    assert_all((last is None) == (comm.rank > 0), seen, comm)
    is_all = last is None or last.lines == last.all_lines == LINES + 6 and last.share == 1 and last.tokens > LINES
    assert_all(is_all, last, comm)


def test_commands(tmp_path_factory, capfd):
    """Run both commands on the whole launch: rank 0 says what became of it, others nothing."""
    world = MPI.COMM_WORLD
    path = world.bcast(tmp_path_factory.mktemp("commands") if world.rank == 0 else None)
    shared_run(world, path / "run", make_model(max_seq_len=64), dtype="float32")
    if world.rank == 0:
        write_lines(path / "in.jsonl")
        write_scores(path / "texts.jsonl")
    world.Barrier()
    prompts, texts = ["--prompts", str(path / "in.jsonl"), "--tokens", "5"], [str(path / "texts.jsonl")]
    said = []
    for command, words in ((generate.command, prompts), (generate.command, prompts), (score.command, texts)):
        words = [str(path / "run"), *words, "-o", str(path / f"{command.name}.out"), "--data", str(world.size)]
        assert command.main(words, standalone_mode=False) == 0
        for number in SIGNALS:  # ignored since all was done
            assert signal.signal(number, signal.SIG_DFL) == signal.SIG_IGN
        said.append(capfd.readouterr().err)
    first, again, scores = said
    assert_all(world.rank > 0 or "4 of 36 lines in error, first line 32: not JSON" in first, first, world)
    assert_all(world.rank > 0 or f"36 lines in {path / 'generate.out'}, all done before" in again, again, world)
    assert_all(world.rank > 0 or "1 of 31 lines in error, first line 31: text has no tokens" in scores, scores, world)
    assert_all(world.rank == 0 or not any("mpillm" in text for text in said), said, world)


@pytest.mark.parametrize("words, reason", [
    (["--prompts", "in"], "give both"), (["-o", "out"], "give both"),
    (["--prompts", "in", "-o", "out", "--prompt", "a"], "one of them"),
])
def test_words_that_do_not_go_together(words, reason):
    with pytest.raises(ConfigError, match=reason):
        generate.command.main(["run", *words], standalone_mode=False)

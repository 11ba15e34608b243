"""The bench: memory seen from outside, statistics, the peer against the serial reference, the whole command."""

import itertools
import json
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from families import CASES
from helpers import run_mpi
from written import make_model, make_run

from mpillm.bench import generation, launch, peer, training, transformers_peer
from mpillm.cli.bench import behind_best, command
from mpillm.comm.single import SingleComm
from mpillm.config import Config
from mpillm.errors import ConfigError, LaunchError, MpillmError, NumbersError
from mpillm.hf.families import FAMILIES
from mpillm.machine import PRESETS
from mpillm.train.run import Run
from mpillm.verify.reference import Reference

MIB = 1 << 20
TINY = {
    "model": {"vocab_size": 29, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 40},
    "train": {"seq_len": 8, "global_batch": 4, "microbatch": 2},
    "data": {"path": "missing.h5"},
}
HOLD = """import os, time
block = b'x' * ({} << 20)
{}
open('ready-' + str(os.getpid()), 'w').close()
while not os.path.exists('seen'):
    time.sleep(0.01)
os._exit(0)"""
SECOND_PROCESS = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {!r}])"


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(Config.from_dict(TINY).to_toml())
    return path


@pytest.fixture
def peak(tmp_path, monkeypatch):
    """A function that returns the peak of a job of some processes, which end once all have been looked at together."""
    monkeypatch.chdir(tmp_path)
    tree_pss = launch.tree_pss

    def measure(mebibytes, then="pass", processes=1):
        for left in [*tmp_path.glob("ready-*"), *tmp_path.glob("seen")]:
            left.unlink()

        def look(pid):
            are_ready = len(list(tmp_path.glob("ready-*"))) == processes
            found = tree_pss(pid)
            if are_ready:
                (tmp_path / "seen").touch()
            return found

        monkeypatch.setattr(launch, "tree_pss", look)
        return launch.run_job([sys.executable, "-c", HOLD.format(mebibytes, then)], samples_memory=True).peak_bytes

    return measure


def test_the_peak_of_a_job_is_what_it_allocates(peak):
    assert peak(64) - peak(0) == pytest.approx(64 * MIB, rel=0.05)


def test_the_peak_counts_processes_below_and_shared_pages_once(peak):
    child = HOLD.format(48, "pass")
    own_pages = peak(0, SECOND_PROCESS.format(child), 2) - peak(0, SECOND_PROCESS.format(HOLD.format(0, "pass")), 2)
    assert own_pages == pytest.approx(48 * MIB, rel=0.08)
    shared_pages = peak(64, "os.fork()", 2) - peak(0, "os.fork()", 2)
    assert shared_pages == pytest.approx(64 * MIB, rel=0.08)


def test_a_job_that_fails_shows_the_end_of_its_stderr():
    script = "import sys; [print(i, file=sys.stderr) for i in range(100)]; sys.exit('broken on purpose')"
    with pytest.raises(MpillmError, match="left with code 1") as error:
        launch.run_job([sys.executable, "-c", script])
    assert str(error.value).endswith("\n98\n99\nbroken on purpose") and "\n50\n" not in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupted_job_leaves_no_process(monkeypatch, number, raised):
    seen, handler = [], signal.getsignal(signal.SIGTERM)
    interactive = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background ignore it

    def interrupt(pid):
        if len(launch.process_tree(pid)) < 2:
            return 0
        seen.extend(process.pid for process in launch.process_tree(pid))
        os.kill(os.getpid(), number)
        return 0

    script = SECOND_PROCESS.format("import time; time.sleep(60)") + "; child.wait()"
    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(launch, "tree_pss", interrupt)
        launch.run_job([sys.executable, "-c", script], samples_memory=True)
    signal.signal(signal.SIGINT, interactive)
    assert len(seen) == 2 and signal.getsignal(signal.SIGTERM) == handler
    deadline = time.monotonic() + 60
    while any(launch.tree_pss(pid) for pid in seen) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(launch.tree_pss(pid) for pid in seen)


@pytest.mark.parametrize("n, first, last", [(6, 1, 6), (10, 2, 9), (15, 4, 12), (25, 8, 18), (50, 18, 33)])
def test_median_interval_has_the_ranks_of_the_published_table(n, first, last):
    median, low, high, coverage = training.median_interval([10.0 * i for i in range(n, 0, -1)])
    assert (median, low, high) == (5.0 * (n + 1), 10.0 * first, 10.0 * last)
    assert coverage >= 0.95


@pytest.mark.parametrize("n", [1, 2, 5, 7, 12])
def test_coverage_of_the_median_interval_by_enumeration(n):
    _, low, high, coverage = training.median_interval(range(n))
    below = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
    assert coverage == pytest.approx(sum(low < count <= high for count in below) / 2 ** n)


def test_rows_compare_round_by_round():
    config = Config.from_dict(TINY)
    single, data = training.make_cases(config, ["single", "data"], 2)
    one, two, ddp, eager = (training.Program(impl, case, (impl, case.layout)) for impl, case in (
        ("mpillm", single), ("mpillm", data), ("ddp", data), ("hf-eager", single)))
    times_s = {one: [2.0, 4.0, 8.0], two: [1.0, 1.0, 2.0], ddp: [2.0, 3.0, 2.0], eager: [4.0, 4.0, 8.0]}
    rows = training.make_rows([(one,), (two, ddp)], (eager,), times_s, {one: 5, two: 6, ddp: None, eager: 7})
    assert [(row["impl"], row["layout"], row["ranks"], row["step_s"], row["tokens_per_s"], row["peak_bytes"])
            for row in rows] == [("mpillm", "single", 1, 4.0, 8.0, 5), ("mpillm", "data=2", 2, 1.0, 32.0, 6),
                                 ("ddp", "data=2", 2, 2.0, 16.0, None), ("hf-eager", "single", 1, 4.0, 8.0, 7)]
    assert rows[1]["speed_over_peer"] == {"median": 2.0, "low": 1.0, "high": 3.0, "coverage": 0.75}
    assert rows[1]["speed_over_single"]["median"] == 4.0
    assert [rows[i]["speed_over_hf-eager"]["median"] for i in (0, 1)] == [1.0, 4.0]
    assert [[key for key in row if key.startswith("speed_over_")] for row in rows] == [
        ["speed_over_hf-eager"], ["speed_over_peer", "speed_over_single", "speed_over_hf-eager"], [], []]


def test_the_order_turns_from_round_to_round(monkeypatch):
    case, = training.make_cases(Config.from_dict(TINY), ["single"], 2)
    a, b = (training.Program(name, case, (name,)) for name in "ab")
    ran = []
    monkeypatch.setattr(training.Program, "run",
                        lambda self, samples_memory: training.Outcome(1.0, 7 if samples_memory else None))
    times_s, peak_bytes = training.measure([a, b], 3, lambda program, number, _: ran.append((program.impl, number)))
    assert ran == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert times_s == {a: [1.0] * 3, b: [1.0] * 3} and peak_bytes == {a: 7, b: 7}


def test_the_peer_is_the_model_of_the_serial_reference():
    config = Config.from_dict(TINY).resolve(1)
    case, = training.make_cases(config, ["single"], 1)
    reference, decoder = Reference(config.model, seed=3), peer.Decoder(peer.PeerWork(**training.peer_work(case))).double()
    names = {"embedding.weight": "embedding.weight", "norm.weight": "norm.weight", "head.weight": "head.weight"}
    for name in reference.parameters:
        names.setdefault(name, name.replace("attention.", "").replace("ffn.", ""))
    weights = {names[name]: weight.T if name.endswith((".output.weight", ".down.weight")) else weight
               for name, weight in reference.parameters.items()}
    decoder.load_state_dict(weights)
    tokens = torch.randint(config.model.vocab_size, (3, config.train.seq_len + 1))
    logits = reference.logits(tokens)
    assert (decoder(tokens) - logits).abs().max() < 1e-6 * logits.abs().max()

def test_programs_that_differ_in_the_first_step_are_not_compared():
    own = {"loss": 4.0, "grad_norm": 0.5}
    training.check_same_work({"mpillm": own, "hf-eager": {"loss": 4.00003, "grad_norm": 0.5004}, "ddp": None})
    for key, value in (("loss", 4.0001), ("loss", 3.9999), ("grad_norm", 0.502)):
        with pytest.raises(NumbersError, match=f"{key} of the first step: mpillm .*, hf-eager {value}"):
            training.check_same_work({"mpillm": own, "hf-eager": own | {key: value}})


@pytest.fixture
def threads():
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_class_of_every_family_does_the_work_of_mpillm(kind, tmp_path, threads):
    """Gradients, too: initial weights hardly show in the loss."""
    transformers = pytest.importorskip("transformers")
    name, values = CASES[kind]
    described = getattr(transformers, name).config_class(**values).to_dict()
    config = Config(model=FAMILIES[kind].model(described, kind)).with_values({
        "data.path": str(tmp_path / "tokens.h5"), "data.mask_token": 3, "train.run_dir": str(tmp_path / "run"),
        "train.seq_len": 23, "train.global_batch": 3, "train.microbatch": 2, "train.steps": 2, "train.eval_every": 0})
    config = config.resolve(1)
    training.write_random_tokens(config.data.path, config.model.vocab_size, 23 * 40 + 1)
    first, _ = Run(config, SingleComm())
    for attention in transformers_peer.ATTENTIONS:
        training.check_same_work({"mpillm": first, attention: transformers_peer.train(config, attention)})


@pytest.mark.slow
def test_the_peer_trains_alike_in_every_mode(tmp_path):
    spec = tmp_path / "spec.json"
    work = {"vocab": 29, "hidden": 24, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 40, "seq": 8, "batch": 4,
            "micro": 2, "steps": 4, "lr": 0.05, "eps": 0.1, "grad_clip": 0.5}
    lines = []
    for limit, places in ((0.5, (("single", 1), ("ddp", 2), ("tp", 2), ("pp", 2))), (0.0, (("single", 1),))):
        spec.write_text(json.dumps(work | {"grad_clip": limit}))
        for mode, ranks in places:
            job = run_mpi(0, ["-m", "mpillm.bench.peer", mode, ranks, spec])
            assert job.returncode == 0, job.stderr
            lines.append(json.loads(job.stdout))
    *clipped, unclipped = lines
    assert [(line["mode"], line["ranks"]) for line in clipped] == [("single", 1), ("ddp", 2), ("tp", 2), ("pp", 2)]
    for line in clipped:
        assert line["loss"] == pytest.approx(clipped[0]["loss"], rel=1e-6)
        assert line["tokens_per_s"] == pytest.approx(32 / line["step_s"])
    assert abs(unclipped["loss"] - clipped[0]["loss"]) > 1e-3


@pytest.mark.launches
def test_bench_train_writes_a_row_for_each_program(tiny, tmp_path):
    job = run_mpi(0, ["-m", "mpillm", "bench", "train", tiny, "--peers", "--layouts", "data=2", "--pairs", 1, "--steps",
                      3, "--json", tmp_path / "bench.json", "--layout.zero", 0], timeout=120,
                  cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert job.returncode == 0, job.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert report["machine"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "MPI" in report["machine"]["mpi"] and report["machine"]["cpu"]
    assert [(row["impl"], row["layout"], row["ranks"], row["pairs"]) for row in report["rows"]] == [
        ("mpillm", "data=2", 2, 1), ("ddp", "data=2", 2, 1)]
    for row in report["rows"]:
        assert row["tokens_per_s"] == pytest.approx(4 * 8 / row["step_s"])
        assert row["peak_bytes"] > 100 * MIB
        assert f"{row['peak_bytes'] / MIB:.0f}" in job.stdout
    assert not list(tmp_path.glob("mpillm-bench-*"))


@pytest.mark.slow
def test_bench_train_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "tiny.toml"
    path.write_text(Config.from_dict(TINY, {"model.qk_norm": "head"}).to_toml())
    job = run_mpi(0, ["-m", "mpillm", "bench", "train", path, "--transformers", "--layouts", "single,data=2", "--pairs", 1,
                      "--steps", 2, "--json", tmp_path / "bench.json"], timeout=240, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["impl"], row["layout"]) for row in rows] == [
        ("mpillm", "single"), ("mpillm", "data=2"), ("hf-eager", "single"), ("hf-sdpa", "single")]
    for own in rows[:2]:
        for other in rows[2:]:
            assert own[f"speed_over_{other['impl']}"]["median"] == other["step_s"] / own["step_s"]


def test_bench_generate_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    make_run(tmp_path / "run", make_model(max_seq_len=1024), dtype="float32")
    job = run_mpi(0, ["-m", "mpillm", "bench", "generate", tmp_path / "run", "--peers", "--workloads", "batch-8,mixed",
                      "--pairs", 1, "--prompts", 9, "--ranks", 2, "--json", tmp_path / "bench.json"], timeout=240, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    found = {(row["workload"], row["impl"], row["ranks"]): row for row in rows}
    for name in ("batch-8", "mixed"):
        own, others = found[name, "mpillm", 1], [found[name, "mpillm", 2], found[name, "transformers", 1]]
        for other in others:
            assert other["speed_of_mpillm"]["median"] == own["tokens_per_s"] / other["tokens_per_s"]
        assert 1 <= others[0]["makespan_over_mean"] <= 2


def test_bench_serve(tmp_path):
    pytest.importorskip("uvicorn", reason="needs starlette and uvicorn: pip install 'mpillm[serve]'")
    make_run(tmp_path / "run", make_model(max_seq_len=64), dtype="float32")
    job = run_mpi(0, ["-m", "mpillm", "bench", "serve", tmp_path / "run", "--ranks", 2, "--clients", 3, "--requests", 12,
                      "--prompt-tokens", 5, "--new-tokens", 6, "--shares", "0.5", "--json", tmp_path / "bench.json"],
                  timeout=240, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    one, whole, streamed, random = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["requests"] for row in (one, whole, streamed, random)] == [2, 12, 12, 12]
    assert random["rate"] == 0.5 * streamed["requests_per_s"] and "first_token_p99_s" not in whole
    for row in (one, whole, streamed, random):
        assert row["tokens_per_s"] == pytest.approx(6 * row["requests_per_s"])
    for row in (one, streamed, random):
        assert 0 < row["first_token_median_s"] <= row["first_token_p99_s"]


@pytest.mark.parametrize("model, names, message", [
    (dict(max_seq_len=512), None, "max_seq_len = 512: .* take 1024"),
    (dict(max_seq_len=1024), "batch-8,batch-9", "batch-9 is none of batch-1, batch-8")])
def test_bench_generate_refuses(model, names, message):
    with pytest.raises(ConfigError, match=message):
        generation.make_workloads(257, model["max_seq_len"], 4, names)


def test_generators_that_give_other_tokens_are_not_compared():
    ours, theirs = ({"mixed": {"first": tokens}} for tokens in ([1, 2, 3], [1, 2, 4]))
    generation.check_same_tokens({"mpillm": ours, "peer": ours})
    with pytest.raises(NumbersError, match="peer, mixed: only 67% of the first tokens"):
        generation.check_same_tokens({"mpillm": ours, "peer": theirs})


def test_what_transformers_does_not_compute_is_refused(tmp_path, monkeypatch):
    for values, message in (({"model.norm": "layer"}, "nearest is .*: model.norm = .*leave out --transformers"),
                            ({"train.optimizer": "sgd"}, "this peer cannot do train.optimizer = sgd")):
        case, = training.make_cases(Config.from_dict(TINY, values), ["single"], 1)
        with pytest.raises(ConfigError, match=message):
            training.transformers_programs(case, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="--transformers needs the transformers package .*pip install transformers"):
        training.transformers_programs(case, tmp_path)


@pytest.mark.slow
def test_bench_train_ends_with_the_failure_of_its_job(tiny, tmp_path):
    training.write_random_tokens(tmp_path / "short.h5", 29, 5)
    job = run_mpi(0, ["-m", "mpillm", "bench", "train", tiny, "--layouts", "single", "--data.path", "short.h5"],
                  cwd=tmp_path)
    assert job.returncode == 1
    assert "left with code 74" in job.stderr and "its train split has 5 tokens" in job.stderr


@pytest.mark.parametrize("layouts, values, message", [
    ("sideways", {}, "--layouts sideways"),
    ("data=1", {}, "at least 2 ranks"),
    ("single=2", {}, "--layouts single=2"),
    ("tensor=5", {}, "layout.tensor=5 splits model.num_heads=4"),
    ("tensor=4", {}, "num_kv_heads, ffn_size = 4, 2, 40"),
    ("pipeline=3", {}, "at least as many"),
    ("data", {"train.device": "cuda"}, "train.device = cuda"),
    ("single", {"model.tie_embeddings": True, "train.optimizer": "sgd"}, "train.optimizer = sgd.*model.tie_embeddings"),
])
def test_what_cannot_be_measured_is_refused_before_any_job(tmp_path, layouts, values, message):
    path = tmp_path / "config.toml"
    path.write_text(Config.from_dict(TINY, values).to_toml())
    result = CliRunner().invoke(command, ["train", str(path), "--peers", "--ranks", "2", "--layouts", layouts])
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


def test_a_case_keeps_what_the_configuration_says_of_its_axis_only():
    values = {"layout.pipeline": 3, "layout.stage_cuts": [1, 2], "layout.schedule": "gpipe", "layout.zero": 0}
    config = Config.from_dict(TINY, values)
    cases = training.make_cases(config, ["single", "data", "pipeline=3", "data=2", "single"], 2)
    assert [case.layout for case in cases] == ["single", "data=2", "pipeline=3"]
    assert [case.config.layout.sizes() for case in cases] == [
        {"data": 1, "pipeline": 1, "tensor": 1}, {"data": 2, "pipeline": 1, "tensor": 1},
        {"data": 1, "pipeline": 3, "tensor": 1}]
    assert [case.config.layout.stage_cuts for case in cases] == [(), (), (1, 2)]
    assert [case.config.layout.schedule for case in cases] == ["1f1b", "1f1b", "gpipe"]
    assert {case.config.layout.zero for case in cases} == {0}


def test_random_tokens_need_a_vocabulary(tmp_path):
    config = Config.from_dict(TINY | {"model": {**TINY["model"], "vocab_size": None}})
    with pytest.raises(ConfigError, match="set model.vocab_size"):
        training.prepare(config, 3, tmp_path)


def test_bench_train_under_mpirun_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    result = CliRunner().invoke(command, ["train", str(tiny)])
    assert isinstance(result.exception, LaunchError) and "without mpirun" in str(result.exception)


@pytest.mark.launches
def test_collectives_side_by_side(tmp_path):
    """A row for every operation, size and implementation, in the form that the documentation promises; a picture."""
    args = ["bench", "collectives", "--peers", "--ops", "allreduce,alltoall", "--sizes", "64,65536", "--json",
            tmp_path / "rows.json", "--figure", tmp_path / "figure.png"]
    job = run_mpi(2, ["-m", "mpillm", *args], timeout=120)
    assert job.returncode == 0, job.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    found = {(row["op"], row["bytes"], row["impl"]) for row in rows}
    assert found == {(op, size, impl) for size in (64, 65536) for op, impls in (
        ("allreduce", ("mpi", "gloo")), ("alltoall", ("mpi",))
    ) for impl in ("mpillm", "mpillm-copy", "mpillm-bound", "mpillm-bound-window", *impls)}
    for row in rows:
        assert row["in_window"] == (row["impl"] in ("mpillm", "mpillm-bound-window"))
        assert row["ranks"] == 2 and row["nodes"] == 1 and row["dtype"] == "float32" and row["algorithm"]
        assert 0 < row["median_s"] <= row["p99_s"]
        assert row["bandwidth_bytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.launches
def test_collectives_by_a_machine_s_table_beside_all_candidates(tmp_path):
    """Of uneven blocks, in place, of which MPICH 5.0.2 aborts; the table is obeyed, though nobody measured it."""
    table = [("reduce_scatter", "*", "float32", 100, "direct"), ("reduce_scatter", "*", "float32", None, "window"),
             ("reduce_scatter", "*", "*", 100, "mpi", "window"), ("reduce_scatter", "*", "*", None, "window", "window")]
    machine = replace(next(iter(PRESETS.values())), num_ranks=2, table=tuple(table))
    machine.save(tmp_path / "machine.json")
    args = ["--ops", "reduce_scatter", "--sizes", "12,1482908", "--json", tmp_path / "rows.json", "--all"]
    job = run_mpi(2, ["-m", "mpillm", "bench", "collectives", *args, "--machine", tmp_path / "machine.json"])
    assert job.returncode == 0 and "0.95 x as fast as the best candidate: " in job.stdout, job.stderr + job.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    for in_window, impls, algorithms, names in (
            (False, ("mpillm-copy", "mpillm-bound"), {12: "direct", 1482908: "window"}, ["mpi", "window", "ring"]),
            (True, ("mpillm", "mpillm-bound-window"), {12: "mpi", 1482908: "window"}, ["mpi", "window"])):
        own = [row for row in rows if row["in_window"] == in_window]
        for impl in impls:
            assert {row["bytes"]: row["algorithm"] for row in own if row["impl"] == impl} == algorithms
        for size in algorithms:  # for two ranks all schedules come to a ring
            assert [row["algorithm"] for row in own if (row["impl"], row["bytes"]) == ("candidate", size)] == names


def test_a_choice_far_from_the_best_is_named():
    def row(impl, algorithm, n_bytes, median_us, op="bcast", in_window=False):
        return {"op": op, "impl": impl, "algorithm": algorithm, "bytes": n_bytes, "median_s": median_us * 1e-6,
                "in_window": in_window}

    rows = [row("mpillm-copy", "ring", 8, 14.0), row("candidate", "direct", 8, 13.5), row("mpi", "mpi", 8, 1.0),
            row("mpillm-copy", "ring", 64, 1040.0), row("candidate", "direct", 64, 1000.0),
            row("mpillm-copy", "ring", 512, 1060.0), row("candidate", "mpi", 512, 1000.0), row("gloo", "gloo", 512, 1.0),
            row("mpillm-bound", "ring", 512, 2000.0), row("candidate", "direct", 512, 1.0, op="allreduce"),
            row("mpillm", "mpi", 512, 1200.0, in_window=True), row("candidate", "mpi", 512, 900.0, in_window=True),
            row("mpillm", "mpi", 64, 12.0, in_window=True), row("candidate", "window", 64, 3.0, in_window=True)]
    assert behind_best(rows).splitlines() == ["choice at least 0.95 x as fast as the best candidate: 3 of 5",
                                              "bcast of 512 bytes: ring 1060.0 us, mpi 1000.0 us",
                                              "bcast of 64 bytes in a window: mpi 12.0 us, window 3.0 us"]


def test_a_rank_that_fails_beside_gloo_ends_the_job():
    """Though another waits for it in MPI."""
    job = run_mpi(2, ["-c", """
from mpillm.bench.collectives import gloo
from mpillm.comm.world import comm_world, launch
def main():
    with gloo(comm_world()):
        assert comm_world().rank == 0, "of rank 1"
        comm_world().recv(source=1)
launch(main)
"""], timeout=20)
    assert job.returncode and "of rank 1" in job.stderr and "TIME" not in job.stderr, job.stderr


@pytest.mark.parametrize(("ranks", "args", "said"), [
    (0, [], "nobody to talk to"), (2, ["--ops", "sort"], "sort is none of allreduce"),
    (2, ["--sizes", "4,big"], "give numbers of bytes"), (2, ["--json", "/nowhere/x.json"], "no directory"),
    (2, ["--machine", next(iter(PRESETS))], "for no ranks, this launch has 2"),
])
def test_collectives_refuse_what_makes_no_sense(ranks, args, said):
    job = run_mpi(ranks, ["-m", "mpillm", "bench", "collectives", *args])
    assert job.returncode and said in job.stderr and "Traceback" not in job.stderr, job.stderr

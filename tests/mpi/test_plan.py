"""A run obeys the algorithms of its plan, and its numbers are those of the reference."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_all
from mpi4py import MPI
from tiny import (
    FAMILIES,
    GROUPED,
    KNOWN,
    LAYOUTS,
    asked_at_random,
    configure,
    one_for_every_degrees,
    reference_steps,
    tiny,
    train,
    with_layout,
    write_token_file,
)

from mpillm import comm as mpi
from mpillm.cli import plan as cli_plan
from mpillm.comm import probe, shared
from mpillm.comm.group import Group, as_group
from mpillm.comm.probe import measure_machine
from mpillm.comm.scheduled import Scheduled, Schedules
from mpillm.comm.tables import only
from mpillm.config import AXES
from mpillm.errors import ConfigError, ScheduleError
from mpillm.machine import Level, Machine
from mpillm.plan import DEFAULT_TABLE, DecisionTable, Plan
from mpillm.planner.search import make_plan, price_layout
from mpillm.planner.volume import step_volume
from mpillm.report.planned import compare_volume
from mpillm.report.records import read_trace
from mpillm.schedules.blocks import all_bounds
from mpillm.train import choose
from mpillm.train.engine import Engine
from mpillm.train.run import Run
from mpillm.verify.compare import compare_layout

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("algorithm", ["ring", "direct", "window"])
def test_training_by_every_kind_of_algorithm(comm, algorithm, monkeypatch):
    config, taken = tiny({"model.num_layers": 4}), set()
    transport = Group.transport

    def noting(*args):
        found = transport(*args)
        taken.add(type(found).__name__)
        return found

    monkeypatch.setattr(Group, "transport", noting)
    _, expected = reference_steps(config, 1, comm)
    losses = comm.bcast([step[0] for step in expected] if comm.rank == 0 else None)
    for layout in one_for_every_degrees(config, comm.size):
        engine = Engine(layout, comm, table=only(algorithm))
        found = [loss for loss, _ in train(engine, 1)]
        engine.free()
        assert_all(torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-10, atol=0), found, comm)
    wanted = "Staging" if algorithm == "window" else Scheduled.__name__
    assert_all(comm.size == 1 or wanted in taken, taken, comm)


@pytest.mark.parametrize("seeds", [range(6), range(6, 12)], ids=str)
def test_what_auto_is_filled_with_runs_and_agrees(comm, seeds):
    """The same random choices of keys that the plain tests resolve by the hundred."""
    ran = 0
    for config in (asked_at_random(seed, comm.size) for seed in seeds):
        try:
            resolved = config.resolve(comm.size)
        except (ConfigError, ScheduleError):
            continue
        if resolved.train.numerics == "fast":  # test_exact has the others
            batches, expected = reference_steps(resolved, 1, comm)
            difference = compare_layout(resolved, comm, batches, expected)
            assert_all(difference.first is None, f"{resolved.layout}: {difference}", comm)
            ran += 1
    assert_all(ran > 1, ran, comm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["reduce_scatter+allgather", "padded:64", "pieces:48"])
def test_a_repaired_choice_is_run_and_gives_the_same_numbers(comm, algorithm, dtype, monkeypatch):
    plain = (("allreduce", "*", "*", None, "ring"), ("bcast", "*", "*", None, "binomial"),
             ("reduce_scatter", "*", "*", None, "direct"), ("allgather", "*", "*", None, "mpi"))
    repaired = [("allreduce", "*", "*", 47, algorithm), ("allreduce", "*", "*", 64, "ring"),
                ("allreduce", "*", "*", None, algorithm)]
    if "+" not in algorithm:
        repaired += [("bcast", "*", "*", 47, algorithm), ("bcast", "*", "*", 64, "binomial"),
                     ("bcast", "*", "*", None, algorithm)]
    group = as_group(comm)
    asked, usual = group.with_table(DecisionTable(tuple(repaired) + plain[2:])), group.with_table(DecisionTable(plain))
    lengths = []
    make = Schedules.make

    def noting(self, schedule, carries, sizes, *args, **options):
        lengths.append(sum(sizes))
        return make(self, schedule, carries, sizes, *args, **options)

    monkeypatch.setattr(Schedules, "make", noting)
    items = 64 // dtype.itemsize
    for n in (0, 1, 5, items, 40):
        x = torch.arange(n).add(comm.rank).to(dtype)
        expected = sum(torch.arange(n).add(rank).to(dtype) for rank in range(comm.size))
        for op in ("sum", "max"):
            found, other = (mpi.allreduce(x, one, op) for one in (asked, usual))
            assert_all(torch.equal(found, other) and (op == "max" or torch.equal(found, expected)), found, comm)
        assert_all(torch.equal(mpi.allreduce(x.clone(), asked, out=x), expected), x, comm)
        assert_all(torch.equal(mpi.bcast(torch.full((n,), comm.rank + 3).to(dtype), asked, root=comm.size - 1),
                               torch.full((n,), comm.size + 2).to(dtype)), n, comm)
    lengths.clear()
    n = 13 if algorithm == "pieces:48" else 5
    mpi.allreduce(torch.ones(n, dtype=dtype), asked)
    count = -(-n // (48 // dtype.itemsize))
    wanted = {"reduce_scatter+allgather": [n], "padded:64": [items],
              "pieces:48": [high - low for low, high in all_bounds(n, count)]}[algorithm]
    assert_all(comm.size == 1 or lengths == wanted, lengths, comm)


def test_training_by_a_repaired_table(comm):
    config = tiny({"model.num_layers": 4})
    rows = [("allreduce", "*", "*", 999, "reduce_scatter+allgather"), ("allreduce", "*", "*", 2000, "pieces:5000"),
            ("allreduce", "*", "*", 5000, "ring"), ("allreduce", "*", "*", None, "pieces:5000")]
    _, expected = reference_steps(config, 1, comm)
    losses = comm.bcast([step[0] for step in expected] if comm.rank == 0 else None)
    for layout in one_for_every_degrees(config, comm.size):
        engine = Engine(layout, comm, table=DecisionTable(tuple(rows)))
        found = [loss for loss, _ in train(engine, 1)]
        engine.free()
        assert_all(torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-10, atol=0), found, comm)


def test_a_machine_is_measured_planned_for_and_obeyed(comm, tmp_path):
    machine = measure_machine(as_group(comm), DEFAULT_TABLE)
    assert_all(len(set(comm.allgather(repr(machine)))) == 1, machine, comm)
    assert machine.num_ranks == comm.size and all(rate > 1e6 for _, rate in machine.matmul)
    assert machine.memory_bytes_per_s > 1e6 and set(machine.repeatability) >= {"memory", "attention", "product 256"}
    machine.save(tmp_path / f"{comm.rank}.json")
    assert Machine.load(tmp_path / f"{comm.rank}.json") == machine
    config = tiny({"model.num_layers": 4})
    config = replace(config, train=replace(config.train, microbatch=None))
    plan = make_plan(config, machine, comm.size)
    obeyed = plan.applied_to(config).resolve(comm.size)
    assert_all(all(getattr(obeyed.layout, key) == plan.layout[key] for key in ("data", "pipeline", "tensor", "schedule",
                                                                              "chunks", "zero")), obeyed.layout, comm)
    _, expected = reference_steps(obeyed, 2, comm)
    losses = comm.bcast([step[0] for step in expected] if comm.rank == 0 else None)
    engine = Engine(obeyed, comm, table=plan.table)
    found = [loss for loss, _ in train(engine, 2)]
    engine.free()
    assert_all(torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-10, atol=0), found, comm)


def test_a_machine_without_windows_is_measured(comm, monkeypatch):
    monkeypatch.setenv(shared.SWITCH, "0")
    monkeypatch.setattr(probe, "WIDTHS", (64,))
    monkeypatch.setattr(probe, "_LEVEL_BYTES", (64, 4096))
    group = Group(as_group(comm).comm.Clone())
    machine = measure_machine(group, DEFAULT_TABLE)
    group.free()
    measured = [measured for level in machine.levels for measured in level.collectives]
    assert_all(not machine.shares_memory and not any(m.in_window for m in measured) and bool(measured) == (comm.size > 1),
               machine, comm)


def test_a_schedule_that_the_plan_holds_is_run_and_agrees(comm):
    if comm.size == 1:  # which has no pipeline
        return
    config = tiny({"layout.pipeline": comm.size, "layout.data": 1, "layout.tensor": 1, "train.microbatch": 1})
    plan = make_plan(config, replace(MACHINE, levels=(Level("network", 64, 1e-5, 1e-6),)), comm.size)
    obeyed = plan.applied_to(config).resolve(comm.size)
    assert_all("\n" in plan.layout["schedule"], plan.layout, comm)
    _, expected = reference_steps(obeyed, 2, comm)
    losses = comm.bcast([step[0] for step in expected] if comm.rank == 0 else None)
    engine = Engine(obeyed, comm, table=plan.table)
    found = [loss for loss, _ in train(engine, 2)]
    engine.free()
    assert_all(engine.schedule.to_text() == plan.layout["schedule"], engine.schedule, comm)
    assert_all(torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-10, atol=0), found, comm)


def test_a_plan_changed_by_hand_changes_what_runs(comm):
    config = tiny({"model.num_layers": 4})
    free = config.with_values({"layout.pipeline": comm.size, "layout.data": 1, "layout.tensor": 1})
    plan = make_plan(free, Machine.load("cpu-node"), comm.size)
    orders = []
    for schedule in ("1f1b", "zb-h1"):
        changed = replace(plan, layout={**plan.layout, "schedule": schedule, "chunks": 1, "stage_cuts": "auto"})
        engine = Engine(changed.applied_to(free).resolve(comm.size), comm)
        orders.append(engine.schedule.to_text().split("\n")[1:])
        engine.free()
    assert orders[0] != orders[1]


def test_a_job_that_comes_back_smaller_goes_on_by_the_plan_made_for_it(comm, data_path):
    if comm.size == 1:
        pytest.skip("there is no smaller job")
    free, output = tiny(configure(data_path, "run", **{"train.steps": 4})), data_path / "plan.json"
    if comm.rank == 0:
        (data_path / "free.toml").write_text(free.to_toml())
        MACHINE.save(data_path / "machine.json")
        words = [data_path / "free.toml", "--machine", data_path / "machine.json", "--ranks", comm.size, "-o", output,
                 "--tolerate", 1]
        planned = CliRunner().invoke(cli_plan.command, [*map(str, words)])
        assert planned.exit_code == 0, planned.exception
    comm.Barrier()
    losses, smaller = [], comm.Split(0 if comm.rank < comm.size - 1 else MPI.UNDEFINED, comm.rank)
    for part, steps in ((comm, 2), (smaller, 4)):
        if part == MPI.COMM_NULL:
            continue
        plan = Plan.load(output, part.size)
        trainer = Run(free, part, plan=plan)
        assert plan.num_ranks == part.size and trainer.step_number == len(losses)
        while trainer.step_number < steps:
            losses.append(trainer.step()["loss"])
        trainer.save()
        trainer.free()
    if smaller != MPI.COMM_NULL:
        smaller.Free()
    whole = Run(tiny(configure(data_path, "whole", **{"train.steps": 4, **LAYOUTS[comm.size]})), comm)
    expected = [whole.step()["loss"] for _ in range(4)]
    whole.free()
    assert_all(np.allclose(losses, expected[:len(losses)], rtol=1e-10, atol=0), f"{losses} {expected}", comm)


CPU = torch.device("cpu")
MACHINE = Machine("made up", "a test", (Level("node", 64, 1e-6, 1e-9),), ((32, 1e9), (128, 2e9)), 1e9, 1e10, 1e-5)


def test_an_open_layout_is_measured_once_planned_tried_and_kept(comm, comm_path, monkeypatch):
    measured = []

    def measure(group, **_):
        measured.append(group)
        return replace(MACHINE, num_ranks=comm.size)

    monkeypatch.setattr(choose, "measure_machine", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(comm_path / "cache"))
    if comm.rank == 0:
        write_token_file(comm_path / "tokens.h5")
    comm.Barrier()
    config = tiny({"model.num_layers": 4, "train.run_dir": str(comm_path / "run"), "train.microbatch": 1,
                   "data.path": str(comm_path / "tokens.h5"), "train.numerics": "fast"})
    assert choose.is_open(config) and not choose.is_open(config.with_values({"layout.data": 1}))
    plan, origin = choose.choose_plan(config, comm, probe_top=2)
    assert_all(len(set(comm.allgather(repr(plan)))) == 1, plan, comm)
    assert_all(len(measured) == 1 and "measured now" in origin, origin, comm)
    best = min(plan.tried, key=lambda one: one["measured_s"])
    assert_all(comm.size == 1 or len(plan.tried) == 2 and plan.layout == best["layout"], plan.tried, comm)
    monkeypatch.setattr(probe, "_speeds", lambda *_: (2.0,) * (comm.size - 1) + (1.0,))  # a rank is slow from now on
    again, origin = choose.choose_plan(config, comm)
    assert_all(len(measured) == 1 and "measured before" in origin and not again.tried, origin, comm)
    machine, _ = choose.known_machine(comm, CPU, torch.float64)
    assert_all(machine.speeds[-1] == 1.0 and machine.memory_bytes != MACHINE.memory_bytes, machine, comm)
    if comm.size > 1:
        is_uneven = len(set(np.diff([0, *again.layout["stage_cuts"], 4]))) > 1
        assert_all("shares" in again.layout or is_uneven, again.layout, comm)
    run = Run(config, comm, plan=plan)  # whose directory now has the plan
    assert_all(run.config.layout.sizes() == {axis: plan.layout[axis] for axis in AXES}, run.config.layout, comm)
    run.free()
    kept, origin = choose.choose_plan(config, comm)
    assert_all(kept == plan and str(comm_path / "run") in origin, origin, comm)
    other, origin = choose.choose_plan(config.with_values({"model.num_layers": 5}), comm)
    assert_all(other.model["num_layers"] == 5 and "model.num_layers = 5 (the plan: 4)" in origin, origin, comm)
    with pytest.raises(ConfigError, match="fits"):
        monkeypatch.setattr(choose, "known_machine", lambda *_: (replace(MACHINE, memory_bytes=1e3), ""))
        choose.choose_plan(config.with_values({"model.num_layers": 6}), comm)


def test_a_machine_measured_beside_a_slow_rank_is_not_remembered(comm, comm_path, monkeypatch):
    unequal = replace(MACHINE, num_ranks=comm.size, speeds=(1.0,) * (comm.size - 1) + (0.5,))
    found = iter([unequal, MACHINE])
    monkeypatch.setattr(choose, "measure_machine", lambda *_, **__: next(found))
    monkeypatch.setenv("XDG_CACHE_HOME", str(comm_path))
    for machine in (unequal, MACHINE):
        assert_all(choose.known_machine(comm, CPU, torch.float32)[0] == machine, "not measured", comm)


def test_a_machine_of_ranks_with_and_without_gpus_is_refused(comm):
    """On every rank, also where only one has a GPU."""
    if comm.size > 1:
        with pytest.raises(ConfigError, match="some ranks see a GPU and others do not.*set it to cpu"):
            measure_machine(as_group(comm), DEFAULT_TABLE, torch.device("cuda", 0) if comm.rank == comm.size - 1 else CPU)


def test_a_plan_changed_by_hand_changes_messages_and_keeps_their_bytes(comm):
    config = tiny({"model.num_layers": 4, "layout.pipeline": comm.size, "layout.data": 1, "layout.tensor": 1})
    free = replace(config, train=replace(config.train, microbatch=None))
    plan = make_plan(free, Machine.load("cpu-node"), comm.size)
    counted = []
    for microbatch in (1, 3):
        layout = {**plan.layout, "schedule": "1f1b", "chunks": 1, "stage_cuts": "auto", "microbatch": microbatch}
        engine = Engine(replace(plan, layout=layout).applied_to(free).resolve(comm.size), comm)
        train(engine, 1)
        recorder = engine.mesh.recorder
        counted.append((recorder.calls["pipeline", "send"], recorder.sent_bytes["pipeline", "send"]))
        engine.free()
    ends = (comm.rank > 0) + (comm.rank < comm.size - 1)  # neighbours, each sent a message a microbatch
    whole = 9 * 12 * 40 * 8  # sequences, tokens, width, float64
    assert_all(counted == [(9 * ends, whole * ends), (3 * ends, whole * ends)], counted, comm)


def test_layers_mixed_by_a_tight_plan_recompute_as_it_says_and_agree(comm):
    """Half of the memory between the leanest and the fastest way: some layers recompute, in float64 to 1e-10."""
    config = tiny({"layout.pipeline": comm.size, "layout.data": 1, "layout.schedule": "1f1b", "layout.tensor": 1,
                   "layout.chunks": 1})
    costs = [price_layout(config.with_values({"layout.recompute": way}), MACHINE, comm.size).predicted
             ["memory_bytes_per_rank"] for way in ("none", "full")]
    plan = make_plan(config, replace(MACHINE, memory_bytes=sum(costs) / 2), comm.size)
    modes = plan.layout["recompute"]
    assert len(modes) == 7 and len(set(modes)) > 1 and "none" in modes, modes
    obeyed = plan.applied_to(config).resolve(comm.size)
    engine = Engine(obeyed, comm, table=plan.table)
    own = [(int(layer.ffn.down.weight.shard.name.split(".")[1]), layer) for stage in engine.stages
           for layer in stage.module.layers]
    found = {i: "full" if layer.is_recomputed else "selective" if layer.attention.is_recomputed else "none"
             for i, layer in own}
    engine.free()
    assert_all(found == {i: modes[i] for i in found}, f"{found} {modes}", comm)
    difference = compare_layout(obeyed, comm, *reference_steps(obeyed, 1, comm))
    assert_all(difference.first is None, str(difference), comm)


EXACT = {"train.numerics": "exact", "train.dtype": "float32"}
SENDING = {
    **KNOWN, "exact": EXACT, "masked words, exact": {**KNOWN["bert"], **EXACT},
    "tied": {"train.dtype": "bfloat16", "model.tie_embeddings": True, "layout.bucket_cuts": [0, 1, 2], **GROUPED["shared"]},
    "buckets": {"layout.bucket_cuts": [1, 2, 3]},
    "norms": {"model.qk_norm": "whole", "model.norm_placement": "output", "layout.bucket_cuts": [2]},
    "one key": {"model.qk_norm": "whole", "model.norm_placement": "output", **GROUPED["shared"]},
    "a pooler": FAMILIES["a pooler"],
    **{name: {**model, "layout.bucket_cuts": [1, 3]} for name, model in FAMILIES.items() if "train.freeze" in model},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SENDING)
def test_planned_volume_is_what_is_sent(comm, name):
    config = tiny({"model.num_layers": 4, **SENDING[name]})
    for layout in one_for_every_degrees(config, comm.size):
        layout = with_layout(layout, recompute=("full", "none", "selective", "full"))
        engine = Engine(layout, comm)
        is_one_copy = layout.layout.zero == 1 and engine.mesh.group("data").node is not None
        train(engine, 1)
        counted = sum(comm.allgather(engine.mesh.recorder.sent_bytes), Counter())
        engine.free()
        rows = compare_volume(step_volume(layout, is_one_copy), counted)
        wrong = [row for row in rows if row["planned_bytes"] != row["counted_bytes"]]
        assert_all(not wrong and (comm.size == 1 or rows), f"{layout.layout}: {wrong}", comm)


def test_a_traced_run_counts_what_its_plan_said(comm, data_path):
    config = tiny({"model.num_layers": 4, "train.run_dir": str(data_path / "run"), "train.steps": 2,
                   "train.trace": True, "data.path": str(data_path / "tokens.h5"), "train.eval_every": 1,
                   "layout.data": 2 if comm.size % 2 == 0 else 1, "layout.pipeline": 1})
    machine = replace(MACHINE, shares_memory=True)
    run = Run(config, comm, plan=price_layout(config, machine, comm.size))
    list(run)
    run.free()
    [launch] = read_trace(data_path / "run" / "trace")
    planned = {(one["axis"], one["operation"]): one["bytes"] for one in run.plan.predicted["volume"]}
    is_same = launch.sent == {1: planned, 2: planned}
    assert_all(is_same and (planned or comm.size == 1), f"{launch.sent} {planned}", comm)

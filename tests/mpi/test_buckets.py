"""Gradient buckets: cut as the plan says, reduced as soon as backward has completed them; the numbers stay the same.

Windows are switched off, so that the data axis goes by messages, as it does over nodes.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, configure, everything, one_for_every_degrees, reference_steps, tiny, train, with_layout

from mpillm.comm import shared
from mpillm.comm.executor import Executor
from mpillm.comm.tables import only
from mpillm.machine import Machine
from mpillm.planner.keys import describe
from mpillm.planner.search import price_layout
from mpillm.schedules.blocks import align
from mpillm.train.engine import Engine
from mpillm.train.flat_buffers import Bucket
from mpillm.train.run import Run
from mpillm.verify.compare import compare_layout

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
FOUR = {"model.num_layers": 4}
CUTS = {"one": (), "two": (3,), "ends": (0, 4), "all": (0, 1, 2, 3, 4)}
two_and_four = pytest.mark.parametrize("comm", [2, 4], ids="{}-ranks".format, indirect=True)


@pytest.fixture(autouse=True)
def by_messages(monkeypatch):
    monkeypatch.setenv(shared.SWITCH, "0")


@pytest.fixture
def starts(monkeypatch):
    """What starts in which kind of span: a list of (bucket, kinds of the spans that are open)."""
    found, right = [], Bucket.start
    monkeypatch.setattr(Bucket, "start", lambda self: (
        found.append((self, {kind for kind, _ in self.mesh.recorder._open})), right(self))[1])
    return found


@pytest.mark.parametrize("zero", [0, 1])
def test_from_the_second_step_on_schedules_are_bound_already(comm, zero, monkeypatch):
    """Those of weights and gradients; of what else is summed each has its own memory."""
    made, make = [], Executor.__init__
    monkeypatch.setattr(Executor, "__init__", lambda self, schedule, *others, **options: (
        made.append(schedule.op), make(self, schedule, *others, **options))[1])
    config = tiny({**FOUR, "layout.data": comm.size, "layout.zero": zero}).resolve(comm.size, num_nodes=comm.size)
    engine = Engine(config, comm, table=only("ring"))
    for step in (1, 2):
        made.clear()
        train(engine, 1, step)
        found = {op: made.count(op) for op in ("reduce_scatter", "allgather")}
        wanted = len(engine.gradients.buckets) if step == 1 and comm.size > 1 else 0
        assert_all(set(found.values()) == {wanted}, (step, found), comm)
    engine.free()


@two_and_four
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_every_cut_on_every_degree_gives_the_reference(comm, tied):
    config = tiny({**FOUR, "model.tie_embeddings": tied})
    batches, expected = reference_steps(config, 1, comm)
    layouts = one_for_every_degrees(config, comm.size)
    data = [found for found in layouts if found.layout.data > 1]
    assert len(data) == {2: 1, 4: 3}[comm.size]
    for i, cuts in enumerate((CUTS["all"], CUTS["two"], CUTS["ends"])):
        for found in data:
            layout = with_layout(found, bucket_cuts=cuts, zero=i % 2).resolve(comm.size)
            difference = compare_layout(layout, comm, batches, expected)
            assert_all(difference.first is None, f"{cuts} {describe(layout.layout)}: {difference}", comm)


@two_and_four
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "interleaved"])
def test_buckets_start_within_the_last_actions_in_one_order_whatever_the_shares(comm, schedule, starts):
    """Also where a data rank has one microbatch and the other many."""
    pipeline = comm.size // 2
    config = tiny({**FOUR, "layout.data": 2, "layout.pipeline": pipeline, "layout.shares": [2, 7],
                   "layout.bucket_cuts": list(CUTS["all"]), "train.microbatch": 1,
                   "layout.schedule": schedule if pipeline > 1 else "1f1b"}, comm.size)
    batches, expected = reference_steps(config, 1, comm)
    difference = compare_layout(config, comm, batches, expected)
    assert_all(difference.first is None, difference, comm)
    actions = {"B"} if schedule[:2] != "zb" or pipeline == 1 else {"B", "W"}
    assert_all(len(starts) == {1: 6, 2: 3}[pipeline] and all(kinds & actions for _, kinds in starts), starts, comm)
    sizes = comm.allgather([bucket.size for bucket, _ in starts])
    assert_all(sizes[:pipeline] == sizes[pipeline:], sizes, comm)  # ranks of one stage, data ranks 0 and 1


@pytest.mark.parametrize("comm", [2], ids="{}-ranks".format, indirect=True)
def test_the_first_bucket_starts_before_backward_has_come_to_the_others(comm, starts, monkeypatch):
    engine = Engine(tiny({**FOUR, "layout.data": 2}).resolve(2, num_nodes=2), comm)
    assert len(engine.gradients.buckets) == 6  # without a plan one a layer, and the ends
    right, zeros = Bucket.start, []
    first = engine.microbatches[:1]
    engine.microbatches, engine.schedule = first, engine._schedule(1)
    monkeypatch.setattr(Bucket, "start", lambda self: (
        zeros.append([not bucket.grad.any() for bucket in engine.gradients.buckets]), right(self))[1])
    train(engine, 1)
    own = engine.gradients.buckets
    engine.free()
    wanted = [[later > i for later in range(6)] for i in range(6)]
    assert_all([bucket for bucket, _ in starts] == own and zeros[:5] == wanted[:5], zeros, comm)


@two_and_four
@pytest.mark.parametrize("algorithm", ["mpi", "ring"])
def test_cuts_changed_by_hand_change_calls_and_bytes(comm, algorithm):
    """One reduce-scatter a bucket, of its size padded to 16 elements a data rank; and the same bits in every run."""
    config = tiny({**FOUR, "layout.data": comm.size, "layout.pipeline": 1, "layout.tensor": 1, "train.microbatch": 1})
    plan = price_layout(config, Machine.load("cpu-node"), comm.size)
    for cuts in CUTS.values():
        layout = {**plan.layout, "bucket_cuts": list(cuts)}
        obeyed = replace(plan, layout=layout).applied_to(config).resolve(comm.size)
        engines = [Engine(obeyed, comm, table=only(algorithm)) for _ in range(2)]
        histories = [train(engine, 2) for engine in engines]
        recorder = engines[0].mesh.recorder
        table, layer = 257 * 40, [40 * 40] * 4 + [54 * 40] * 3 + [40] * 2
        buckets = {}
        for place, sizes in [(-1, [table]), *((i, layer) for i in range(4)), (4, [40, table])]:
            buckets.setdefault(sum(cut <= place for cut in cuts), []).extend(sizes)
        padded = [align(sum(align(n, 16) for n in sizes), 16 * comm.size) for sizes in buckets.values()]
        wanted = 2 * len(buckets), 2 * 8 * sum(n - n // comm.size for n in padded)
        key = "data", "reduce_scatter"
        found = recorder.calls[key], recorder.sent_bytes[key]
        equal = all(torch.equal(values, engines[1].weight_ranges()[name][i][1])
                    for name, ranges in engines[0].weight_ranges().items() for i, (_, values) in enumerate(ranges))
        for engine in engines:
            engine.free()
        assert_all(found == wanted and equal and histories[0] == histories[1], f"{cuts}: {found} {wanted}", comm)


@pytest.mark.parametrize("comm", [2, 4], ids="{}-ranks".format, indirect=True)
def test_a_checkpoint_knows_nothing_of_buckets(comm, data_path):
    def run(name, steps, cuts):
        config = tiny(configure(data_path, name, **LAYOUTS[comm.size], **{"layout.bucket_cuts": cuts}))
        trainer = Run(config, comm)
        losses = [trainer.step()["loss"] for _ in range(steps - trainer.step_number)]
        trainer.save()
        trainer.free()
        return losses

    whole = run("whole", 6, [])
    found = run("moved", 3, [0, 2]) + run("moved", 6, [1, 4])
    left, right = everything(data_path, "whole"), everything(data_path, "moved")
    close = all(np.allclose(left[key], right[key], rtol=1e-10, atol=1e-13) for key in left)
    assert_all(np.allclose(found, whole, rtol=1e-10, atol=0) and left.keys() == right.keys() and close,
               f"{found} {whole}", comm)


@pytest.mark.parametrize("comm", [2], ids="{}-ranks".format, indirect=True)
def test_the_trace_shows_reductions_on_their_way(comm, comm_path):
    engine = Engine(tiny({**FOUR, "layout.data": 2}).resolve(2, num_nodes=2), comm, comm_path)
    engine.trace.begin_step(1)
    train(engine, 1)
    engine.trace.end_step()
    engine.free()
    lines = (comm_path / f"rank-{comm.rank:05d}.jsonl").read_text().splitlines()[1:]
    spans = [record for record in map(json.loads, lines) if "kind" in record]
    names = [span["name"] for span in spans if span["kind"] == "transfer"]
    last = max(span["stop_s"] for span in spans if span["kind"] == "B")
    begun = [span for span in spans if span["kind"] == "transfer" and span["start_s"] < last]
    assert_all(sorted(names) == [f"bucket {i}" for i in range(6)] and len(begun) == 6, spans, comm)

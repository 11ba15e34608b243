"""Messages handed over in memory: what arrives, in any order; slots that are lent, run out and come back."""

import pytest
import torch
from helpers import assert_all
from tiny import tiny, train, with_layout

from mpillm import comm as mpi
from mpillm.comm import handover, shared
from mpillm.comm.group import Group
from mpillm.schedules.pipeline import SCHEDULES
from mpillm.train.engine import Engine

pytestmark = [pytest.mark.mpi, pytest.mark.parts]
SLOTS, ITEMS = 3, 33


@pytest.fixture
def group(comm, monkeypatch):
    """A group that hands everything over up to ITEMS float64, or None for one rank alone."""
    if comm.size == 1:
        return None
    monkeypatch.setattr(handover, "LEAST_BYTES", 1)
    group = Group(comm.Clone())
    group.open_handover(8 * ITEMS, SLOTS)
    return group


def values(rank, tag, dtype=torch.float64, n=ITEMS):
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * rank + tag), dtype=torch.float64).to(dtype)


def is_in_slot(group, x, source):
    memory, _ = group.handover._neighbours[source]
    low = torch.from_numpy(memory).data_ptr()
    return low <= x.data_ptr() < low + len(memory)


def test_any_order_any_type_and_more_messages_than_slots(comm, group):
    """Both ways round at once: the first SLOTS tensors sent lie in slots, the others came as messages."""
    if group is None:
        return
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    wrong = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        count, order = 2 * SLOTS, [4, 0, 5, 2, 1, 3]
        leaving = [mpi.isend(values(comm.rank, tag, dtype), group, after, tag) for tag in range(count)]
        kept = {tag: mpi.irecv(torch.Size([3, 11]), torch.empty(0, dtype=dtype), group, before, tag).wait()
                for tag in order}
        wrong += [(dtype, tag) for tag, x in kept.items() if not torch.equal(x.view(-1), values(before, tag, dtype))]
        wrong += [(dtype, tag, "place") for tag, x in kept.items() if is_in_slot(group, x, before) != (tag < SLOTS)]
        for pending in leaving:
            pending.wait()
        del kept
        group.handover._give_back()
        comm.Barrier()
    wrong += [key for key, count in group.recorder.calls.items() if count != 4 * 2 * SLOTS]
    large = [mpi.isend(values(comm.rank, 1, n=n), group, after, n) for n in (ITEMS + 8, 0)]  # neither fits a slot
    for n in (0, ITEMS + 8):
        got = mpi.irecv(torch.Size([n]), torch.empty(0, dtype=torch.float64), group, before, n).wait()
        wrong += [] if torch.equal(got, values(before, 1, n=n)) else [n]
    for pending in large:
        pending.wait()
    assert_all(not wrong, wrong, comm)
    group.free()


def test_slots_without_memory_are_not_used(comm, group, monkeypatch):
    """Others have taken what is left of the shared memory: the second slot cannot be set aside."""
    if group is None:
        return
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    room = iter([True, False, False])
    monkeypatch.setattr(handover, "set_aside", lambda memory: next(room))
    leaving = [mpi.isend(values(comm.rank, tag), group, after, tag) for tag in range(3)]
    like = torch.empty(0, dtype=torch.float64)
    arrived = [mpi.irecv(torch.Size([ITEMS]), like, group, before, tag).wait() for tag in range(3)]
    places = [is_in_slot(group, x, before) for x in arrived]
    ok = all(torch.equal(x, values(before, tag)) for tag, x in enumerate(arrived)) and places == [True, False, False]
    for pending in leaving:
        pending.wait()
    assert_all(ok, places, comm)
    del arrived
    group.free()


def test_what_autograd_keeps_is_not_written_over(comm, group):
    """More messages than slots, each sent after the last was dropped, while only a graph refers to the first."""
    if group is None:
        return
    wrong = []
    for turn in range(3):
        weight, kept = torch.ones(ITEMS, dtype=torch.float64, requires_grad=True), None
        for tag in range(2 * SLOTS):
            if comm.rank == 0:
                mpi.isend(values(turn, tag), group, 1, tag).wait()
            elif comm.rank == 1:
                x = mpi.irecv(torch.Size([ITEMS]), weight, group, 0, tag).wait()
                wrong += [] if is_in_slot(group, x, 0) else [f"{tag}: no slot came back"]
                kept = (weight * x).sum() if kept is None else kept
                del x
                group.handover._give_back()
            comm.Barrier()
        if comm.rank == 1:
            kept.backward()
            wrong += [] if torch.equal(weight.grad, values(turn, 0)) else [f"gradient of turn {turn}"]
    assert_all(not wrong, wrong, comm)
    group.free()


def test_training_has_the_same_bits_as_by_messages(comm, monkeypatch):
    """Every schedule; with slots for all that is in flight, with one slot, and without windows."""
    if comm.size in (1, 3):
        return
    monkeypatch.setattr(handover, "LEAST_BYTES", 1)
    wrong = []
    for schedule in SCHEDULES if comm.size == 2 else ("interleaved", "zb-h2"):
        chunks = 2 if schedule == "interleaved" else 1
        config = tiny({"model.num_layers": chunks * comm.size, "train.dtype": "float32"})
        config = with_layout(config, pipeline=comm.size, schedule=schedule, chunks=chunks).resolve(comm.size)
        found = []
        for slots, switch in ((None, "1"), (1, "1"), (None, "0")):
            monkeypatch.setenv(shared.SWITCH, switch)
            engine = Engine(config, comm)
            pipeline = engine.mesh.group("pipeline")
            wrong += [] if bool(pipeline.handover._neighbours) == (switch == "1") else [(schedule, switch)]
            if slots:
                pipeline.handover.free()
                pipeline.open_handover(1 << 16, slots)
            history = train(engine, 2)
            found.append((history, [bucket.data.clone() for bucket in engine.gradients.updated]))
            engine.free()
        wrong += [schedule for other in found[1:] if other[0] != found[0][0]
                  or not all(map(torch.equal, other[1], found[0][1]))]
    assert_all(not wrong, wrong, comm)

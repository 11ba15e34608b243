"""Node-shared memory: barriers, room, one copy, groups of nodes; what a rank must not see."""

import time
from functools import partial

import pytest
import torch
from helpers import assert_all
from tiny import reference_steps, tiny, with_layout

from mpillm import comm as mpi
from mpillm.comm import group as mpillm_group
from mpillm.comm import scheduled, shared, staging, tables
from mpillm.comm.group import as_group
from mpillm.comm.levels import Levels, make_levels
from mpillm.comm.progress import finish
from mpillm.comm.tables import measure_table, only
from mpillm.errors import LaunchError
from mpillm.plan import OPERATIONS, DecisionTable
from mpillm.train.engine import Engine
from mpillm.verify import compare

pytestmark = [pytest.mark.mpi, pytest.mark.parts]


def test_nobody_passes_a_barrier_before_all_are_there(comm):
    if comm.size == 1:
        return
    node = as_group(comm).node
    x = node.one_copy(comm.size, torch.int64)
    x[comm.rank] = -1
    wrong = 0
    node.barrier()
    for turn in range(30):
        if turn % comm.size == comm.rank:
            time.sleep(0.002)
        x[comm.rank] = turn
        node.barrier()
        wrong += int((x != turn).sum())
        node.barrier()
    assert_all(wrong == 0, f"{wrong} values of another turn", comm)


def test_delays_between_ranks_change_no_bit(comm):
    """Slots and windows that are used again while another rank lags behind."""
    if comm.size == 1:
        return
    group = as_group(comm).with_table(only("window"))
    group.node.staging.slot_bytes = 512
    group.node.staging._slots.clear()
    late = torch.Generator().manual_seed(comm.rank)
    window, wrong = group.node.empty(997, torch.float32), 0
    for turn in range(60):
        parts = [torch.randn(997, generator=torch.Generator().manual_seed(100 * turn + r)) for r in range(comm.size)]
        right = mpi.allreduce(parts[comm.rank], mpi.Group(as_group(comm).comm, order="tree", table=DecisionTable(())))
        if torch.rand(1, generator=late) < 0.3:
            time.sleep(0.003)
        window.copy_(parts[comm.rank])
        wrong += not torch.equal(mpi.allreduce(parts[comm.rank], group), right)
        wrong += not torch.equal(mpi.allreduce(window, group, out=window), right)
        wrong += not torch.equal(mpi.allgather(mpi.reduce_scatter(parts[comm.rank], group), group, 0, 997), right)
    group.node.staging.slot_bytes = staging.SLOT_BYTES
    group.node.staging._slots.clear()
    assert_all(wrong == 0, f"{wrong} differ", comm)


def test_no_room_is_an_error_on_all_ranks_or_messages(comm, monkeypatch):
    if comm.size == 1:
        return
    group = as_group(comm)
    node = group.node
    monkeypatch.setattr(shared, "_room_bytes", lambda: 4096 if comm.rank == 0 else 1 << 40)
    with pytest.raises(LaunchError, match="/dev/shm"):
        node.empty(1 << 20, torch.float32)
    none = shared.make_node(group.comm) is None
    monkeypatch.undo()
    before = len(node._windows)
    monkeypatch.setattr(shared, "set_aside", lambda memory: comm.rank > 0)  # others have taken the room meanwhile
    with pytest.raises(LaunchError, match="/dev/shm"):
        node.empty(1 << 20, torch.float32)
    assert len(node._windows) == before
    none &= shared.make_node(group.comm) is None
    monkeypatch.undo()
    monkeypatch.setenv(shared.SWITCH, "0" if comm.rank == 0 else "1")  # one rank is enough
    none &= shared.make_node(group.comm) is None
    assert_all(none, "a node all the same", comm)


def test_half_a_window_s_words_are_no_place_in_it(comm):
    """Views of another type are summed as tensors of their own."""
    if comm.size == 1:
        return
    group = as_group(comm).with_table(only("window"))
    x = group.node.empty(64, torch.int64).fill_(comm.rank + 1).view(torch.int32)[10:20]
    found = mpi.allreduce(x, group, out=x)
    assert_all(found.tolist() == 5 * [comm.size * (comm.size + 1) // 2, 0], found, comm)


def test_windows_are_given_back(comm):
    if comm.size == 1:
        return
    node = as_group(comm).node
    before = len(node._windows)
    for _ in range(50):
        node.release(node.empty(1000, torch.float64))
    assert_all(len(node._windows) == before, len(node._windows), comm)


def test_no_levels_on_one_node_uneven_ones_or_nodes_of_one_rank(comm):
    nodes = {1: (0,), 2: (0, 1), 3: (0, 0, 2), 4: (0, 0, 0, 3)}.get(comm.size, (0,) * comm.size)
    levels = make_levels(as_group(comm).comm, nodes)
    assert_all(levels is None, levels, comm)


@pytest.mark.parametrize("nodes", [(0, 0, 2, 2), (0, 1, 0, 1), (0, 1, 1, 0)])
def test_lanes_between_nodes(comm, nodes):
    """On one node that is taken for two: inside by memory, between by messages; blocks of any size."""
    if comm.size != len(nodes):
        return
    levels, wrong = make_levels(as_group(comm).comm, nodes), []
    for n, ends in ((0, (0, 0, 0, 0, 0)), (7, (0, 1, 1, 5, 7)), (1001, (0, 300, 301, 640, 1001))):
        parts = [torch.randn(n, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
                 for rank in range(comm.size)]
        total, window, cuts = sum(parts), levels.node.empty(n, torch.float64), list(zip(ends, ends[1:]))
        own = slice(*cuts[comm.rank])
        for name, x in (("own", parts[comm.rank].clone()), ("window", window.copy_(parts[comm.rank]))):
            found = {op: torch.empty_like(total) for op in ("allreduce", "allgather")}
            finish(levels.allreduce(x, found["allreduce"], "sum"))
            block = torch.empty_like(total[own])
            finish(levels.reduce_scatter(x, block, cuts, "sum"))
            finish(levels.allgather(block, found["allgather"], cuts))
            found |= {"reduce_scatter": torch.cat(comm.allgather(block)), "in place": x}
            wrong += [(n, name, "x was changed")] if not torch.equal(x, parts[comm.rank]) else []
            finish(levels.reduce_scatter(x, x[own], cuts, "sum"))
            finish(levels.allgather(x[own], x, cuts))
            wrong += [(n, name, op) for op, got in found.items() if not torch.allclose(got, total, 1e-14, 1e-14)]
    levels.free()
    assert_all(not wrong, wrong, comm)


def test_data_ranks_of_two_nodes_reduce_in_two_levels(comm, monkeypatch):
    """Training over pretended nodes equals the serial reference; weights and gradients go through the levels."""
    if comm.size != 4:
        return
    monkeypatch.setattr(mpillm_group, "make_node", lambda comm: None)
    monkeypatch.setattr(scheduled, "nodes_of", lambda comm: (0, 0, 2, 2) if comm.size == 4 else (0,) * comm.size)
    used = set()
    for op in ("allreduce", "reduce_scatter", "allgather"):
        monkeypatch.setattr(Levels, op, _noted(getattr(Levels, op), used))
    config = tiny({"model.num_layers": 2, "layout.data": 4})
    batches, expected = reference_steps(config.resolve(4), 1, comm)
    engine = partial(Engine, table=DecisionTable((("allgather", "*", "*", None, "two_level"),
                                                  ("reduce_scatter", "*", "*", None, "window"))))
    monkeypatch.setattr(compare, "Engine", engine)
    found = [compare.compare_layout(with_layout(config, zero=zero).resolve(4), comm, batches, expected)
             for zero in (0, 1)]
    assert_all(not any(difference.first for difference in found), found, comm)
    assert_all(used == {"reduce_scatter", "allgather"}, used, comm)


def _noted(method, used):
    def noted(self, *arguments):
        used.add(method.__name__)
        return method(self, *arguments)
    return noted


def test_a_measured_table_is_the_same_everywhere(comm):
    if comm.size == 1:
        return
    table = measure_table(as_group(comm), ("allreduce", "alltoall"), (64, 4096), budget_s=0.001)
    assert_all(len(set(comm.allgather(table))) == 1, table, comm)
    again = DecisionTable.from_dict(table.to_dict())
    assert_all(again == table, table, comm)
    for op in OPERATIONS:  # measured for float32, obeyed for every dtype; what is not measured is as without a table
        choices = {again.choose(op, "any axis", dtype, 1 << 20) for dtype in ("float32", "bfloat16", "int64")}
        assert_all(len(choices) == 1 and (op in ("allreduce", "alltoall") or choices == {"window"}), choices, comm)


def test_the_fastest_is_taken_the_simplest_of_near_equals_also_between_measured_sizes(comm, monkeypatch):
    """With made-up times: the library is as good up to 22 kB, a ring 2 % faster than the window, which is simpler; on
    tensors in a window the library is as good up to 7 kB."""
    if comm.size == 1:
        return
    tried = _made_up(monkeypatch, {
        "mpi": lambda n, in_window: 1e-6 + n * 2e-10,
        "window": lambda n, in_window: 2.4e-6 if in_window else 3.1e-6 + n * 1e-10,
        "ring": lambda n, in_window: 0.98 * (3.1e-6 + n * 1e-10)})
    table = measure_table(as_group(comm), ("allreduce",), (1 << 10, 1 << 14, 1 << 18))
    rows = [row for row in table.rows if row[0] == "allreduce"]
    assert_all([row[4:] for row in rows] == [("mpi",), ("window",), ("mpi", "window"), ("window", "window")], table, comm)
    for (_, _, _, limit, *_), (_, _, _, last, *_), n_bytes in ((*rows[:2], 22e3), (*rows[2:], 7e3)):
        assert_all(last is None and n_bytes / 1.3 < limit < n_bytes * 1.3, rows, comm)
    assert_all(all("binomial" not in names for names, n, _ in tried if n > 1 << 10), tried, comm)
    assert_all(all(names <= {"mpi", "window"} for names, _, in_window in tried if in_window), tried, comm)


def test_what_another_size_does_faster_is_measured_before_it_is_believed(comm, monkeypatch):
    if comm.size == 1:
        return
    for slow_times, choice in ((1, "mpi"), (99, "padded:262144")):  # how often 16 KiB are measured to take longer
        left = [slow_times]

        def library_s(n, in_window, left=left):
            left[0] -= n == 1 << 14
            return 1e-3 if n == 1 << 14 and left[0] >= 0 else 1e-5 + n * 1e-10

        _made_up(monkeypatch, {"mpi": library_s})
        table = measure_table(as_group(comm), ("allreduce",), (1 << 10, 1 << 14, 1 << 18))
        assert_all(table.choose("allreduce", "data", "float32", 1 << 14) == choice, table, comm)


def test_a_table_is_measured_as_far_as_windows_have_room(comm, monkeypatch):
    if comm.size == 1:
        return
    group = as_group(comm)
    assert group.node, "made before there is no room"
    _made_up(monkeypatch, {"mpi": lambda n, in_window: n * 1e-9})
    for room_bytes, rows in ((1 << 16, [("mpi", "window")]), (0, [])):
        monkeypatch.setattr(shared, "_room_bytes", lambda room_bytes=room_bytes: room_bytes)
        table = measure_table(group, ("allreduce",), (1 << 10, 1 << 18))
        assert_all([row[4:] for row in table.rows if row[0] == "allreduce"] == [("mpi",), *rows], table, comm)


def _made_up(monkeypatch, model):
    """Let algorithms take the times of a model, those that it has not a second; return a list of what is measured: names,
    bytes, whether in a window."""
    tried = []

    def time_calls(comm, calls, budget_s, repeats=(5, 200)):
        tried.append((set(calls), *next(iter(calls.values()))))
        return {name: [_made_up_s(model, name, *where)] for name, where in calls.items()}

    monkeypatch.setattr(tables, "time_calls", time_calls)
    monkeypatch.setattr(tables, "make_call", lambda op, x, member, out: (x.nbytes, member.holds(x)))
    return tried


def _made_up_s(model, name, n_bytes, in_window):
    kind, _, other_bytes = name.partition(":")
    if kind == "padded":
        return model["mpi"](int(other_bytes), in_window)
    return model[name](n_bytes, in_window) if name in model else 1.0

"""Node-shared memory: barriers, room, one copy, groups of nodes; what a rank must not see."""

import time

import pytest
import torch
from helpers import assert_all

from mpillm import comm as mpi
from mpillm.comm import shared
from mpillm.comm.group import as_group
from mpillm.comm.levels import make_levels
from mpillm.comm.probe import measure_table, only
from mpillm.errors import LaunchError
from mpillm.plan import DecisionTable

pytestmark = pytest.mark.mpi


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
    group.node.slot_bytes = 512
    group.node._slots.clear()
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
    group.node.slot_bytes = shared.SLOT_BYTES
    group.node._slots.clear()
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
    monkeypatch.setenv(shared.SWITCH, "0" if comm.rank == 0 else "1")  # one rank is enough
    none &= shared.make_node(group.comm) is None
    assert_all(none, "a node all the same", comm)


def test_windows_are_given_back(comm):
    if comm.size == 1:
        return
    node = as_group(comm).node
    before = len(node._windows)
    for _ in range(50):
        node.release(node.empty(1000, torch.float64))
    assert_all(len(node._windows) == before, len(node._windows), comm)


def test_lanes_between_nodes(comm):
    """On one node that is taken for two: inside by memory, between by messages."""
    uneven = {1: (0,), 2: (0, 1), 3: (0, 0, 2)}
    nodes = uneven.get(comm.size) or tuple(rank % (2 if comm.size == 4 else 3) for rank in range(comm.size))
    levels = make_levels(as_group(comm).comm, nodes)
    assert_all((levels is None) == (comm.size < 4), levels, comm)
    if levels is None:
        return
    for n in (0, 1, 7, 1001):
        x = torch.arange(n, dtype=torch.float64) * (comm.rank + 1)
        out = torch.empty_like(x)
        levels.allreduce(x, out, "sum")
        right = torch.arange(n, dtype=torch.float64) * sum(range(1, comm.size + 1))
        assert_all(torch.equal(out, right), f"{n} {out}", comm)
    levels.free()


def test_a_measured_table_is_the_same_everywhere(comm):
    if comm.size == 1:
        return
    table = measure_table(as_group(comm), ("allreduce", "alltoall"), (64, 4096), budget_s=0.001)
    assert_all(len(set(comm.allgather(table))) == 1, table, comm)
    again = DecisionTable.from_dict(table.to_dict())
    assert_all(again == table and again.choose("allreduce", "any axis", "float32", 64) != "", table, comm)

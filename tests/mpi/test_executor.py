"""Schedules on real ranks: every generator, packed trees, dtypes, sizes, in place, started again, several at once."""

import itertools
import weakref

import psutil
import pytest
import torch
from helpers import assert_all

from mpillm import comm as mpi
from mpillm.comm import executor, scheduled
from mpillm.comm.collectives import allgather_blocks, reduce_scatter_blocks
from mpillm.comm.executor import Executor
from mpillm.comm.group import as_group
from mpillm.comm.scheduled import Scheduled, checked
from mpillm.comm.tables import only
from mpillm.errors import ConfigError, ShapeError
from mpillm.planner.routes import Topology
from mpillm.planner.trees import pack_trees
from mpillm.schedules.algorithm import LIBRARY, WINDOW
from mpillm.schedules.blocks import all_bounds, counts
from mpillm.schedules.check_collective import check_collective
from mpillm.schedules.generators import ALGORITHMS, make_collective

pytestmark = [pytest.mark.mpi, pytest.mark.parts]

SIZES = [0, 1, 7, 1000, 65537]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
CASES = [(op, name) for op, names in ALGORITHMS.items() for name in names]


def data(n, dtype, rank):
    """Integers of which the sums that are checked, of up to nine ranks, are exact in every dtype."""
    return torch.arange(n).mul(7 + rank).add(rank).remainder(31).to(dtype)


def run(op, algorithm, x, group, root):
    """Carry out an operation out of place, and where it has a form in place check that this gives the same."""
    if op == "reduce":
        return reduce(algorithm, x, group, root)
    if op == "allreduce":
        y = x.clone()
        mpi.allreduce(y, group, out=y)
        found = mpi.allreduce(x, group)
        return found if torch.equal(found, y) else None
    if op == "reduce_scatter":
        found = mpi.reduce_scatter(x, group)
        return found if torch.equal(found, reduce_scatter_blocks(x.clone(), group)) else None
    if op == "allgather":
        low, high = all_bounds(len(x), group.size)[group.rank]
        y = torch.zeros_like(x)
        y[low:high] = x[low:high]
        allgather_blocks(y, group)
        found = mpi.allgather(x[low:high], group, 0, len(x))
        return found if torch.equal(found, y) else None
    if op in ("bcast", "scatter", "gather"):
        return getattr(mpi, op)(x, group, root=root)
    return mpi.alltoall(x, group)


def reduce(algorithm, x, group, root):
    """By the executor itself: no function of mpillm.comm takes these schedules."""
    schedule, carries = checked("reduce", algorithm, group.size, root, group.schedules.nodes)
    cuts, out = schedule.bounds(len(x)), torch.empty_like(x if group.rank == root else x[:0])
    inputs, outputs = ({c: y[low:high] for c, (low, high) in enumerate(cuts)} for y in (x, out))
    one = Executor(schedule, carries, group.schedules.comm, [high - low for low, high in cuts], inputs,
                   outputs if group.rank == root else {}, x.dtype, is_once=True)
    one.start()
    one.wait()
    return out


def wanted(op, parts, rank, root):
    """The result of the definition, in float64."""
    parts = [part.double() for part in parts]
    low, high = all_bounds(len(parts[0]), len(parts))[rank]
    cuts = all_bounds(len(parts[0]), len(parts))
    return {
        "allreduce": lambda: sum(parts),
        "reduce_scatter": lambda: sum(parts)[low:high],
        "allgather": lambda: torch.cat([part[slice(*cut)] for part, cut in zip(parts, cuts)]),
        "bcast": lambda: parts[root],
        "reduce": lambda: sum(parts) if rank == root else parts[0][:0],
        "scatter": lambda: parts[root][low:high],
        "gather": lambda: torch.cat(parts) if rank == root else parts[0][:0],
        "alltoall": lambda: torch.cat([part[low:high] for part in parts]),
    }[op]()


@pytest.mark.parametrize(("op", "algorithm"), CASES, ids=map("-".join, CASES))
def test_every_generator(comm, op, algorithm, monkeypatch):
    """Messages in many segments; results against the definition in float64; inputs unchanged."""
    monkeypatch.setattr(executor, "SEGMENT_BYTES", 4096)
    group, wrong = as_group(comm).with_table(only(algorithm)), []
    group.node = None  # of this copy: in one node's memory two levels would be one
    is_taken = op == "reduce" or isinstance(group.transport(op, torch.float32, 1), Scheduled)
    assert_all(is_taken, "something else carries it out", comm)
    for n in SIZES:
        for dtype in DTYPES:
            parts = [data(n, dtype, rank) for rank in range(comm.size)]
            x, root = parts[comm.rank].clone(), comm.size - 1
            found = run(op, algorithm, x, group, root)
            right = wanted(op, parts, comm.rank, root)
            if found is None or not torch.equal(found.double(), right) or not torch.equal(x, parts[comm.rank]):
                wrong.append((n, dtype))
    assert_all(not wrong, wrong, comm)


@pytest.mark.parametrize("op", ["allreduce", "reduce_scatter", "allgather"])
def test_trees_that_were_packed_into_a_network(comm, op, monkeypatch):
    """Ranks on a switch by links of unequal rates, and a ring besides: trees of several shapes, with unequal shares."""
    if comm.size == 1:
        return
    names = [f"rank {rank}" for rank in range(comm.size)]
    pairs = [(name, "switch", 1e9 * (2 + rank)) for rank, name in enumerate(names)]
    pairs += [(name, other, 3e9) for name, other in zip(names, names[1:] + names[:1])]
    topology = Topology.make([*names, "switch"], [True] * comm.size + [False],
                             pairs + [(b, a, rate) for a, b, rate in pairs])
    schedule = pack_trees(op, topology).schedule
    monkeypatch.setattr(scheduled, "checked", lambda *_: (schedule, check_collective(schedule).carries))
    group, wrong = as_group(comm).with_table(only("ring")), []
    for n in SIZES:
        for dtype in DTYPES:
            parts = [data(n, dtype, rank) for rank in range(comm.size)]
            found = run(op, "ring", parts[comm.rank].clone(), group, 0)
            if found is None or not torch.equal(found.double(), wanted(op, parts, comm.rank, 0)):
                wrong.append((n, dtype))
    is_split = len(set(schedule.shares)) > 1 and schedule.num_chunks > (op != "allreduce") * comm.size
    assert_all(not wrong and is_split, f"{wrong} {schedule.shares}", comm)


@pytest.mark.parametrize("algorithm", ALGORITHMS["allreduce"])
def test_half_types_travel_narrow_and_are_rounded_once(comm, algorithm):
    group = as_group(comm).with_table(only(algorithm))
    parts = [torch.randn(1001, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.size)]
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        narrow = [part.to(dtype) for part in parts]
        found = mpi.allreduce(narrow[comm.rank], group)
        right = sum(part.double() for part in narrow)
        near = ((found.double() - right).abs() <= right.abs() * step + 1e-6).all()
        same = all(torch.equal(found, other) for other in comm.allgather(found))
        assert_all(near and same, f"{dtype} {near} {same}", comm)


def test_started_again_with_other_values(comm):
    """Persistent requests send what is in memory when they are started."""
    if comm.size == 1:
        return
    schedules = as_group(comm).schedules
    schedule, carries = checked("allreduce", "ring", comm.size, 0, schedules.nodes)
    x, out = torch.zeros(1001), torch.zeros(1001)
    cuts = schedule.bounds(len(x))
    views = [{c: y[low:high] for c, (low, high) in enumerate(cuts)} for y in (x, out)]
    one = Executor(schedule, carries, schedules.comm, [high - low for low, high in cuts], *views, x.dtype)
    for value in (1.0, 5.0):
        x.fill_(value + comm.rank)
        one.start()
        one.wait()
        right = sum(value + rank for rank in range(comm.size))
        assert_all(bool((out == right).all()), f"{out[0]} {right}", comm)
    one.free()


def test_a_bound_request_is_started_again(comm):
    """With the executor that the first start made, beside others that come and go, whether or not it may block."""
    group, x = as_group(comm).with_table(only("ring")), torch.empty(1001)
    reduction, gathering, made = group.bind("reduce_scatter", x), group.bind("allgather", x), []
    for value in (1.0, 5.0, 7.0):
        x.fill_(value + comm.rank)
        reduction.start(may_block=value == 5)
        other = mpi.iallreduce(x.new_full((999,), value), group)
        while not reduction.test():
            pass
        block = reduction.wait()
        whole = gathering.run()
        sums = x == sum(value + rank for rank in range(comm.size)), other.wait() == comm.size * value
        ok = all(map(torch.all, sums)) and whole is x and len(block) == counts(1001, comm.size)[comm.rank]
        assert_all(ok and not reduction.is_started(), f"{value} {x[0]}", comm)
        made.append([kept for bound in (reduction, gathering) for kept in bound._kept.values()])
    assert_all(made[0] == made[1] == made[2] and len(made[0]) == 2, made, comm)
    for bound in (reduction, gathering):
        bound.free()
    kept = weakref.ref(x)
    del x, block, whole, sums, made
    assert_all(kept() is None, "the tensor is still held", comm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_requests_give_what_calls_give(comm, dtype):
    """Every operation, algorithm and place, in place and not, started so that it may block and so that it may not."""
    usual, generator, wrong = as_group(comm), torch.Generator().manual_seed(comm.rank), []
    room = usual.node.empty(4096, dtype) if comm.size > 1 else torch.empty(4096, dtype=dtype)
    for name, order, size, in_window in itertools.product((LIBRARY, WINDOW, "ring"), ("any", "tree"), (0, 5, 1001),
                                                          (False, True)):
        group = usual.with_table(only(name))
        group.order, group._libraries = order, tuple(type(made)(group, may_block) for made, may_block in zip(
            group._libraries, (False, True)))
        mine = torch.randint(-30, 30, (size,), generator=generator).to(dtype)  # whose sums are exact in any order
        low, high = all_bounds(size, comm.size)[comm.rank]
        place = (room[8:], room[2048:]) if in_window else (torch.empty(2048, dtype=dtype), torch.empty(2048, dtype=dtype))
        whole, total = mpi.allgather(mine[low:high], usual, 0, size), mpi.allreduce(mine, usual)
        exchanged = mpi.alltoall(mine, usual)
        for op, value, length, right in (
                ("allreduce", mine, None, total), ("allreduce", mine, size, total),
                ("reduce_scatter", mine, None, total[low:high]), ("reduce_scatter", mine, high - low, total[low:high]),
                ("allgather", mine, None, whole), ("allgather", mine[low:high], size, whole),
                ("bcast", mine, None, mpi.bcast(mine, usual)), ("alltoall", mine, len(exchanged), exchanged)):
            x, out = place[0][:len(value)], None if length is None else place[1][:length]
            bound = group.bind(op, x, out)
            for start in (lambda: bound.start().wait(), lambda: bound.start(may_block=True).wait(), bound.run):
                x.copy_(value)
                if not torch.equal(start(), right) or out is not None and not torch.equal(x, value):
                    wrong.append(f"{op} {name} {order} {size} in window: {in_window}, to another tensor: {out is not None}")
            bound.free()
    assert_all(not wrong, wrong, comm)
    if comm.size > 1:
        usual.node.release(room)


def test_what_cannot_be_bound_is_refused(comm):
    with pytest.raises(ConfigError, match="bind: scatter: what can be bound is allreduce"):
        as_group(comm).bind("scatter", torch.zeros(4), torch.zeros(4))
    with pytest.raises(ShapeError, match="bind: allreduce needs .* with 4 items"):
        as_group(comm).bind("allreduce", torch.zeros(4), torch.zeros(3))


def test_nothing_is_left_of_bound_requests(comm):
    """After many binds and frees; the kind that keeps most and the library's."""
    for group in (as_group(comm).with_table(only(name)) for name in (LIBRARY, "ring")):
        x, before = torch.zeros(64), None
        for turn in range(3000):
            bound = group.bind("allreduce", x)
            bound.run()
            bound.free()
            if turn in (999, 2999):
                now, before = psutil.Process().memory_info().rss, before or psutil.Process().memory_info().rss
        assert_all(now - before < 1 << 20, f"{now - before} bytes more after 2000 binds", comm)


@pytest.mark.parametrize(("op", "algorithm"), CASES, ids=map("-".join, CASES))
def test_an_executor_holds_the_memory_that_the_checker_says(comm, op, algorithm):
    """To the byte, in place and not; of sums that leave the inputs alone, those that change besides."""
    group, items = as_group(comm), 16 * comm.size**2 * 64
    if comm.size == 1:
        return
    schedule = make_collective(op, algorithm, comm.size, 0, group.schedules.nodes)
    report = check_collective(schedule)
    cuts = schedule.bounds(items)
    sizes = [high - low for low, high in cuts]
    x, out = torch.zeros(items), torch.zeros(items)
    gives = {c for c, source in enumerate(schedule.sources) if source in (None, comm.rank)}
    gets = {c for c, target in enumerate(schedule.targets) if target in (None, comm.rank)}
    for is_in_place in (True, False):
        inputs = {c: x[slice(*cuts[c])] for c in gives}
        outputs = {c: (x if is_in_place else out)[slice(*cuts[c])] for c in gets}
        executor = Executor(schedule, report.carries, group.schedules.comm, sizes, inputs, outputs, x.dtype,
                            may_change_inputs=is_in_place)
        changed = {c for steps in schedule.rounds[comm.rank] for step in steps
                   if step.kind in ("recv", "reduce") for c in step.chunks} & gives - gets
        more = 0 if is_in_place else sum(sizes[c] for c in changed)
        right = (report.scratch[comm.rank] * items // sum(schedule.shares) + more) * 4
        held = executor.scratch_bytes
        executor.free()
        assert_all(held == right, f"{is_in_place} {held} {right} of {4 * items}", comm)


def test_waited_for_in_any_order(comm):
    """Even and odd ranks wait in opposite orders, in one group and in two; messages too long to leave unreceived."""
    part = comm.Clone()
    groups = [as_group(each).with_table(only("ring")) for each in (comm, comm, part)]
    parts = [data((1 << 19) + i, torch.float64, comm.rank) for i in range(3)]
    pending = [mpi.iallreduce(*each) for each in zip(parts, groups)]
    results = {i: pending[i].wait() for i in ((0, 1, 2), (2, 1, 0))[comm.rank % 2]}
    ok = all(torch.equal(results[i], mpi.allreduce(own, comm)) for i, own in enumerate(parts))
    part.Free()
    assert_all(ok, "mixed up", comm)


def test_several_at_once(comm):
    group = as_group(comm).with_table(only("ring"))
    parts = [data(5000 + i, torch.float64, comm.rank) for i in range(3)]
    pending = [mpi.iallreduce(part, group) for part in parts]
    results = [one.wait() for one in reversed(pending)][::-1]
    ok = all(torch.equal(found, mpi.allreduce(part, comm)) for found, part in zip(results, parts))
    assert_all(ok, "mixed up", comm)

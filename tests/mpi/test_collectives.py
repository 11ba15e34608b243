"""Every collective against numpy on the data of all ranks: dtypes, sizes, dimensions, strides, orders of sums."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_all

from mpillm import comm as mpi
from mpillm.autograd import allgather_to, gather_from, reduce_scatter_from, scatter_to
from mpillm.comm import collectives, windows
from mpillm.comm.group import Group, as_group
from mpillm.comm.single import SingleComm
from mpillm.errors import ShapeError
from mpillm.plan import OPERATIONS, DecisionTable
from mpillm.schedules.blocks import bounds, counts
from mpillm.schedules.tree import tree_sum

pytestmark = [pytest.mark.mpi, pytest.mark.parts]

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64]
HALVES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1 / 256, torch.float16: 1 / 2048}
SIZES = [0, 1, 7, 8, 9]


def cases():
    """Shapes in which the size under test stands first and last, and whether the tensor lies in memory with gaps."""
    for n in SIZES:
        yield (n,), 0, False
        yield from (((n, 3, 2), 0, False), ((n, 3, 2), 0, True), ((2, 3, n), 2, False), ((2, 3, n), -1, True))


def data(shape, dtype, rank, is_strided=False):
    """Numbers of rank ``rank`` that any rank can draw."""
    generator = torch.Generator().manual_seed(100 + rank)
    if dtype == torch.int64:
        x = torch.randint(-(2**40), 2**40, shape, generator=generator)
    else:
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 8).to(dtype)
    return strided(x) if is_strided else x


def strided(x):
    """The same values with the dimensions reversed in memory and gaps between them."""
    room = x.new_zeros([2 * n for n in reversed(x.shape)])
    view = room[tuple(slice(0, 2 * n, 2) for n in reversed(x.shape))].permute(*reversed(range(x.dim())))
    return view.copy_(x)


def wide(x):
    """As numpy, wide enough to be exact."""
    return x.numpy() if x.dtype == torch.int64 else x.double().numpy()


def groups(comm):
    """The ways to call: any communicator, one whose ranks share memory, a group with the fixed order of sums."""
    if comm.size == 1:
        return [SingleComm(), comm]
    return [comm, with_windows(comm), Group(as_group(comm).comm, order="tree")]


def with_windows(comm):
    """A group that takes shared memory for every size, through slots so small that all takes several rounds."""
    if not hasattr(as_group(comm), "small"):
        table = DecisionTable(tuple((op, "*", "*", None, "window") for op in OPERATIONS))
        group = Group(as_group(comm).comm, table=table)
        group.node.staging.slot_bytes, group.node.staging.at_once_bytes = 512, 32
        as_group(comm).small = group
    return as_group(comm).small


def compare(comm, dtype, operation, wanted, is_sum=False):
    """Run ``operation(x, group, dim)`` on every case and hold each rank's result against ``wanted(arrays, dim)``."""
    wrong = []
    for shape, dim, is_strided in cases():
        x = data(shape, dtype, comm.rank, is_strided)
        before = x.clone()
        right = wanted([wide(data(shape, dtype, rank)) for rank in range(comm.size)], dim)
        limit = comm.size * 40 * ROUNDING.get(dtype, 0) if is_sum else 0
        for number, group in enumerate(groups(comm)):
            found = operation(x, group, dim)
            same = found.dtype == dtype and found.shape == right.shape and np.allclose(wide(found), right, 0, limit)
            if not (same and torch.equal(x, before)):
                wrong.append((shape, dim, is_strided, number))
    assert_all(not wrong, wrong[:3], comm)


def operation(name):
    """Give a test the operation with every dtype, and its nonblocking form with two."""
    def started(*args, **kwargs):
        pending = getattr(mpi, f"i{name}")(*args, **kwargs)
        pending.test()
        return pending.wait()

    cases = [(getattr(mpi, name), dtype, str(dtype)) for dtype in DTYPES]
    cases += [(started, dtype, f"nonblocking-{dtype}") for dtype in (torch.float32, torch.bfloat16)]
    return pytest.mark.parametrize(("call", "dtype"), [pytest.param(*case[:2], id=case[2]) for case in cases])


def block(whole, comm, dim):
    return np.take(whole, range(*bounds(whole.shape[dim], comm.size, comm.rank)), dim)


def own_block(x, comm, dim):
    low, high = bounds(x.shape[dim], comm.size, comm.rank)
    return x.narrow(dim, low, high - low)


@operation("allreduce")
def test_allreduce(comm, call, dtype):
    compare(comm, dtype, lambda x, group, dim: call(x, group), lambda arrays, dim: sum(arrays), is_sum=True)
    compare(comm, dtype, lambda x, group, dim: call(x, group, op="max"), lambda arrays, dim: np.max(arrays, 0))


@operation("reduce_scatter")
def test_reduce_scatter(comm, call, dtype):
    compare(comm, dtype, call, lambda arrays, dim: block(sum(arrays), comm, dim), is_sum=True)


@operation("allgather")
def test_allgather(comm, call, dtype):
    """Of the blocks of rank 0's data; with their whole size given and without."""
    for is_given in (False, True):
        def gathered(x, group, dim, is_given=is_given):
            whole = data(x.shape, dtype, 0, not x.is_contiguous())
            return call(own_block(whole, comm, dim), group, dim, x.shape[dim] if is_given else None)

        compare(comm, dtype, gathered, lambda arrays, dim: arrays[0])


def test_allgather_of_any_sizes(comm):
    parts = [data((2, 3 * rank), torch.float32, rank) for rank in range(comm.size)]
    assert_all(torch.equal(mpi.allgather(parts[comm.rank], comm, 1), torch.cat(parts, 1)), "differs", comm)


def test_allgather_refuses_a_block_that_is_not_its_share(comm):
    if comm.size > 1:  # one rank has nothing to gather
        with pytest.raises(ShapeError, match=f"size=9 over {comm.size} ranks"):
            mpi.allgather(torch.zeros(counts(9, comm.size)[comm.rank] + 1, 2), comm, 0, 9)


@operation("bcast")
def test_bcast(comm, call, dtype):
    for root in (0, comm.size - 1):
        compare(comm, dtype, lambda x, group, dim: call(x, group, root=root), lambda arrays, dim: arrays[root])  # noqa: B023


@operation("alltoall")
def test_alltoall(comm, call, dtype):
    compare(comm, dtype, call,
            lambda arrays, dim: np.concatenate([block(array, comm, dim) for array in arrays], dim))


@operation("scatter")
def test_scatter(comm, call, dtype):
    for root in (0, comm.size - 1):
        compare(comm, dtype, lambda x, group, dim: call(x, group, dim, root),  # noqa: B023
                lambda arrays, dim: block(arrays[root], comm, dim))  # noqa: B023


@operation("gather")
def test_gather(comm, call, dtype):
    for root in (0, comm.size - 1):
        def wanted(arrays, dim, root=root):
            whole = np.concatenate(arrays, dim)
            return whole if comm.rank == root else np.take(whole, [], dim)

        compare(comm, dtype, lambda x, group, dim: call(x, group, dim, root), wanted)  # noqa: B023


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_sums_are_exact_sums_rounded_once(comm, dtype):
    """Numbers whose sum float32 holds exactly, so that any rounding on the way shows."""
    parts = [(data((9, 5), torch.float64, rank) * 16).round().div(16).to(dtype) for rank in range(comm.size)]
    parts[0] *= 16
    exact = sum(part.float() for part in parts)
    assert torch.equal(exact.double(), sum(part.double() for part in parts))
    right = exact.to(dtype)
    stepwise = sum(parts[1:], parts[0])
    assert comm.size < 3 or not torch.equal(stepwise, right)  # adding in half precision would be seen
    for group in groups(comm):
        ok = torch.equal(mpi.allreduce(parts[comm.rank], group), right)
        ok &= torch.equal(mpi.reduce_scatter(parts[comm.rank], group, 0), own_block(right, comm, 0))
        assert_all(ok, "not the rounded float32 sum", comm)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_tree_gives_its_order_on_every_rank(comm, dtype):
    """Bit for bit, with numbers whose sum depends on the order."""
    parts = [data((9, 5), dtype, rank) * 10.0 ** (3 * rank % 5 - 2) for rank in range(comm.size)]
    lifted = [part.float() if dtype in HALVES else part for part in parts]
    right = tree_sum(lifted, torch.add).to(dtype)
    group = groups(comm)[-1] if comm.size > 1 else comm
    ok = torch.equal(mpi.allreduce(parts[comm.rank], group), right)
    for dim in (0, 1):
        ok &= torch.equal(mpi.reduce_scatter(parts[comm.rank], group, dim), own_block(right, comm, dim))
    assert_all(ok, "not the sum of the tree", comm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flat_buffers_are_reduced_and_filled_where_they_lie(comm, dtype):
    for size, group in itertools.product(SIZES, groups(comm)):
        x, total = data((size,), dtype, comm.rank), mpi.allreduce(data((size,), dtype, comm.rank), group)
        own = collectives.reduce_scatter_blocks(x, group)
        ok = torch.allclose(own, own_block(total, comm, 0), rtol=1e-6, atol=1e-6)
        ok &= own.data_ptr() == own_block(x, comm, 0).data_ptr()
        whole = data((size,), dtype, 0)
        y = torch.zeros_like(whole)
        own_block(y, comm, 0).copy_(own_block(whole, comm, 0))
        collectives.allgather_blocks(y, group)
        assert_all(ok and torch.equal(y, whole), f"{size} {own} {y}", comm)


def test_the_library_reduces_a_large_buffer_of_uneven_blocks_where_it_lies(comm):
    """Whose second block is longer than the first: in place MPICH 5.0.2 aborts."""
    group = Group(as_group(comm).comm, table=DecisionTable(()))
    for size in (370727, 370728):
        x = torch.arange(size, dtype=torch.float32) % 1000 + comm.rank
        right = own_block(comm.size * (torch.arange(size) % 1000) + sum(range(comm.size)), comm, 0).float()
        own = collectives.reduce_scatter_blocks(x, group)
        ok = torch.equal(own, right) and own.data_ptr() == own_block(x, comm, 0).data_ptr()
        assert_all(ok, f"{size} {own}", comm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_in_a_window_are_combined_where_they_lie(comm, dtype, monkeypatch):
    """And give the bits that messages in the fixed order give."""
    node = with_windows(comm).node if comm.size > 1 else None
    monkeypatch.setattr(windows, "WHOLE_BYTES", 128)
    monkeypatch.setattr(windows, "PIECE_BYTES", 64)
    tree = groups(comm)[-1]
    for size in SIZES + [1001] if node else []:
        x, room = data((size,), dtype, comm.rank), node.empty(size + 5, dtype)
        view, group = room[3:size + 3].copy_(x), with_windows(comm)
        ok = torch.equal(mpi.allreduce(x, group, out=view), mpi.allreduce(x, tree))
        ok &= torch.equal(mpi.allreduce(x, group, "max", view), mpi.allreduce(x, tree, "max"))
        view.copy_(x)
        ok &= torch.equal(collectives.reduce_scatter_blocks(view, group), mpi.reduce_scatter(x, tree))
        collectives.allgather_blocks(view, group)
        ok &= torch.equal(view, mpi.allreduce(x, tree))
        assert_all(ok, f"{dtype} {size}", comm)


def test_sums_repeat_bit_for_bit(comm):
    x = data((1001,), torch.float32, comm.rank)
    first = mpi.allreduce(x, comm)
    assert_all(all(torch.equal(mpi.allreduce(x, comm), first) for _ in range(5)), "differs", comm)


def test_several_started_operations_may_be_waited_for_in_any_order(comm):
    x = data((9, 4), torch.float64, comm.rank).round()  # whose sums have the same bits in any order
    pending = [mpi.iallreduce(x, comm), mpi.iallgather(x, comm), mpi.ireduce_scatter(x, comm, 1), mpi.ibcast(x, comm)]
    blocking = [mpi.allreduce(x, comm), mpi.allgather(x, comm), mpi.reduce_scatter(x, comm, 1), mpi.bcast(x, comm)]
    for one, other in reversed(list(zip(pending, blocking))):
        assert_all(torch.equal(one.wait(), other), "differs", comm)


def test_traffic_of_the_caller_is_not_mixed_up(comm):
    """Library traffic runs on a clone, which is made once and goes with its communicator."""
    x = torch.full((3,), float(comm.rank))
    request = comm.Irecv(out := np.zeros(3), (comm.rank - 1) % comm.size)
    total = mpi.allreduce(x, comm)
    comm.Send(np.full(3, float(comm.rank)), (comm.rank + 1) % comm.size)
    request.Wait()
    ok = total[0] == sum(range(comm.size)) and out[0] == (comm.rank - 1) % comm.size
    ok &= comm.size == 1 or as_group(comm) is as_group(comm)
    assert_all(ok, "mixed up", comm)


def test_send_and_receive(comm):
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for dtype, shape in itertools.product(DTYPES if comm.size > 1 else [], [(0, 3), (7,), (2, 9)]):
        x = data(shape, dtype, comm.rank, is_strided=True)
        arriving = [mpi.irecv(shape, x, comm, before, tag) for tag in (2, 1)]
        leaving = [mpi.isend(x + tag, comm, after, tag) for tag in (1, 2)]
        received = [pending.wait() for pending in arriving]
        sent = [pending.wait() for pending in leaving]
        right = data(shape, dtype, before)
        ok = torch.equal(received[0], right + 2) and torch.equal(received[1], right + 1) and torch.equal(sent[0], x + 1)
        assert_all(ok, f"{dtype} {shape}", comm)


def test_a_result_goes_nowhere_else(comm):
    """What is no place for it is refused before any message; strided blocks come back to where they were."""
    x = torch.ones(4, 6)
    for out in (torch.ones(6, 4).T, torch.ones(4, 6, dtype=torch.float64), torch.ones(24)):
        with pytest.raises(ShapeError, match="pass a contiguous tensor like x"):
            mpi.allreduce(x, comm, out=out)
    room = torch.zeros(2 * 7)
    x = room[::2]
    low, high = bounds(7, comm.size, comm.rank)
    x[low:high] = comm.rank + 1
    collectives.allgather_blocks(x, comm)
    right = [rank + 1 for rank in range(comm.size) for _ in range(counts(7, comm.size)[rank])]
    assert_all(x.tolist() == right and not room[1::2].any(), room, comm)


def test_checked_collectives_count_dimensions_from_either_end(comm):
    group = Group(as_group(comm).comm, is_checked=True)
    x = data((2, 7), torch.float64, 0)
    own = own_block(x, comm, 1)
    whole = mpi.allgather(own, group, -1), mpi.allgather(own, group, -1, 7), mpi.gather(own, group, -1, 0)
    right = x, x, x if comm.rank == 0 or comm.size == 1 else x[:, :0]
    assert_all(all(map(torch.equal, whole, right)), whole, comm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sum_that_was_started_waits_for_nobody(comm, dtype):
    """The others start theirs only after a message that comes later in this rank's program."""
    x, received = torch.full((9,), comm.rank + 1, dtype=dtype), 0
    group = as_group(comm)
    mpi.iallreduce(x, group).wait()  # first uses are collective
    if comm.rank > 0:
        received = comm.recv(source=0)
    pending = mpi.iallreduce(x, group)
    for rank in range(1, comm.size if comm.rank == 0 else 0):
        comm.send(rank, rank)
    right = comm.size * (comm.size + 1) // 2
    assert_all(pending.wait().tolist() == 9 * [right] and received == comm.rank, "differs", comm)


def test_recorded_bytes(comm):
    group = Group(as_group(comm).comm, "axis")
    x = torch.zeros(9, 2, dtype=torch.float32)
    for operation in (mpi.allreduce, mpi.reduce_scatter, mpi.alltoall, mpi.gather, mpi.scatter):
        operation(x, group)
    mpi.bcast(x, group, root=comm.size - 1)
    mpi.allgather(own_block(x, comm, 0), group, 0, 9)
    p, n, own = comm.size, 72, counts(9, comm.size)[comm.rank] * 8
    wanted = {"allreduce": 2 * (n - n // p), "reduce_scatter": n - own, "alltoall": n - own,
              "bcast": n if comm.rank == p - 1 else 0, "allgather": (p - 1) * own, "gather": n if comm.rank else 0,
              "scatter": n - counts(9, p)[0] * 8 if comm.rank == 0 else 0}
    wanted = {("axis", name): size for name, size in wanted.items()} if p > 1 else {}
    assert_all(dict(group.recorder.sent_bytes) == wanted, dict(group.recorder.sent_bytes), comm)
    assert set(group.recorder.calls.values()) <= {1}


def test_one_item_with_a_stride_of_its_own_is_moved_like_any(comm):
    """Which torch calls contiguous: of one row of a matrix, or expanded from a sum."""
    for x in (torch.full((1,), float(comm.rank)).expand(1), torch.full((1, 4), float(comm.rank))[:, 3]):
        for group in groups(comm):
            gathered = mpi.allgather(x, group)
            assert_all(gathered.tolist() == list(range(comm.size)), gathered, comm)
            everywhere = mpi.bcast(x, group, comm.size - 1)
            assert_all(everywhere.tolist() == [comm.size - 1], everywhere, comm)


def test_waiting_twice_gives_the_same_result(comm):
    pending = mpi.iallreduce(torch.ones(5), comm)
    assert_all(torch.equal(pending.wait(), pending.wait()), "another result", comm)


def test_shapes_at_the_edge(comm):
    """A single number can be summed and given to all, and has no dim to cut or join; nothing and one item can."""
    joins = ["allgather", "gather", "reduce_scatter", "scatter", "alltoall"]
    regions = [scatter_to, gather_from, allgather_to, reduce_scatter_from]
    for dtype, group in itertools.product(DTYPES, groups(comm)):
        x = torch.tensor(comm.rank + 1).to(dtype)
        sums, first = mpi.allreduce(x, group), mpi.bcast(x, group, comm.size - 1)
        ok = sums.shape == first.shape == () and int(sums) == comm.size * (comm.size + 1) // 2 and int(first) == comm.size
        for call in [*(getattr(mpi, kind + name) for name in joins for kind in ("", "i")), *regions]:
            with pytest.raises(ShapeError, match=r"no dim 0: x is a single number: pass x\[None\]"):
                call(x, group)
            with pytest.raises(ShapeError, match=r"no dim -3: x has the 2 dimensions \[0, 1\]"):
                call(x.new_zeros(0, 1), group, dim=-3)
        whole = mpi.allgather(x[None], group, -1), mpi.gather(x[None], group)
        ok &= [int(item) for item in whole[0]] == list(range(1, comm.size + 1)) and len(whole[1]) == comm.size * (
            group.rank == 0)
        for shape in ((0,), (1,), (1, 1), (1, 0, 3)):
            empty = x.new_ones(shape)
            for name, parts in (("allgather", comm.size), ("alltoall", None), ("reduce_scatter", None), ("scatter", None)):
                found, block = getattr(mpi, name)(empty, group), counts(shape[0], comm.size)[comm.rank]
                right = parts * shape[0] if parts else block * (comm.size if name == "alltoall" else 1)
                ok &= found.shape == (right, *shape[1:]) and bool((found == (comm.size if "reduce" in name else 1)).all())
        assert_all(ok, f"{dtype} {sums} {first} {whole}", comm)


def test_a_group_that_was_freed_is_not_handed_out_again(comm):
    """Nor freed twice; also where a group of the same ranks under another table was freed, and with its communicator."""
    part = comm.Clone()
    for free in (lambda group: group.free(), lambda group: group.with_table(DecisionTable(())).free()):
        group = as_group(part)
        free(group)
        group.free()
        assert_all(comm.size == 1 or as_group(part) is not group, "the same group", comm)
        assert_all(mpi.allreduce(torch.ones(3), part).tolist() == 3 * [comm.size], "not the sum", comm)
    kept = as_group(part)
    assert_all(part.allgather(1) == comm.size * [1], "the caller's own communicator was freed", comm)
    part.Free()
    assert_all(comm.size == 1 or kept.is_freed, "the group outlives its communicator", comm)

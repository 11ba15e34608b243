"""The conjugate pairs: what each does, that its backward is its adjoint, and that autograd may use them in any way."""

import itertools

import pytest
import torch
from helpers import assert_all
from torch.utils.checkpoint import checkpoint

from mpillm import autograd, check_adjoint
from mpillm.autograd.adjoint import inner_product
from mpillm.comm import Group, allreduce
from mpillm.comm.group import as_group
from mpillm.errors import CollectiveError, ConfigError, ShapeError
from mpillm.schedules.blocks import bounds

pytestmark = [pytest.mark.mpi, pytest.mark.parts]

PAIRS = {  # placements before and after; "{}" stands for the dimension
    "copy_to": ("replicated", "varying"),
    "reduce_from": ("partial", "replicated"),
    "scatter_to": ("replicated", "sharded({})"),
    "gather_from": ("sharded({})", "replicated"),
    "allgather_to": ("sharded({})", "varying"),
    "reduce_scatter_from": ("partial", "sharded({})"),
}
OTHER_WAY = {"copy_to": "reduce_from", "scatter_to": "gather_from", "allgather_to": "reduce_scatter_from"}
SHAPES = [(1,), (9,), (0, 3), (7, 3), (2, 8, 3), (4, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
several_ranks = pytest.mark.parametrize("comm", [2, 3, 4], ids="{}-ranks".format, indirect=True)
HAS_DIM = {name for name, placements in PAIRS.items() if "{}" in "".join(placements)}


def on(name, comm, dim, **size):
    """Return the movement as a function of its tensor."""
    arguments = {"dim": dim, **size} if name in HAS_DIM else {}
    return lambda x: getattr(autograd, name)(x, comm, **arguments)


def placements(name, dim):
    return [placement.format(dim) for placement in PAIRS[name]]


@pytest.mark.parametrize("name", PAIRS)
def test_backward_is_the_adjoint(comm, name):
    for shape, dtype, order in itertools.product(SHAPES, DTYPES, ("any", "tree")):
        group = Group(as_group(comm).comm, order=order)
        for dim in range(len(shape)) if name in HAS_DIM else (0,):
            check_adjoint(on(name, group, dim), group, shape, *placements(name, dim), dtype=dtype)


@pytest.mark.parametrize("name", ["gather_from", "allgather_to"])
def test_the_whole_size_may_be_given(comm, name):
    for size in (1, 7, 8):
        error = check_adjoint(on(name, comm, 1, size=size), comm, (3, size), *placements(name, 1))
        assert error < 1e-12


def test_forward_is_what_the_name_says(comm):
    parts = [torch.arange(18.0).view(9, 2) + 100 * rank for rank in range(comm.size)]
    low, high = bounds(9, comm.size, comm.rank)
    mine, total = parts[comm.rank], sum(parts)
    wanted = {"copy_to": (mine, mine), "reduce_from": (mine, total), "scatter_to": (parts[0], parts[0][low:high]),
              "gather_from": (parts[0][low:high], parts[0]), "allgather_to": (parts[0][low:high], parts[0]),
              "reduce_scatter_from": (mine, total[low:high])}
    for name, (x, y) in wanted.items():
        for is_tracked in (True, False):
            with torch.set_grad_enabled(is_tracked):
                found = on(name, comm, 0)(x.clone().requires_grad_())
            assert_all(torch.equal(found, y) and (found.grad_fn is not None) == is_tracked, name, comm)


@pytest.mark.parametrize(("one", "other"), OTHER_WAY.items())
def test_backward_of_one_is_forward_of_the_other(comm, one, other):
    for first, second in ((one, other), (other, one)):
        x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        low, high = bounds(9, comm.size, comm.rank)
        x = x[low:high].clone() if placements(first, 0)[0].startswith("sharded") else x
        y = on(first, comm, 0)(x.requires_grad_())
        grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(comm.rank))
        y.backward(grad)
        assert_all(torch.equal(x.grad, on(second, comm, 0)(grad)), f"{first}, {second}", comm)


def own_function(comm, dim=0):
    """A user's: a row-parallel product behind a scatter, whose result every rank scales in its own way and sums."""
    def function(x):
        weight = torch.linspace(-1, 1, 12, dtype=x.dtype).view(3, 4)
        y = autograd.scatter_to(x, comm, dim) @ weight
        whole = autograd.allgather_to(y, comm, dim)
        return autograd.reduce_from(whole * (comm.rank + 1), comm)

    return function


def test_a_composed_function_of_ones_own(comm):
    assert check_adjoint(own_function(comm), comm, (7, 3), "replicated", "replicated") < 1e-13
    assert check_adjoint(own_function(comm), comm, (9, 3), "replicated", "replicated", torch.float32, seed=4) < 1e-5


class Wrong(torch.autograd.Function):
    """An allreduce whose backward is a user's mistake."""

    @staticmethod
    def forward(ctx, x, comm, backward):
        ctx.comm, ctx.backward = comm, backward
        return allreduce(x, comm)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward(grad, ctx.comm), None, None


WRONG = {
    "allreduce-again": lambda grad, comm: allreduce(grad, comm),
    "mean": lambda grad, comm: grad / comm.size,
    "sign": lambda grad, comm: -grad,
    "rank-0-only": lambda grad, comm: grad * (comm.rank == 0),
    "a-little-off": lambda grad, comm: grad * (1 + 1e-9),
}


@several_ranks
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_backward_is_refused_on_every_rank(comm, mistake):
    with pytest.raises(CollectiveError, match="backward is not the adjoint of forward for partial -> replicated"):
        check_adjoint(lambda x: Wrong.apply(x, comm, WRONG[mistake]), comm, (7, 3), "partial", "replicated")


@pytest.mark.parametrize("name", PAIRS)
def test_each_of_the_six_with_twice_its_gradient_is_refused(comm, name):
    def doubled(x):
        y = on(name, comm, 0)(x)
        return y + (y - y.detach())

    with pytest.raises(CollectiveError, match="not the adjoint"):
        check_adjoint(doubled, comm, (7, 3), *placements(name, 0))


@several_ranks
def test_a_result_that_only_claims_to_be_replicated_is_refused(comm):
    with pytest.raises(CollectiveError, match="output should be replicated"):
        check_adjoint(lambda x: x * 1, comm, (7,), "varying", "replicated")
    with pytest.raises(CollectiveError, match="gradient should be replicated"):
        check_adjoint(lambda x: x * 1, comm, (7,), "replicated", "varying")


@pytest.mark.parametrize("wrong", ["replicate", "Varying", "sharded", "sharded(x)", "sharded(2)", "sharded(-3)", None])
def test_what_is_no_placement_is_refused_on_every_rank(comm, wrong):
    x = torch.ones(7, 3)
    for call in (lambda: check_adjoint(torch.clone, comm, (7, 3), wrong, "varying"),
                 lambda: check_adjoint(torch.clone, comm, (7, 3), "varying", wrong),
                 lambda: inner_product(x, x, wrong, comm)):
        with pytest.raises(ConfigError, match='must be "replicated", .* such as "sharded\\(0\\)"') as caught:
            call()
        assert f'"{wrong}"' in str(caught.value)


def test_a_dim_may_be_counted_from_the_end(comm):
    check_adjoint(on("gather_from", comm, -1), comm, (2, 7), "sharded(-1)", "replicated")


def test_a_dtype_without_a_tolerance_is_refused_on_every_rank(comm):
    with pytest.raises(ConfigError, match=r"dtype torch.int64: takes torch.float64, torch.float32"):
        check_adjoint(torch.clone, comm, (7,), "varying", "varying", torch.int64)


def test_a_function_without_a_gradient_is_refused_on_every_rank(comm):
    def fails(x):  # on the last rank alone
        return autograd.copy_to(x.detach() if comm.rank == comm.size - 1 else x, comm)

    with pytest.raises(CollectiveError, match="does not require a gradient: build it from differentiable"):
        check_adjoint(fails, comm, (7,), "replicated", "varying")


def test_inner_products_count_replicated_once(comm):
    x = torch.full((3,), 2.0, dtype=torch.float64)
    assert inner_product(x, x, "replicated", comm) == 12
    for placement in ("partial", "varying", "sharded(0)"):
        assert inner_product(x, x, placement, comm) == 12 * comm.size


def loss_of(x, comm):
    """A little of everything, nonlinear."""
    y = autograd.copy_to(x, comm) * (comm.rank + 1.5)
    z = autograd.allgather_to(autograd.reduce_scatter_from(y.sin(), comm), comm)
    return autograd.reduce_from((z * y).tanh().sum(), comm)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_gives_the_same_gradient(comm, reentrant):
    grads = []
    for is_recomputed in (False, True):
        x = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
        loss = checkpoint(loss_of, x, comm, use_reentrant=reentrant) if is_recomputed else loss_of(x, comm)
        loss.backward()
        grads.append(x.grad)
    assert_all(torch.equal(*grads) and grads[0].abs().sum() > 0, "differs", comm)


def test_gradients_accumulate(comm):
    x = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
    loss_of(x, comm).backward()
    once = x.grad.clone()
    for _ in range(2):
        loss_of(x, comm).backward()
    assert_all(torch.allclose(x.grad, 3 * once, rtol=1e-15), "differs", comm)


def test_the_gradient_is_that_of_all_ranks_together(comm):
    """Finite differences of the same sum written out on one process."""
    def whole(x):
        ys = [x * (rank + 1.5) for rank in range(comm.size)]
        z = sum(y.sin() for y in ys)
        return sum((z * y).tanh().sum() for y in ys)

    x = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
    loss = loss_of(x, comm)
    loss.backward()
    (wanted,) = torch.autograd.grad(whole(x), x)
    ok = torch.allclose(x.grad, wanted, rtol=1e-12) and abs(loss - whole(x)) < 1e-12
    assert_all(ok, x.grad - wanted, comm)


def test_nothing_is_kept_or_tracked_without_gradients(comm):
    x = torch.ones(9, requires_grad=True)
    with torch.no_grad():
        assert not loss_of(x, comm).requires_grad
    assert not loss_of(x.detach(), comm).requires_grad and x.grad is None


def test_blocks_that_are_not_those_of_scatter_are_refused_on_all_ranks(comm):
    """The larger ones first, as numpy splits; on some ranks both ways come to the same size."""
    if comm.size == 1:
        return
    rows = 2 if comm.rank == 0 else 1
    with pytest.raises(ShapeError, match="of the ranks' blocks has .* pass the blocks that scatter gives"):
        autograd.gather_from(torch.ones(rows, 2), comm)

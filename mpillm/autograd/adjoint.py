"""The dot-product test: shows that the backward of a movement is its exact adjoint."""

import torch

from mpillm.comm.collectives import allgather
from mpillm.comm.group import as_group
from mpillm.errors import CollectiveError
from mpillm.schedules.blocks import bounds

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def check_adjoint(fn, comm, shape, in_placement, out_placement, dtype=torch.float64, seed=0):
    """Check ``<fn(x), y> == <x, fn*(y)>`` for random ``x`` and ``y``, with ``fn*`` what autograd runs backward.

    Collective over ``comm``.

    Parameters
    ----------
    fn : callable
        A linear function of one tensor, built from movements over ``comm``: yours or one of the six.
    comm : Comm or Group
    shape : tuple of int
        The whole shape of ``x``; a sharded ``x`` gets this rank's block of it.
    in_placement, out_placement : str
        ``"replicated"``, ``"sharded(dim)"``, ``"partial"`` or ``"varying"``.
    dtype : torch.dtype
    seed : int

    Returns
    -------
    float
        The relative difference of the two inner products, equal on all ranks.

    Raises
    ------
    CollectiveError
        On every rank if the difference exceeds rounding, or a result that should be replicated is not.
    """
    group = as_group(comm)
    x = _random(shape, in_placement, group, dtype, seed).requires_grad_()
    out = fn(x)
    y = _random(_whole_shape(out, out_placement, group), out_placement, group, dtype, seed + 1)
    out.backward(y)
    for what, value, placement in (("output", out.detach(), out_placement), ("gradient", x.grad, in_placement)):
        if placement == "replicated" and not _is_replicated(value, group):
            raise CollectiveError(f"check_adjoint: the {what} should be replicated, but differs between ranks")
    left, right = (inner_product(out.detach(), y, out_placement, group),
                   inner_product(x.detach(), x.grad, in_placement, group))
    scale = (inner_product(out.detach().abs(), y.abs(), out_placement, group)
             + inner_product(x.detach().abs(), x.grad.abs(), in_placement, group))
    error = abs(left - right) / scale if scale else 0.0
    if not error <= _TOLERANCE[dtype]:
        raise CollectiveError(
            f"check_adjoint: <fn(x), y> = {left!r} but <x, fn*(y)> = {right!r}, relative difference {error:.2e}, "
            f"allowed {_TOLERANCE[dtype]:.0e} in {dtype}: backward is not the adjoint of forward for "
            f"{in_placement} -> {out_placement}"
        )
    return error


def inner_product(u, v, placement, comm):
    """Return ``<u, v>`` in float64: a replicated tensor counts once, all others sum over the ranks.

    Collective over ``comm``.
    """
    group = as_group(comm)
    mine = float((u.double() * v.double()).sum())
    return mine if placement == "replicated" else sum(group.comm.allgather(mine))


def _random(shape, placement, group, dtype, seed):
    """Draw a tensor of the placement: equal on all ranks if replicated, this rank's block if sharded, else its own."""
    own = 0 if placement == "replicated" or placement.startswith("sharded") else group.rank
    generator = torch.Generator().manual_seed(seed * 1000 + own)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if placement.startswith("sharded"):
        dim = _dim(placement)
        start, stop = bounds(shape[dim], group.size, group.rank)
        return x.narrow(dim, start, stop - start).contiguous()
    return x


def _dim(placement):
    return int(placement.removeprefix("sharded(").removesuffix(")"))


def _whole_shape(x, placement, group):
    shape = list(x.shape)
    if placement.startswith("sharded"):
        shape[_dim(placement)] = sum(group.comm.allgather(shape[_dim(placement)]))
    return tuple(shape)


def _is_replicated(x, group):
    """Tell, on every rank alike, whether all ranks hold equal values."""
    whole = allgather(x.reshape(1, -1), group)
    return all(torch.equal(row, whole[0]) for row in whole)

"""The dot-product test: shows that the backward of a movement is its exact adjoint."""

import re

import torch

from mpillm.comm.collectives import allgather
from mpillm.comm.group import as_group
from mpillm.errors import CollectiveError, ConfigError
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
        float64, float32, bfloat16 or float16.
    seed : int

    Returns
    -------
    float
        The relative difference of the two inner products, equal on all ranks.

    Raises
    ------
    CollectiveError
        On every rank if the difference exceeds rounding, or a result that should be replicated is not, or autograd
        cannot go back through ``fn`` on some rank.
    ConfigError
        On every rank, if a placement or the dtype is none that is known.
    """
    group = as_group(comm)
    if dtype not in _TOLERANCE:
        raise ConfigError(f"check_adjoint: dtype {dtype}: takes {', '.join(map(str, _TOLERANCE))}")
    x = _random(shape, in_placement, group, dtype, seed).requires_grad_()
    out = fn(x)
    if not all(group.comm.allgather(out.requires_grad)):
        raise CollectiveError("check_adjoint: autograd cannot go back through fn, whose result does not require a "
                              "gradient: build it from differentiable operations, without detach and no_grad")
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

    Parameters
    ----------
    u, v : Tensor, of equal shapes
        What this rank has of each.
    placement : str
        Of both, as in :func:`check_adjoint`.
    comm : Comm or Group

    Returns
    -------
    float
        Equal on all ranks.

    Raises
    ------
    ConfigError
        On every rank, before any message, if the placement is none that is known.
    """
    group = as_group(comm)
    _sharded_dim(placement, u.dim())
    mine = float((u.double() * v.double()).sum())
    return mine if placement == "replicated" else sum(group.comm.allgather(mine))


def _random(shape, placement, group, dtype, seed):
    """Draw a tensor of the placement: equal on all ranks if replicated, this rank's block if sharded, else its own."""
    dim = _sharded_dim(placement, len(shape))
    own = 0 if placement == "replicated" or dim is not None else group.rank
    generator = torch.Generator().manual_seed(seed * 1000 + own)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dim is None:
        return x
    start, stop = bounds(shape[dim], group.size, group.rank)
    return x.narrow(dim, start, stop - start).contiguous()


def _sharded_dim(placement, num_dims):
    """Return the dim of ``"sharded(dim)"``, None for the other placements; refuse what is no placement."""
    if placement in ("replicated", "partial", "varying"):
        return None
    found = re.fullmatch(r"sharded\((-?\d+)\)", str(placement))
    if not found or not -num_dims <= int(found[1]) < num_dims:
        raise ConfigError(f'placement "{placement}" of a tensor with {num_dims} dims: must be "replicated", "partial", '
                          '"varying", or "sharded(dim)" with one of its dims, such as "sharded(0)"')
    return int(found[1])


def _whole_shape(x, placement, group):
    shape, dim = list(x.shape), _sharded_dim(placement, x.dim())
    if dim is not None:
        shape[dim] = sum(group.comm.allgather(shape[dim]))
    return tuple(shape)


def _is_replicated(x, group):
    """Tell, on every rank alike, whether all ranks hold equal values."""
    whole = allgather(x.reshape(1, -1), group)
    return all(torch.equal(row, whole[0]) for row in whole)

"""Norms, row by row: RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), with the gradients of their weights
summed over fixed blocks of tokens."""

import torch
from torch import nn
from torch.nn import functional

from mpillm.autograd.node import Node
from mpillm.comm.buffers import HALF_TYPES
from mpillm.nn.split import add_over_blocks, first_trained, later


def make_norm(table, name, split, model):
    """Return the norm of this name in a table of parameters, or ``None`` where it has none."""
    weight, bias = table.get(f"{name}.weight"), table.get(f"{name}.bias")
    return Norm(split, weight, bias, model.norm_eps, model.norm_offset) if weight else None


class Norm(nn.Module):
    """Each token over its size: over the root of its mean square, times the weight; with a bias, its mean taken off first
    and the bias added last.

    The weights are whole on every tensor rank; where activations are sharded by tokens their gradients are partial.

    Parameters
    ----------
    split : TensorSplit
    weight, bias : Parameter
        ``bias`` may be ``None``.
    eps : float
        Added to the mean square.
    is_offset : bool
        Whether 1 is added to the weight.
    """

    def __init__(self, split, weight, bias, eps, is_offset):
        super().__init__()
        self.split, self.eps, self.is_offset = split, eps, is_offset
        self.weight, self.bias = split.parameter(weight), split.parameter(bias)

    def forward(self, x_TD, total):
        """Normalise the tokens this rank holds of ``total``."""
        if self.bias is None:
            return _RMSNorm.apply(x_TD, self.weight, self, total)
        return _LayerNorm.apply(x_TD, first_trained(self.weight, self.bias), self, total)


def scale_of(weight, is_offset, dtype):
    """Return what each number of a row is multiplied by. Within a node of autograd, which records nothing."""
    weight = weight.to(dtype)
    return weight + 1 if is_offset else weight


class _RMSNorm(Node):
    @staticmethod
    def forward(ctx, x, weight, norm, total):
        ctx.norm, ctx.total = norm, total
        if x.is_cuda:
            ctx.save_for_backward(x)
            return functional.rms_norm(x, weight.shape, scale_of(weight, norm.is_offset, weight.dtype), norm.eps)
        wide = x.float() if x.dtype in HALF_TYPES else x
        inverse = inverse_rms(wide, norm.eps)
        ctx.save_for_backward(x, inverse)
        return (wide * inverse).mul_(scale_of(weight, norm.is_offset, wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, *inverse), norm = ctx.saved_tensors, ctx.norm
        split = norm.split
        if x.is_cuda:
            dxs, dws = zip(_fused_gradients(dy, x, scale_of(norm.weight, norm.is_offset, x.dtype), norm.eps))
        else:
            scale = scale_of(norm.weight, norm.is_offset, inverse[0].dtype)
            blocks = zip(*(split.token_blocks(rows, ctx.total) for rows in (dy, x, *inverse)))
            dxs, dws = zip(*(rms_gradients(*block, scale, split.is_exact) for block in blocks))
        split.weight_gradients.add(later(add_over_blocks, norm.weight, dws))
        return (dxs[0] if len(dxs) == 1 else torch.cat(dxs)), None, None, None


def inverse_rms(x, eps):
    """Return one over the root of the mean square of each row, ``[..., 1]``."""
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return lengths.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _fused_gradients(dy, x, scale, eps):
    """Return the gradients of input and weight by PyTorch's kernels for GPUs; they are reached by its autograd only,
    which wants the forward once more."""
    with torch.enable_grad():
        x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
        return torch.autograd.grad(functional.rms_norm(x, scale.shape, scale, eps), (x, scale), dy)


def rms_gradients(dy, x, inverse, scale, is_exact):
    """Return the gradients of input and weight; the weight's is None without tokens.

    The kernel of LayerNorm, told that the mean is zero, reads all once. It takes off the mean of ``dy * scale`` as well,
    which is put back. Its sum over tokens depends on the number of threads: not for ``is_exact``.
    """
    if not len(x):
        return torch.empty_like(x), None
    dy_wide, x_wide = dy.to(scale.dtype), x.to(scale.dtype)
    dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
        dy_wide, x_wide, scale.shape, torch.zeros_like(inverse), inverse, scale, None, [True, not is_exact, False])
    if is_exact:
        dw = (x_wide * inverse).mul_(dy_wide).sum(0)
    dx += inverse * (dy_wide @ scale).div_(len(scale))[:, None]
    return dx.to(x.dtype), dw


class _LayerNorm(Node):
    @staticmethod
    def forward(ctx, x, trained, norm, total):
        ctx.norm, ctx.total = norm, total
        wide = x.float() if x.dtype in HALF_TYPES else x
        scale, bias = scale_of(norm.weight, norm.is_offset, wide.dtype), norm.bias.to(wide.dtype)
        y, mean, inverse = torch.native_layer_norm(wide, scale.shape, scale, bias, norm.eps)
        ctx.save_for_backward(x, mean, inverse)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, mean, inverse = ctx.saved_tensors
        norm, split = ctx.norm, ctx.norm.split
        scale = scale_of(norm.weight, norm.is_offset, inverse.dtype)
        blocks = zip(*(split.token_blocks(rows, ctx.total) for rows in (dy, x, mean, inverse)))
        dxs, dws, dbs = zip(*(_layer_gradients(*block, scale, split.is_exact) for block in blocks))
        split.weight_gradients.add(later(add_over_blocks, norm.weight, dws))
        split.weight_gradients.add(later(add_over_blocks, norm.bias, dbs))
        return (dxs[0] if len(dxs) == 1 else torch.cat(dxs)), None, None, None


def _layer_gradients(dy, x, mean, inverse, scale, is_exact):
    """Return the gradients of input, weight and bias; the last two are None without tokens."""
    if not len(x):
        return torch.empty_like(x), None, None
    dy_wide, x_wide, more = dy.to(scale.dtype), x.to(scale.dtype), not is_exact
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(  # which asks the bias for nothing but its shape
        dy_wide, x_wide, scale.shape, mean, inverse, scale, scale, [True, more, more])
    if is_exact:
        dw, db = (x_wide - mean).mul_(inverse).mul_(dy_wide).sum(0), dy_wide.sum(0)
    return dx.to(x.dtype), dw, db

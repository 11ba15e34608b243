"""RMSNorm (Zhang and Sennrich 2019), row by row, with its weight gradient summed over fixed blocks of tokens."""

import torch
from torch import nn
from torch.nn import functional

from mpillm.comm.buffers import HALF_TYPES
from mpillm.nn.split import gradient_of, later
from mpillm.schedules.tree import tree_sum


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` for each token.

    The weight is whole on every tensor rank; where activations are sharded by tokens its gradient is partial.
    """

    def __init__(self, name, split, width, eps):
        super().__init__()
        self.split, self.eps = split, eps
        self.weight = split.parameter(name, (width,), is_partial_grad=split.sequence_parallel)

    def forward(self, x_TD, total):
        """Normalise the tokens this rank holds of ``total``."""
        return _RMSNorm.apply(x_TD, self.weight, self, total)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, norm, total):
        ctx.norm, ctx.total = norm, total
        if x.is_cuda:
            ctx.save_for_backward(x)
            return functional.rms_norm(x, weight.shape, weight, norm.eps)
        wide = x.float() if x.dtype in HALF_TYPES else x
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = lengths.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return (wide * inverse).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, *inverse), split, weight = ctx.saved_tensors, ctx.norm.split, ctx.norm.weight.detach()
        if x.is_cuda:
            dxs, dws = zip(_fused_gradients(dy, x, weight, ctx.norm.eps))
        else:
            weight = weight.to(inverse[0].dtype)
            blocks = zip(*(split.token_blocks(rows, ctx.total) for rows in (dy, x, *inverse)))
            dxs, dws = zip(*(_gradients(*block, weight, split.is_exact) for block in blocks))
        split.weight_gradients.add(later(_accumulate, ctx.norm.weight, dws))
        return (dxs[0] if len(dxs) == 1 else torch.cat(dxs)), None, None, None


def _fused_gradients(dy, x, weight, eps):
    """Return the gradients of input and weight by PyTorch's kernels for GPUs; they are reached by its autograd only,
    which wants the forward once more."""
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(functional.rms_norm(x, weight.shape, weight, eps), (x, weight), dy)


def _gradients(dy, x, inverse, weight, is_exact):
    """Return the gradients of input and weight; the weight's is None without tokens.

    The kernel of LayerNorm, told that the mean is zero, reads all once. It takes off the mean of ``dy * weight`` as well,
    which is put back. Its sum over tokens depends on the number of threads: not for ``is_exact``.
    """
    if not len(x):
        return torch.empty_like(x), None
    dy_wide, x_wide = dy.to(weight.dtype), x.to(weight.dtype)
    dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
        dy_wide, x_wide, weight.shape, torch.zeros_like(inverse), inverse, weight, None, [True, not is_exact, False])
    if is_exact:
        dw = (x_wide * inverse).mul_(dy_wide).sum(0)
    dx += inverse * (dy_wide @ weight).div_(len(weight))[:, None]
    return dx.to(x.dtype), dw


def _accumulate(weight, gradients):
    """Add the gradients of all blocks of tokens to the weight's."""
    grad = tree_sum(gradients, torch.add)
    if grad is not None:
        gradient_of(weight).add_(grad)

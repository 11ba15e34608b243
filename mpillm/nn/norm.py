"""RMSNorm (Zhang and Sennrich 2019), row by row, with its weight gradient summed over fixed blocks of tokens."""

import torch
from torch import nn

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
        wide = x.float() if x.dtype in HALF_TYPES else x
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(norm.eps))
        ctx.save_for_backward(x, inverse)
        ctx.norm, ctx.total = norm, total
        return (wide * inverse).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, inverse = ctx.saved_tensors
        normed, dy_wide = x.to(inverse.dtype) * inverse, dy.to(inverse.dtype)
        scaled = dy_wide * ctx.norm.weight.detach().to(inverse.dtype)
        mean = (scaled * normed).mean(-1, keepdim=True)
        dx = torch.addcmul(scaled, normed, mean, value=-1).mul_(inverse)
        ctx.norm.split.weight_gradients.add(later(_accumulate, ctx.norm, dy_wide * normed, ctx.total))
        return dx.to(x.dtype), None, None, None


def _accumulate(norm, terms_TD, total):
    """Add the sum over tokens to the weight's gradient."""
    sums = [block.sum(0) if len(block) else None for block in norm.split.token_blocks(terms_TD, total)]
    grad = tree_sum(sums, torch.add)
    if grad is not None:
        gradient_of(norm.weight).add_(grad)

"""Norms of queries and keys before they are turned: over each head by itself, or over the width of all heads together.

Legend: B sequences, S positions, H heads, N head width, T = B*S tokens.
"""

import torch
from torch import nn

from mpillm.autograd.node import Node
from mpillm.comm import collectives
from mpillm.comm.sums import combine_tree
from mpillm.model.parameters import in_groups
from mpillm.nn.norm import inverse_rms, rms_gradients, scale_of
from mpillm.nn.split import add_over_blocks, later


class HeadNorms(nn.Module):
    """RMSNorm of every head, with one weight for all query heads and one for all key heads (Dehghani et al. 2023).

    A tensor rank sees a part of the gradients of the weights: that of its heads.
    """

    def __init__(self, split, model, table):
        super().__init__()
        self.query, self.key = (_HeadNorm(split, table[f"attention.{part}_norm.weight"], model) for part in ("query", "key"))

    def forward(self, queries, keys):
        """Map the blocks of queries and of keys, each ``[B, H, S, N]``. Local."""
        return self.query(queries), self.key(keys)


class _HeadNorm(nn.Module):
    def __init__(self, split, weight, model):
        super().__init__()
        self.split, self.eps, self.is_offset = split, model.norm_eps, model.norm_offset
        self.weight = split.parameter(weight)
        self._gradients = {}  # of a microbatch, by block, until all are there: they are added along the tree

    def forward(self, blocks):
        indices = [i for i, x in enumerate(blocks) if x.shape[1]]
        return [_NormOfHeads.apply(x, self.weight, self, i, indices) if x.shape[1] else x for i, x in enumerate(blocks)]

    def add(self, index, indices, gradient):
        """Take the weight's gradient of block ``index``; the last one of ``indices`` adds them all up."""
        self._gradients[index] = gradient
        if len(self._gradients) == len(indices):
            gradients, self._gradients = self._gradients, {}
            add_over_blocks(self.weight, [gradients.get(i) for i in range(self.split.local_blocks)])


class _NormOfHeads(Node):
    @staticmethod
    def forward(ctx, x_BHSN, weight, norm, index, indices):
        ctx.norm, ctx.index, ctx.indices = norm, index, indices
        wide = x_BHSN.to(torch.promote_types(x_BHSN.dtype, torch.float32))
        inverse = inverse_rms(wide, norm.eps)
        ctx.save_for_backward(x_BHSN, inverse)
        return (wide * inverse).mul_(scale_of(weight, norm.is_offset, wide.dtype)).to(x_BHSN.dtype)

    @staticmethod
    def backward(ctx, dy_BHSN):
        (x_BHSN, inverse), norm = ctx.saved_tensors, ctx.norm
        rows = [each.transpose(1, 2).reshape(-1, each.shape[-1]) for each in (dy_BHSN, x_BHSN, inverse)]
        dx, dw = rms_gradients(*rows, scale_of(norm.weight, norm.is_offset, inverse.dtype), norm.split.is_exact)
        norm.split.weight_gradients.add(later(norm.add, ctx.index, ctx.indices, dw))
        sequences, heads, positions, width = x_BHSN.shape
        return dx.view(sequences, positions, heads, width).transpose(1, 2), None, None, None, None


class WholeNorms(nn.Module):
    """RMSNorm over the width of all query heads together, and of all key heads (OLMo et al. 2024).

    The squares of all ranks are added up, queries' and keys' in one message; backward adds up as many numbers. Where every
    rank has all keys, theirs need no message.
    """

    def __init__(self, split, model, table):
        super().__init__()
        self.split, self.eps, self.is_offset = split, model.norm_eps, model.norm_offset
        self.query, self.key = (split.parameter(table[f"attention.{part}_norm.weight"]) for part in ("query", "key"))
        self.widths = tuple(count * model.head_dim for count in (model.num_heads, model.num_kv_heads))
        self.has_all_keys = not in_groups(model.num_kv_heads, split.size, split.is_exact)

    def forward(self, queries, keys):
        """Map the blocks of queries and of keys, each ``[B, H, S, N]``. Collective over the tensor axis, as is backward."""
        found = _WholeNorms.apply(self, self.query, self.key, *queries, *keys)
        return found[:len(queries)], found[len(queries):]

    def means(self, of_queries, of_keys):
        """Return the mean over the width of what the blocks of this rank have the sums of, ``[T]`` each, for queries and
        keys."""
        sums, group = [combine_tree(of_queries), combine_tree(of_keys)], self.split.group
        if self.split.size > 1 and self.has_all_keys:
            sums[0] = collectives.allreduce(sums[0], group)
        elif self.split.size > 1:
            sums = collectives.allreduce(torch.stack(sums), group)
        return [total / width for total, width in zip(sums, self.widths)]


class _WholeNorms(Node):
    @staticmethod
    def forward(ctx, norms, query_weight, key_weight, *blocks):
        ctx.norms, half = norms, len(blocks) // 2
        dtype = torch.promote_types(blocks[0].dtype, torch.float32)
        rows = [_rows(x) for x in blocks]
        squares = [x.to(dtype).square().sum(1) for x in rows]
        inverses = [mean.add(norms.eps).rsqrt_()[:, None] for mean in norms.means(squares[:half], squares[half:])]
        ctx.save_for_backward(*rows, *inverses)
        scales = _block_scales(norms, rows, dtype)
        return tuple(_heads((x * inverses[i >= half] * scale).to(x.dtype), block)
                     for i, (x, scale, block) in enumerate(zip(rows, scales, blocks)))

    @staticmethod
    def backward(ctx, *grads_BHSN):
        norms, (*rows, q_inverse, k_inverse) = ctx.norms, ctx.saved_tensors
        half, inverses, dtype = len(rows) // 2, (q_inverse, k_inverse), q_inverse.dtype
        dys = [_rows(grad) for grad in grads_BHSN]
        slopes = [dy * scale for dy, scale in zip(dys, _block_scales(norms, rows, dtype))]
        dots = [(slope * x).sum(1) for slope, x in zip(slopes, rows)]
        means = norms.means(dots[:half], dots[half:])
        gradients = []
        for i, (slope, x, grad) in enumerate(zip(slopes, rows, grads_BHSN)):
            inverse, mean = inverses[i >= half], means[i >= half]
            dx = slope.sub_(x * (inverse.square() * mean[:, None])).mul_(inverse)
            gradients.append(_heads(dx.to(x.dtype), grad))
        dws = [(dy * (x * inverses[i >= half])).sum(0) for i, (dy, x) in enumerate(zip(dys, rows))]
        norms.split.weight_gradients.add(later(_accumulate, norms.query, dws[:half]))
        norms.split.weight_gradients.add(later(_accumulate, norms.key, dws[half:]))
        return None, None, None, *gradients


QK_NORMS = {"head": HeadNorms, "whole": WholeNorms}


def _accumulate(weight, parts):
    """Add the gradients of a weight's consecutive parts."""
    add_over_blocks(weight, [torch.cat(parts)])


def _block_scales(norms, rows, dtype):
    """Return what each block of queries and of keys is multiplied by."""
    half, scales = len(rows) // 2, []
    for weight, own in ((norms.query, rows[:half]), (norms.key, rows[half:])):
        scales += scale_of(weight, norms.is_offset, dtype).split([x.shape[1] for x in own])
    return scales


def _rows(x_BHSN):
    """Return ``[T, H*N]``."""
    return x_BHSN.transpose(1, 2).flatten(2).flatten(0, 1)


def _heads(x_TF, like_BHSN):
    """Return ``[B, H, S, N]``."""
    sequences, heads, positions, width = like_BHSN.shape
    return x_TF.view(sequences, positions, heads, width).transpose(1, 2)

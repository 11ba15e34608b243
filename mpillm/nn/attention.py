"""Grouped-query attention with rotary positions, heads split over the tensor axis.

Legend: B sequences, S positions, H query heads, K key/value heads, N head width, T = B*S tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpillm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear, project


@dataclass
class Batch:
    """The shape of a microbatch and what attention needs of it.

    ``cos_SN``, ``sin_SN`` are the rotary tables of the positions at hand, ``mask`` (B, 1, S, S') says who sees whom
    (``None``: causal), ``cache`` keeps keys and values while sampling.
    """

    sequences: int
    positions: int
    cos_SN: torch.Tensor
    sin_SN: torch.Tensor
    mask: torch.Tensor | None = None
    cache: "KeyValueCache | None" = None

    @property
    def tokens(self):
        """Return the number of tokens."""
        return self.sequences * self.positions


class KeyValueCache:
    """Keys and values of the tokens seen so far, by attention block."""

    def __init__(self):
        self._kept = {}

    def extend(self, block, k, v):
        """Append along the positions; return all keys and values of ``block``."""
        if block in self._kept:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(self._kept[block], (k, v)))
        self._kept[block] = (k, v)
        return k, v


class Attention(nn.Module):
    """Self-attention of one layer; each block of heads maps the whole input to a partial sum of the output.

    With at least as many key/value heads as tensor ranks, a rank holds whole key/value groups. With fewer, query heads
    are split, every rank keeps the (small) key and value weights whole and computes the heads its queries need; but
    ``exact`` always splits by whole groups, so that its blocks are the same at any size: some ranks then have no heads.
    """

    def __init__(self, name, split, model, std, recompute=False):
        super().__init__()
        self.split, self.head_dim, self.recompute = split, model.head_dim, recompute
        self.group_size = model.num_heads // model.num_kv_heads
        self.is_grouped = split.is_exact or split.size <= model.num_kv_heads
        units, group = (model.num_kv_heads, self.group_size) if self.is_grouped else (model.num_heads, 1)
        width, unit = model.hidden_size, group * model.head_dim
        self.query = ColumnParallelLinear(f"{name}.query.weight", split, width, units, unit)
        self.key, self.value = (
            ColumnParallelLinear(f"{name}.{part}.weight", split, width, model.num_kv_heads, model.head_dim,
                                 is_whole=not self.is_grouped)
            for part in ("key", "value")
        )
        self.output = RowParallelLinear(f"{name}.output.weight", split, width, units, unit, std)
        self._blocks = [self._block(block) for block in split.owned_blocks(units)]

    def forward(self, parts, batch):
        """Map each block's input ``[T, D]`` to its partial output ``[T, D]``."""
        return [self._attend_block(i, x_TD, batch) for i, x_TD in enumerate(parts)]

    def _block(self, units):
        """Return the projections into a block of heads and out of it, and the key/value head that serves each query head, or
        None where each serves equally many in turn."""
        kv_heads = units if self.is_grouped else (units[0] // self.group_size, -(-units[1] // self.group_size))
        heads = Projection(self.split, (self.query, self.query.rows(units)), (self.key, self.key.rows(kv_heads)),
                           (self.value, self.value.rows(kv_heads)))
        served = None if self.is_grouped else [h // self.group_size - kv_heads[0] for h in range(*units)]
        return heads, Projection(self.split, (self.output, self.output.rows(units))), served

    def _attend_block(self, index, x_TD, batch):
        heads, output, served = self._blocks[index]
        q, k, v = _Heads.apply(x_TD, heads.weight, heads, self.head_dim, batch)
        if self.recompute and torch.is_grad_enabled():
            o_BHSN = checkpoint(self._attend, q, k, v, batch, served, index, use_reentrant=False,
                                preserve_rng_state=False)
        else:
            o_BHSN = self._attend(q, k, v, batch, served, index)
        return project(o_BHSN.transpose(1, 2).reshape(batch.tokens, -1), output)

    def _attend(self, q, k, v, batch, served, index):
        """Attend: ``[B, H, S, N]``, ``[B, K, S, N]`` twice → ``[B, H, S, N]``."""
        if q.shape[1] == 0:
            return q
        if batch.cache is not None:
            k, v = batch.cache.extend((self, index), k, v)
        k, v = self._serve(k, served), self._serve(v, served)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask, is_causal=batch.mask is None)

    def _serve(self, x_BKSN, served):
        """Repeat key/value heads so that each query head finds its own."""
        if served is not None:
            return x_BKSN[:, served]
        return x_BKSN.repeat_interleave(self.group_size, dim=1) if self.group_size > 1 else x_BKSN


def rotary_tables(head_dim, positions, theta, dtype, device="cpu"):
    """Return cos and sin of the angles (Su et al. 2021), each ``[positions, N/2]``, computed in float64."""
    rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.as_tensor(positions, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Heads(torch.autograd.Function):
    """Queries, keys and values of a block of heads, ``[B, H, S, N]``, the first two turned by their positions."""

    @staticmethod
    def forward(ctx, x_TD, weight, projection, head_dim, batch):
        ctx.save_for_backward(x_TD)
        ctx.projection, ctx.head_dim, ctx.batch = projection, head_dim, batch
        q, k, v = _by_head(projection, projection.forward(x_TD), head_dim, batch)
        for x in (q, k):
            _turn(x, batch, 1)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads_BHSN):
        (x_TD,), projection = ctx.saved_tensors, ctx.projection
        grads = projection.empty(x_TD)
        q, k, v = parts = _by_head(projection, grads, ctx.head_dim, ctx.batch)
        for part, grad in zip(parts, grads_BHSN):
            part.copy_(grad)
        for x in (q, k):
            _turn(x, ctx.batch, -1)
        return projection.backward(x_TD, grads, ctx.needs_input_grad[0]), None, None, None, None


def _by_head(projection, outputs, head_dim, batch):
    """Return views ``[B, H, S, N]`` of queries, keys and values, of whose heads there may be none."""
    return [part.view(batch.sequences, batch.positions, part.shape[1] // head_dim, head_dim).transpose(1, 2)
            for part in projection.parts(outputs)]


def _turn(x_BHSN, batch, sign):
    """Turn the pairs ``(i, i + N/2)`` of each head by ``sign`` (1 or -1) times the position's angles, where they lie."""
    half = x_BHSN.shape[-1] // 2
    a, b = x_BHSN[..., :half], x_BHSN[..., half:]
    a_before = a.clone()
    a.mul_(batch.cos_SN).addcmul_(b, batch.sin_SN, value=-sign)
    b.mul_(batch.cos_SN).addcmul_(a_before, batch.sin_SN, value=sign)

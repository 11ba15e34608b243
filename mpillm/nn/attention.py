"""Grouped-query attention with rotary positions, heads split over the tensor axis.

Legend: B sequences, S positions, H query heads, K key/value heads, N head width, T = B*S tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpillm.nn.linear import ColumnParallelLinear, RowParallelLinear, products


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
        self.blocks = split.owned_blocks(units)

    def forward(self, parts, batch):
        """Map each block's input ``[T, D]`` to its partial output ``[T, D]``."""
        return [self._block(i, x_TD, batch) for i, x_TD in enumerate(parts)]

    def _block(self, index, x_TD, batch):
        units = self.blocks[index]
        kv_heads = units if self.is_grouped else (units[0] // self.group_size, -(-units[1] // self.group_size))
        q, k, v = products(x_TD, self.split, (self.query, self.query.rows(units)),
                           (self.key, self.key.rows(kv_heads)), (self.value, self.value.rows(kv_heads)))
        served = None if self.is_grouped else [h // self.group_size - kv_heads[0] for h in range(*units)]
        core = self._core
        if self.recompute and torch.is_grad_enabled():
            o_TD = checkpoint(core, q, k, v, batch, served, index, use_reentrant=False, preserve_rng_state=False)
        else:
            o_TD = core(q, k, v, batch, served, index)
        return products(o_TD, self.split, (self.output, self.output.rows(units)))[0]

    def _core(self, q, k, v, batch, served, index):
        """Attend: ``[T, H*N]``, ``[T, K*N]`` twice → ``[T, H*N]``."""
        q, k, v = (x.view(batch.sequences, batch.positions, -1, self.head_dim) for x in (q, k, v))
        q, k = (_Rotary.apply(x, batch.cos_SN, batch.sin_SN) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.shape[1] == 0:
            return q.reshape(batch.tokens, 0)
        if batch.cache is not None:
            k, v = batch.cache.extend((self, index), k, v)
        k, v = self._serve(k, served), self._serve(v, served)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask, is_causal=batch.mask is None)
        return o.transpose(1, 2).reshape(batch.tokens, -1)

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


class _Rotary(torch.autograd.Function):
    """Turn the pairs ``(i, i + N/2)`` of each head by the position's angles; backward turns them back."""

    @staticmethod
    def forward(ctx, x_BSHN, cos_SN, sin_SN):
        ctx.save_for_backward(cos_SN, sin_SN)
        return _turn(x_BSHN, cos_SN, sin_SN)

    @staticmethod
    def backward(ctx, dy):
        cos_SN, sin_SN = ctx.saved_tensors
        return _turn(dy, cos_SN, -sin_SN), None, None


def _turn(x_BSHN, cos_SN, sin_SN):
    half = x_BSHN.shape[-1] // 2
    cos, sin = cos_SN[:, None], sin_SN[:, None]
    a, b = x_BSHN[..., :half], x_BSHN[..., half:]
    out = torch.empty(x_BSHN.shape, dtype=x_BSHN.dtype, device=x_BSHN.device)
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out

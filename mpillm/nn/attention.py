"""Grouped-query attention, heads split over the tensor axis.

Legend: B sequences, S positions, H query heads, K key/value heads, N head width, T = B*S tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpillm.autograd.node import Node
from mpillm.model.parameters import in_groups
from mpillm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear, project
from mpillm.nn.positions import turn
from mpillm.nn.qk_norm import QK_NORMS


class HeadBlock(NamedTuple):
    """A block of heads: what it is projected with, in and out; and which of its key/value heads each of its query heads asks,
    ``None`` where as many in turn ask each."""

    heads: Projection
    output: Projection
    served: list | None


class Attention(nn.Module):
    """Self-attention of one layer; each block of heads maps the whole input to a partial sum of the output.

    With at least as many key/value heads as tensor ranks, a rank holds whole key/value groups. With fewer, query heads
    are split, every rank keeps the (small) key and value weights whole and computes the heads its queries need; but
    ``exact`` always splits by whole groups, so that its blocks are the same at any size: some ranks then have no heads.

    Parameters
    ----------
    split : TensorSplit
    model : mpillm.model.description.Model
    table : dict of str to Parameter
        Of the layer.
    is_recomputed : bool
        Whether backward computes once more what lies between the projections.
    """

    def __init__(self, split, model, table, is_recomputed=False):
        super().__init__()
        self.split, self.head_dim, self.is_recomputed = split, model.head_dim, is_recomputed
        self.is_causal, self.group_size = model.attention == "causal", model.num_heads // model.num_kv_heads
        self.query, self.key, self.value = (
            ColumnParallelLinear(split, table[f"attention.{part}.weight"], table.get(f"attention.{part}.bias"))
            for part in ("query", "key", "value"))
        self.output = RowParallelLinear(split, table["attention.output.weight"], table.get("attention.output.bias"))
        if in_groups(model.num_kv_heads, split.size, split.is_exact):
            self._blocks = [self._groups(block) for block in split.owned_blocks(model.num_kv_heads)]
        else:
            self._blocks = [self._single_heads(split.owned(model.num_heads), model)]
        self.qk_norm = QK_NORMS[model.qk_norm](split, model, table) if model.qk_norm in QK_NORMS else None

    def _groups(self, groups):
        """Return the block of some key/value heads with all query heads that ask them."""
        return self._block(groups, self.group_size * self.head_dim, groups, None)

    def _single_heads(self, heads, model):
        """Return the block of some query heads with the key/value heads that they ask, which other ranks have, too."""
        kv_heads = heads[0] // self.group_size, -(-heads[1] // self.group_size)
        if model.qk_norm == "whole":  # over the width of all keys
            kv_heads = 0, model.num_kv_heads
        return self._block(heads, self.head_dim, kv_heads, [h // self.group_size - kv_heads[0] for h in range(*heads)])

    def _block(self, queries, unit, kv_heads, served):
        parts = (self.query.block(queries, unit), self.key.block(kv_heads, self.head_dim),
                 self.value.block(kv_heads, self.head_dim))
        return HeadBlock(Projection(self.split, *parts), Projection(self.split, self.output.block(queries, unit)), served)

    def forward(self, x_TD, batch):
        """Map activations as they lie between layers. Collective over the tensor axis."""
        return self.output.leave(self.parts(x_TD, batch), batch.tokens)

    def parts(self, x_TD, batch):
        """Return each block's partial output ``[T, D]`` for all tokens, without the bias."""
        inputs = self.split.enter(x_TD, batch.tokens)
        turns = self.qk_norm is None
        heads = [_Heads.apply(x, block.heads.weight, block.heads, self.head_dim, batch, turns)
                 for x, block in zip(inputs, self._blocks)]
        if self.qk_norm is not None:
            queries, keys, values = zip(*heads)
            heads = [(_Turn.apply(q, batch), _Turn.apply(k, batch), v)
                     for q, k, v in zip(*self.qk_norm(queries, keys), values)]
        return [self._attend_block(i, *own, batch) for i, own in enumerate(heads)]

    def _attend_block(self, index, q, k, v, batch):
        attend = self._attend
        if self.is_recomputed and torch.is_grad_enabled():
            o_BHSN = checkpoint(attend, index, q, k, v, batch, use_reentrant=False, preserve_rng_state=False)
        else:
            o_BHSN = attend(index, q, k, v, batch)
        return project(o_BHSN.transpose(1, 2).reshape(batch.tokens, -1), self._blocks[index].output)

    def _attend(self, index, q, k, v, batch):
        """Attend: ``[B, H, S, N]``, ``[B, K, S, N]`` twice → ``[B, H, S, N]``."""
        if q.shape[1] == 0:
            return q
        served = self._blocks[index].served
        if batch.cache is not None:
            return batch.cache.attend((self, index), q, *((k, v) if served is None else (k[:, served], v[:, served])))
        k, v = self._serve(k, served), self._serve(v, served)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask, is_causal=self.is_causal and batch.mask is None)

    def _serve(self, x_BKSN, served):
        """Repeat key/value heads so that each query head finds its own."""
        if served is not None:
            return x_BKSN[:, served]
        return x_BKSN.repeat_interleave(self.group_size, dim=1) if self.group_size > 1 else x_BKSN


class _Heads(Node):
    """Queries, keys and values of a block of heads, ``[B, H, S, N]``, the first two turned by their positions, unless a norm
    comes between."""

    @staticmethod
    def forward(ctx, x_TD, weight, projection, head_dim, batch, turns):
        ctx.save_for_backward(x_TD if projection.is_trained else None)
        ctx.projection, ctx.head_dim, ctx.batch, ctx.turns = projection, head_dim, batch, turns
        outputs = projection.forward(x_TD)
        if turns:
            _turn_in_place(projection, outputs, head_dim, batch, 1)
        return tuple(_by_head(part, head_dim, batch) for part in projection.parts(outputs))

    @staticmethod
    def backward(ctx, *grads_BHSN):
        (x_TD,), projection = ctx.saved_tensors, ctx.projection
        grads = projection.empty(ctx.batch.tokens, grads_BHSN[0])
        for part, grad in zip(projection.parts(grads), grads_BHSN):
            _by_head(part, ctx.head_dim, ctx.batch).copy_(grad)
        if ctx.turns:
            _turn_in_place(projection, grads, ctx.head_dim, ctx.batch, -1)
        return projection.backward(x_TD, grads, ctx.needs_input_grad[0]), None, None, None, None, None


def _turn_in_place(projection, outputs, head_dim, batch, sign):
    """Turn queries and keys, at once where they lie side by side."""
    queries, keys, _ = projection.parts(outputs)
    side_by_side = [queries, keys] if len(outputs) > 1 else [outputs[0][:, :queries.shape[1] + keys.shape[1]]]
    for part in side_by_side:
        turn(_by_head(part, head_dim, batch), batch, sign)


def _by_head(x_TF, head_dim, batch):
    """Return a view ``[B, H, S, N]``; there may be no heads."""
    return x_TF.view(batch.sequences, batch.positions, x_TF.shape[1] // head_dim, head_dim).transpose(1, 2)


class _Turn(Node):
    """Queries or keys turned by their positions."""

    @staticmethod
    def forward(ctx, x_BHSN, batch):
        ctx.batch = batch
        x_BHSN = x_BHSN.clone()
        turn(x_BHSN, batch, 1)
        return x_BHSN

    @staticmethod
    def backward(ctx, dx_BHSN):
        dx_BHSN = dx_BHSN.clone()
        turn(dx_BHSN, ctx.batch, -1)
        return dx_BHSN, None

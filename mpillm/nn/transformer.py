"""The transformer, one pipeline stage at a time.

Legend: T tokens, D model, F feed-forward, V vocabulary. Activations between layers are ``[T, D]``, replicated over the
tensor axis, or sharded by tokens with sequence parallelism (Korthikanti et al. 2022).
"""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from mpillm.nn.attention import Attention
from mpillm.nn.embedding import VocabularyEmbedding
from mpillm.nn.init import INITIAL_STD
from mpillm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear
from mpillm.nn.loss import VocabularyHead
from mpillm.nn.norm import RMSNorm


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate x) * up x)``; each block of F maps the input to a partial output."""

    def __init__(self, name, split, model, std):
        super().__init__()
        self.split, size = split, model.ffn_size
        self.gate, self.up = (ColumnParallelLinear(f"{name}.{part}.weight", split, model.hidden_size, size)
                              for part in ("gate", "up"))
        self.down = RowParallelLinear(f"{name}.down.weight", split, model.hidden_size, size, std=std)
        self._blocks = [self._block(self.gate.rows(block)) for block in split.owned_blocks(size)]

    def forward(self, parts):
        """Map each block's input ``[T, D]`` to its partial output ``[T, D]``."""
        return [_SwiGLU.apply(x_TD, up.weight, up, down) for (up, down), x_TD in zip(self._blocks, parts)]

    def _block(self, rows):
        """Return what a block is projected with, up and down."""
        up = Projection(self.split, (self.gate, rows), (self.up, rows))
        return up, Projection(self.split, (self.down, rows))


class _SwiGLU(torch.autograd.Function):
    """``down(silu(gate x) * up x)``, of which the outputs of gate and up are kept."""

    @staticmethod
    def forward(ctx, x_TD, weight, up_projection, down_projection):
        outputs = up_projection.forward(x_TD)
        gate_TF, up_TF = up_projection.parts(outputs)
        ctx.up_projection, ctx.down_projection = up_projection, down_projection
        ctx.save_for_backward(x_TD, *outputs)
        return down_projection.forward(silu(gate_TF).mul_(up_TF))[0]

    @staticmethod
    def backward(ctx, dy_TD):
        """Compute once more what lies between. The gradients of gate and up take their place, so this runs once."""
        x_TD, *outputs = ctx.saved_tensors
        gate_TF, up_TF = ctx.up_projection.parts(outputs)
        silu_TF = silu(gate_TF)
        slope_TF = ctx.down_projection.backward(silu_TF * up_TF, [dy_TD])
        torch.ops.aten.silu_backward.grad_input(slope_TF * up_TF, gate_TF, grad_input=gate_TF)
        torch.mul(silu_TF, slope_TF, out=up_TF)
        return ctx.up_projection.backward(x_TD, outputs, ctx.needs_input_grad[0]), None, None, None


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual connection."""

    def __init__(self, index, split, model, recompute="none"):
        super().__init__()
        name, std = f"layers.{index}", INITIAL_STD / math.sqrt(2 * model.num_layers)
        self.split, self.is_recomputed = split, recompute == "full"
        self.attention_norm = RMSNorm(f"{name}.attention_norm.weight", split, model.hidden_size, model.norm_eps)
        self.attention = Attention(f"{name}.attention", split, model, std, recompute == "selective")
        self.ffn_norm = RMSNorm(f"{name}.ffn_norm.weight", split, model.hidden_size, model.norm_eps)
        self.ffn = FeedForward(f"{name}.ffn", split, model, std)

    def forward(self, x_TD, batch):
        """Map activations to activations, recomputing them in backward if asked."""
        if self.is_recomputed and torch.is_grad_enabled():
            return checkpoint(self._layer, x_TD, batch, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x_TD, batch)

    def _layer(self, x_TD, batch):
        split, total = self.split, batch.tokens
        parts = split.enter(self.attention_norm(x_TD, total), total)
        x_TD = x_TD + split.leave(self.attention(parts, batch))
        parts = split.enter(self.ffn_norm(x_TD, total), total)
        return x_TD + split.leave(self.ffn(parts))


class TransformerStage(nn.Module):
    """The layers ``[start, stop)`` of a model, with the embedding before the first and norm and head after the last.

    Parameters
    ----------
    model : mpillm.config.Model
        With ``vocab_size`` known.
    split : TensorSplit
    start, stop : int
    recompute : str or sequence of str
        ``"none"``, ``"selective"`` (the attention core is recomputed in backward) or ``"full"`` (whole layers), one
        for all layers of the model or one each.
    """

    def __init__(self, model, split, start, stop, recompute="none"):
        super().__init__()
        modes = [recompute] * model.num_layers if isinstance(recompute, str) else recompute
        self.model, self.split, self.start, self.stop = model, split, start, stop
        self.is_first, self.is_last = start == 0, stop == model.num_layers
        size, width = model.vocab_size, model.hidden_size
        self.embedding = None
        if self.is_first:
            self.embedding = VocabularyEmbedding("embedding.weight", split, size, width, INITIAL_STD)
        self.layers = nn.ModuleList(Layer(i, split, model, modes[i]) for i in range(start, stop))
        self.norm = RMSNorm("norm.weight", split, width, model.norm_eps) if self.is_last else None
        self.head = None
        if self.is_last:
            name = "embedding.weight" if model.tie_embeddings else "head.weight"
            self.head = VocabularyHead(name, split, size, width, INITIAL_STD)

    def forward(self, x, batch):
        """Map tokens ``[T]`` (first stage) or activations to activations of this stage's last layer."""
        if self.is_first:
            x = self.split.collect(self.embedding(x))
        if batch.mask is not None:  # added to scores: one for all layers, each of which would make and keep its own
            scores = torch.zeros(batch.mask.shape, dtype=x.dtype, device=x.device)
            batch = replace(batch, mask=scores.masked_fill_(~batch.mask, -math.inf))
        for layer in self.layers:
            x = layer(x, batch)
        return x

    def loss(self, x_TD, batch, targets_T, scale):
        """Return ``scale`` times the summed cross-entropy of the last stage's activations; replicated."""
        return self.head.loss(self._final(x_TD, batch), targets_T, scale)

    def logits(self, x_TD, batch):
        """Return the logits ``[T, V]`` of the last stage's activations on every tensor rank."""
        return self.head.logits(self._final(x_TD, batch))

    def _final(self, x_TD, batch):
        return self.split.spread(self.norm(x_TD, batch.tokens), batch.tokens)

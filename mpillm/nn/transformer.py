"""The transformer, one pipeline stage at a time, as its description says (:mod:`mpillm.model`).

Legend: T tokens, D model, V vocabulary. Activations between layers are ``[T, D]``, replicated over the tensor axis, or
sharded by tokens with sequence parallelism (Korthikanti et al. 2022).
"""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpillm.model.parameters import first_parameters, last_parameters, layer_parameters
from mpillm.nn.attention import Attention
from mpillm.nn.embedding import Embedding
from mpillm.nn.feed_forward import FeedForward
from mpillm.nn.loss import ChoiceHead
from mpillm.nn.norm import make_norm
from mpillm.nn.positions import pooled, shares_of_mean
from mpillm.nn.scores import SCORES
from mpillm.nn.transform import Transform
from mpillm.nn.values import ValueHead


class Layer(nn.Module):
    """Attention and feed-forward, each with a norm and a residual connection.

    Parameters
    ----------
    index : int
    split : TensorSplit
    model : mpillm.model.description.Model
    recompute : {"none", "selective", "full"}
    """

    def __init__(self, index, split, model, recompute="none"):
        super().__init__()
        table = layer_parameters(model, index)
        self.split, self.is_recomputed = split, recompute == "full"
        self.placement, self.is_parallel = model.norm_placement, model.residual == "parallel"
        self.attention_norm = make_norm(table, "attention_norm", split, model)
        self.attention = Attention(split, model, table, recompute == "selective")
        self.ffn_norm = make_norm(table, "ffn_norm", split, model)
        self.ffn = FeedForward(split, model, table)

    def forward(self, x_TD, batch):
        """Map activations to activations, recomputing them in backward if asked."""
        layer = self._both_beside if self.is_parallel else self._one_behind_the_other
        if self.is_recomputed and torch.is_grad_enabled():
            return checkpoint(layer, x_TD, batch, use_reentrant=False, preserve_rng_state=False)
        return layer(x_TD, batch)

    def _one_behind_the_other(self, x_TD, batch):
        x_TD = self._add(x_TD, self.attention, self.attention_norm, batch)
        return self._add(x_TD, self.ffn, self.ffn_norm, batch)

    def _add(self, x_TD, half, norm, batch):
        """Return ``x + half(x)`` with the norm where the model has it."""
        y_TD = half(norm(x_TD, batch.tokens) if self.placement == "pre" else x_TD, batch)
        if self.placement == "output":
            y_TD = norm(y_TD, batch.tokens)
        y_TD = x_TD + y_TD
        return norm(y_TD, batch.tokens) if self.placement == "post" else y_TD

    def _both_beside(self, x_TD, batch):
        """Return ``x + attention(norm x) + ffn(norm x)``, whose partial sums meet once."""
        attended = self.attention.parts(self.attention_norm(x_TD, batch.tokens), batch)
        fed = self.ffn.parts(self.ffn_norm(x_TD, batch.tokens), batch)
        y_TD = self.split.leave([a + f for a, f in zip(attended, fed)])
        for projection in (self.attention.output, self.ffn.down):
            y_TD = projection.add_bias(y_TD, batch.tokens)
        return x_TD + y_TD


class TransformerStage(nn.Module):
    """The layers ``[start, stop)`` of a model, with the embedding before the first and norm and head after the last.

    Parameters
    ----------
    model : mpillm.model.description.Model
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
        first, last = first_parameters(model), last_parameters(model)
        self.embedding = Embedding(split, model, first) if self.is_first else None
        self.layers = nn.ModuleList(Layer(i, split, model, modes[i]) for i in range(start, stop))
        self.norm = make_norm(last, "norm", split, model) if self.is_last else None
        self.transform = Transform(split, model, last) if self.is_last and "head.transform.weight" in last else None
        self.scores = None  # of what was evaluated since somebody took them
        head = ValueHead if model.head == "values" else ChoiceHead
        self.head = head(split, model, {**first, **last}) if self.is_last else None

    @property
    def tied(self):
        """The matrices of this stage that embedding and head share, where they do."""
        parts = [self.embedding and self.embedding.words, self.head] if self.model.tie_embeddings else []
        return [part.weight for part in parts if part is not None]

    def forward(self, x, batch):
        """Map tokens ``[T]`` (first stage) or activations to activations of this stage's last layer."""
        if self.is_first:
            x = self.embedding(x, batch)
        if batch.mask is not None:  # added to scores: one for all layers, each of which would make and keep its own
            scores = torch.zeros(batch.mask.shape, dtype=x.dtype, device=x.device)
            batch = replace(batch, mask=scores.masked_fill_(~batch.mask, -math.inf))
        for layer in self.layers:
            x = layer(x, batch)
        return x

    def loss(self, x_TD, batch, targets, scale):
        """Return ``scale`` times the summed loss of the last stage's activations; replicated.

        Where no gradient is wanted, what is beside the loss in the head's field is added to :attr:`scores`.
        """
        x = self._final(x_TD, batch)
        if self.model.head in SCORES and not torch.is_grad_enabled():
            found = SCORES[self.model.head](self.head.logits(x), targets)
            self.scores = found if self.scores is None else self.scores + found
        return self.head(x, targets, scale)

    def logits(self, x_TD, batch):
        """Return what the head gives, ``[T, V]`` or one row a sequence, on every tensor rank."""
        return self.head.logits(self._final(x_TD, batch))

    def own_logits(self, x_TD, batch):
        """Return the blocks of these that this tensor rank has, each with the number of its first word or label."""
        return self.head.own_logits(self._final(x_TD, batch))

    def _final(self, x_TD, batch):
        """Return all tokens, or one vector a sequence, for this rank's part of the head."""
        for part in (self.norm, self.transform):
            if part is not None:
                x_TD = part(x_TD, batch.tokens)
        if self.model.pooling == "mean":  # before ranks' gradients are added: a quotient of a sum has other bits
            x_TD = x_TD * self.split.own(shares_of_mean(batch, x_TD))[:, None]
        x_TD = self.split.spread(x_TD, batch.tokens)
        return x_TD if self.model.pooling == "none" else pooled(x_TD, batch, self.model.pooling)

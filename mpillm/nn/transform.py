"""The transform before a head (Devlin et al. 2019), a product and an activation for each token: before masked words with a
norm, before what is pooled with tanh.

Its weights are whole on every tensor rank, like those of a norm: each rank computes the tokens that lie there.
Legend: T tokens, D model.
"""

import torch
from torch import nn

from mpillm.autograd.node import Node
from mpillm.nn.feed_forward import ACTIVATIONS
from mpillm.nn.norm import make_norm
from mpillm.nn.split import add_over_blocks, first_trained, later


class Transform(nn.Module):
    """``norm(act(w x + b))`` token by token with the activation of the model's feed-forward, or of its gate; as a pooler
    ``tanh(w x + b)``.

    Parameters
    ----------
    split : TensorSplit
    model : mpillm.model.description.Model
    table : dict of str to Parameter
    """

    def __init__(self, split, model, table):
        super().__init__()
        self.split, self.activation = split, ACTIVATIONS["tanh" if model.pooler else model.activation]
        self.weight, self.bias = (split.parameter(table[f"head.transform.{part}"]) for part in ("weight", "bias"))
        self.norm = make_norm(table, "head.norm", split, model)

    def forward(self, x_TD, total):
        """Map the tokens this rank holds of ``total``. Local."""
        y_TD = _Transform.apply(x_TD, first_trained(self.weight, self.bias), self, total)
        return y_TD if self.norm is None else self.norm(y_TD, total)


class _Transform(Node):
    @staticmethod
    def forward(ctx, x, _, transform, total):
        split, weight = transform.split, transform.weight.detach()
        y = torch.cat([split.multiply(block, weight.t()) for block in split.token_blocks(x, total)]).add_(transform.bias)
        ctx.transform, ctx.total = transform, total
        ctx.save_for_backward(x, y)
        return transform.activation[0](y)

    @staticmethod
    def backward(ctx, dy):
        """The gradient of what goes through the activation takes its place, so this runs once."""
        (x, y), transform = ctx.saved_tensors, ctx.transform
        split = transform.split
        transform.activation[1](dy, y)
        blocks = split.token_blocks(y, ctx.total)
        split.weight_gradients.add(later(_accumulate, transform, blocks, split.token_blocks(x, ctx.total)))
        return torch.cat([split.multiply(block, transform.weight.detach()) for block in blocks]), None, None, None


def _accumulate(transform, slopes, inputs):
    """Add the gradients of weight and bias, those of blocks of tokens along the tree."""
    wide = torch.promote_types(slopes[0].dtype, torch.float32)
    pairs = [(slope, x) if len(x) else None for slope, x in zip(slopes, inputs)]
    if transform.weight.requires_grad:
        add_over_blocks(transform.weight, [pair and transform.split.multiply(pair[0].t(), pair[1]).to(wide) for pair in pairs])
    add_over_blocks(transform.bias, [pair and pair[0].sum(0, dtype=wide) for pair in pairs])

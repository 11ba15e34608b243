"""The vocabulary-parallel embedding: each tensor rank holds a block of the rows."""

import torch
from torch import nn

from mpillm.nn.split import gradient_of, later


class VocabularyEmbedding(nn.Module):
    """Look tokens up in a table whose rows are split over the tensor axis.

    ``forward`` returns rows of zeros for tokens of other ranks, that is a partial sum: pass it through
    :meth:`TensorSplit.leave`.
    """

    def __init__(self, name, split, vocab_size, width, std=0.02):
        super().__init__()
        self.split, self.rows = split, split.owned(vocab_size)
        self.weight = split.parameter(name, (vocab_size, width), self.rows, std)

    def forward(self, tokens_T):
        """Return ``[T, D]``, partial over the tensor axis."""
        return _Lookup.apply(tokens_T, self.weight, self)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight, embedding):
        low, high = embedding.rows
        ctx.embedding, ctx.tokens = embedding, tokens
        if embedding.split.size == 1:
            return weight[tokens]
        out = weight.new_zeros(len(tokens), weight.shape[1])
        is_here = (tokens >= low) & (tokens < high)
        out[is_here] = weight[tokens[is_here] - low]
        return out

    @staticmethod
    def backward(ctx, dy):
        ctx.embedding.split.weight_gradients.add(later(_accumulate, ctx.embedding, ctx.tokens, dy))
        return None, None, None


def _accumulate(embedding, tokens, dy):
    """Add each token's gradient to its row, in the order of tokens."""
    low, high = embedding.rows
    if embedding.split.size > 1:
        is_here = (tokens >= low) & (tokens < high)
        tokens, dy = tokens[is_here] - low, dy[is_here]
    grad = gradient_of(embedding.weight)
    grad.index_add_(0, tokens, dy.to(grad.dtype))

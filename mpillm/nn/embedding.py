"""What stands before the first layer: tokens, or patches of real numbers, become vectors. Each tensor rank holds a block of the
rows of every table.

Legend: B sequences, S positions, T = B*S tokens, P numbers of a patch, D model.
"""

import torch
from torch import nn

from mpillm.autograd.node import Node
from mpillm.nn.linear import Projection, RowParallelLinear, project
from mpillm.nn.norm import make_norm
from mpillm.nn.split import gradient_of, later


class Embedding(nn.Module):
    """A vector for every token, or patch; with learned positions the position's row is added; then, perhaps, a norm.

    Parameters
    ----------
    split : TensorSplit
    model : mpillm.model.description.Model
    table : dict of str to Parameter
    """

    def __init__(self, split, model, table):
        super().__init__()
        self.split, self.scale = split, model.embedding_scale
        are_tokens = model.inputs == "tokens"
        self.words = Table(split, table["embedding.weight"]) if are_tokens else None
        self.patches = None if are_tokens else Patches(split, table)
        self.positions = Table(split, table["positions.weight"]) if model.positions == "learned" else None
        self.norm = make_norm(table, "embedding_norm", split, model)

    def forward(self, inputs, batch):
        """Return ``[T, D]`` as activations lie between layers, of tokens ``[T]`` or patches ``[B, S, P]``.

        Collective over the tensor axis.
        """
        x_TD = self.words(inputs) if self.patches is None else self.patches(inputs)
        if self.scale != 1:
            x_TD = x_TD * self.scale
        if self.positions is not None:
            places_S = torch.arange(batch.positions, device=x_TD.device) if batch.places_S is None else batch.places_S
            x_TD = x_TD + self.positions(places_S.repeat(batch.sequences))
        x_TD = self.split.collect(x_TD)
        if self.patches is not None:
            x_TD = self.patches.add_bias(x_TD, batch)
        return x_TD if self.norm is None else self.norm(x_TD, batch.tokens)


class Patches(nn.Module):
    """Patches times a matrix, a tensor rank some of their numbers; before them, perhaps, a position that is the same in every
    sequence, to be pooled from (Dosovitskiy et al. 2021)."""

    def __init__(self, split, table):
        super().__init__()
        self.split = split
        self.linear = RowParallelLinear(split, table["patches.weight"], table["patches.bias"])
        self._units = split.owned_blocks(table["patches.weight"].shape[0])
        self.first = Table(split, table["class_position.weight"]) if "class_position.weight" in table else None

    def forward(self, patches_BSP):
        """Return ``[T, D]``, partial over the tensor axis, without the bias."""
        x_TP, sequences = patches_BSP.flatten(0, 1), len(patches_BSP)
        parts = [project(x_TP[:, slice(*units)].contiguous(), Projection(self.split, self.linear.block(units)))
                 for units in self._units]
        x_TD = self.split.add(parts)
        if self.first is None:
            return x_TD
        first_B1D = self.first(torch.zeros(sequences, dtype=torch.int64, device=x_TD.device))[:, None]
        return torch.cat((first_B1D, x_TD.unflatten(0, (sequences, -1))), 1).flatten(0, 1)

    def add_bias(self, x_TD, batch):
        """Add the bias to what this rank holds of all positions. Local."""
        return self.linear.add_bias(x_TD, batch.tokens)


class Table(nn.Module):
    """A matrix whose rows are looked up and are split over the tensor axis.

    ``forward`` returns rows of zeros for those of other ranks, that is a partial sum: pass it through
    :meth:`TensorSplit.collect`.
    """

    def __init__(self, split, weight):
        super().__init__()
        self.split, self.weight = split, split.parameter(weight)

    @property
    def rows(self):
        """Which rows ``(start, stop)`` this rank holds."""
        start = self.weight.shard.start // self.weight.shape[1]
        return start, start + len(self.weight)

    def forward(self, indices_T):
        """Return ``[T, D]``, partial over the tensor axis."""
        return _Lookup.apply(indices_T, self.weight, self)


class _Lookup(Node):
    @staticmethod
    def forward(ctx, indices, weight, table):
        low, high = table.rows
        ctx.table, ctx.indices = table, indices
        if table.split.size == 1:
            return weight[indices]
        out = weight.new_zeros(len(indices), weight.shape[1])
        is_here = (indices >= low) & (indices < high)
        out[is_here] = weight[indices[is_here] - low]
        return out

    @staticmethod
    def backward(ctx, dy):
        ctx.table.split.weight_gradients.add(later(_accumulate, ctx.table, ctx.indices, dy))
        return None, None, None


def _accumulate(table, indices, dy):
    """Add each gradient to its row, in the order of tokens."""
    low, high = table.rows
    if table.split.size > 1:
        is_here = (indices >= low) & (indices < high)
        indices, dy = indices[is_here] - low, dy[is_here]
    grad = gradient_of(table.weight)
    grad.index_add_(0, indices, dy.to(grad.dtype))

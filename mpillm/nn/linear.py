"""Column- and row-parallel linear layers, without bias.

Legend: T tokens, D input width, F output width (both of the whole layer), p tensor ranks.

============  ==========================  =====================  ==========================
layer         shard of the weight         forward                backward
============  ==========================  =====================  ==========================
column        ``w [F/p, D]``: outputs     ``y = x w^T``          ``dx = dy w``, ``dw = dy^T x``
row           ``w [D/p, F]``: inputs      ``y = x w``            ``dx = dy w^T``, ``dw = x^T dy``
============  ==========================  =====================  ==========================
"""

import torch
from torch import nn

from mpillm.nn.products import add_product
from mpillm.nn.split import gradient_of, later


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are split over the tensor axis.

    ``forward`` takes a whole input on every rank and returns this rank's outputs; pass it through
    :meth:`TensorSplit.enter` first, so that gradients are summed.

    Parameters
    ----------
    name : str
        Global name of the weight.
    split : TensorSplit
    in_features : int
        D.
    units, unit : int
        Outputs come in ``units`` indivisible groups of ``unit`` (heads, say); F = units * unit.
    std : float
        Of the initial weights.
    is_whole : bool
        Keep the whole weight on every rank, each computing the rows it needs: its gradient is partial.
    """

    is_transposed = True

    def __init__(self, name, split, in_features, units, unit=1, std=0.02, is_whole=False):
        super().__init__()
        self.split, self.unit = split, unit
        self.first = 0 if is_whole else split.owned(units)[0]
        rows = None if is_whole else tuple(unit * i for i in split.owned(units))
        self.weight = split.parameter(name, (units * unit, in_features), rows, std, is_partial_grad=is_whole)

    def rows(self, units):
        """Return the local rows ``(start, stop)`` of global units ``(start, stop)``."""
        return tuple(self.unit * (i - self.first) for i in units)

    def forward(self, x_TD):
        """Return ``x w^T``: ``[T, D] -> [T, F/p]``."""
        return products(x_TD, self.split, (self, (0, self.weight.shape[0])))[0]


class RowParallelLinear(ColumnParallelLinear):
    """A linear layer whose inputs are split over the tensor axis; its weight is stored input-first.

    ``forward`` takes this rank's inputs and returns a partial sum; pass it through :meth:`TensorSplit.leave`.

    Parameters
    ----------
    name, split, std
        As in :class:`ColumnParallelLinear`.
    out_features : int
        F.
    units, unit : int
        Inputs come in ``units`` groups of ``unit``; D = units * unit.
    """

    is_transposed = False

    def __init__(self, name, split, out_features, units, unit=1, std=0.02):
        super().__init__(name, split, out_features, units, unit, std)


def products(x_TD, split, *blocks):
    """Multiply ``x`` with several blocks of weights, each ``(layer, local rows)``; return the products in order.

    Local. Backward sums the input gradients in one buffer and hands the weight gradients to
    ``split.weight_gradients``.
    """
    return _Products.apply(x_TD, split, blocks, *[layer.weight for layer, _ in blocks])


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, split, blocks, *weights):
        ctx.save_for_backward(x)
        ctx.split, ctx.blocks = split, blocks
        return tuple(split.multiply(x, _matrix(layer, rows)) for layer, rows in blocks)

    @staticmethod
    def backward(ctx, *grads):
        (x,), multiply = ctx.saved_tensors, ctx.split.multiply
        ctx.split.weight_gradients.add(later(_accumulate, multiply, ctx.blocks, x.detach(), grads))
        dx = None
        if ctx.needs_input_grad[0]:
            for (layer, rows), dy in zip(ctx.blocks, grads):
                matrix = _matrix(layer, rows).t()
                dx = multiply(dy, matrix) if dx is None else add_product(dx, dy, matrix, multiply)
        return dx, None, None, *[None] * len(grads)


def _matrix(layer, rows):
    """Return the block as the right factor of a product."""
    block = layer.weight.detach()[slice(*rows)]
    return block.t() if layer.is_transposed else block


def _accumulate(multiply, blocks, x, grads):
    """Add the weight gradients of ``y = x @ matrix``."""
    for (layer, rows), dy in zip(blocks, grads):
        left, right = (dy, x) if layer.is_transposed else (x, dy)
        add_product(gradient_of(layer.weight, rows), left.t(), right, multiply)

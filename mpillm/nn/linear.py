"""Column- and row-parallel linear layers, without bias.

Legend: T tokens, D input width, F output width (both of the whole layer), p tensor ranks.

============  ==========================  =====================  ==========================
layer         shard of the weight         forward                backward
============  ==========================  =====================  ==========================
column        ``w [F/p, D]``: outputs     ``y = x w^T``          ``dx = dy w``, ``dw = dy^T x``
row           ``w [D/p, F]``: inputs      ``y = x w``            ``dx = dy w^T``, ``dw = x^T dy``
============  ==========================  =====================  ==========================
"""

from itertools import pairwise

import torch
from torch import nn

from mpillm.nn.products import add_product
from mpillm.nn.split import gradient_of, is_in_flat_storage, later


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
        return project(x_TD, Projection(self.split, (self, (0, self.weight.shape[0]))))


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


class Projection:
    """The product of one input with some rows of one weight or of several, without autograd: what the layers' autograd
    nodes are made of.

    Local. In flat storage the weights of a layer lie one behind the other; those of one input are then one matrix, and one
    product takes the place of several, forward and backward. ``exact`` gives each weight a product of its own, whose bits do
    not depend on what lies beside it.

    Parameters
    ----------
    split : TensorSplit
    parts : tuple of (ColumnParallelLinear, tuple of int)
        Layers, each with its local rows ``(start, stop)``. A row-parallel one is the only part.

    Attributes
    ----------
    weight : Parameter
        The first one, for nodes to take as an input, so that their outputs have gradients whatever ``x`` has.
    """

    def __init__(self, split, *parts):
        self.split, self.is_transposed = split, parts[0][0].is_transposed
        self._parts = [(layer.weight, rows) for layer, rows in parts]
        self._widths = [stop - start for _, (start, stop) in parts]
        self.weight = self._parts[0][0]
        self._places, self._factors, self._gradients = None, [], None

    def forward(self, x_TD):
        """Return the outputs, one for each product: :meth:`parts` tells them apart."""
        self._find()
        return [self.split.multiply(x_TD, right) for right, _ in self._factors]

    def backward(self, x_TD, grads, needs_dx=True):
        """Return the gradient of the input, or None, and hand those of the weights to ``split.weight_gradients``.

        ``grads`` are those of the outputs of :meth:`forward`, which may wait as they are until a ``W`` action. The input
        gradients of several are summed in one buffer.
        """
        self.split.weight_gradients.add(later(_accumulate, self, x_TD.detach(), grads))
        dx = None
        if needs_dx:
            multiply = self.split.multiply
            for (_, left), dy in zip(self._factors, grads):
                dx = multiply(dy, left) if dx is None else add_product(dx, dy, left, multiply)
        return dx

    def empty(self, x_TD):
        """Return room for the gradients of the outputs."""
        return [x_TD.new_empty(len(x_TD), right.shape[1]) for right, _ in self._factors]

    def parts(self, outputs):
        """Return views of the outputs, or of their gradients, one for each part."""
        return outputs if len(outputs) == len(self._parts) else outputs[0].split(self._widths, 1)

    def gradients(self):
        """Return where the gradients of the weights are kept, one for each product."""
        return self._gradients or [gradient_of(*part) for part in self._parts]

    def _find(self):
        """Find the matrices, each as the right factor of forward and that of backward; in flat storage only once, as long as
        weights and gradients lie where they did."""
        is_flat = all(is_in_flat_storage(weight) for weight, _ in self._parts)
        places = is_flat and [x.data_ptr() for weight, _ in self._parts for x in (weight, weight.main_grad)]
        if is_flat and places == self._places:
            return
        matrices, self._gradients = [weight.detach()[slice(*rows)] for weight, rows in self._parts], None
        if is_flat:
            gradients = [gradient_of(*part) for part in self._parts]
            if not self.split.is_exact and lie_together(matrices) and lie_together(gradients):
                matrices, gradients = [joined(matrices)], [joined(gradients)]
            self._places, self._gradients = places, gradients
        self._factors = [(m.t(), m) if self.is_transposed else (m, m.t()) for m in matrices]


def project(x_TD, projection):
    """Return the output of a projection of one part, with autograd. Local."""
    return _Project.apply(x_TD, projection.weight, projection)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, projection):
        ctx.save_for_backward(x)
        ctx.projection = projection
        return projection.forward(x)[0]

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return ctx.projection.backward(x, [dy], ctx.needs_input_grad[0]), None, None


def _accumulate(projection, x, grads):
    """Add the weight gradients of a projection."""
    for gradient, dy in zip(projection.gradients(), grads, strict=True):
        left, right = (dy, x) if projection.is_transposed else (x, dy)
        add_product(gradient, left.t(), right, projection.split.multiply)


def lie_together(matrices):
    """Tell whether contiguous matrices lie one behind the other in one storage. Local."""
    storages = {m.untyped_storage().data_ptr() for m in matrices}
    return len(storages) == 1 and all(m.data_ptr() + m.nbytes == following.data_ptr()
                                      for m, following in pairwise(matrices))


def joined(matrices):
    """Return matrices of equal width that :func:`lie_together` as one. Local."""
    return matrices[0].as_strided((sum(map(len, matrices)), matrices[0].shape[1]), matrices[0].stride())

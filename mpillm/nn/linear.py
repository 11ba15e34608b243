"""Column- and row-parallel linear layers.

Legend: T tokens, D input width, F output width (both of the whole layer), p tensor ranks.

============  ==========================  =====================  ==========================
layer         shard of the weight         forward                backward
============  ==========================  =====================  ==========================
column        ``w [F/p, D]``: outputs     ``y = x w^T + b``      ``dx = dy w``, ``dw = dy^T x``
row           ``w [D/p, F]``: inputs      ``y = x w``            ``dx = dy w^T``, ``dw = x^T dy``
============  ==========================  =====================  ==========================

A column's bias is split as its outputs are. A row's outputs are partial sums: its bias is added behind the sum, once.
"""

from itertools import pairwise

import torch
from torch import nn

from mpillm.autograd.node import Node
from mpillm.nn.products import add_product
from mpillm.nn.split import add_over_blocks, first_trained, gradient_of, is_in_flat_storage, later, trained


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are split over the tensor axis.

    It takes a whole input on every rank and returns this rank's outputs; pass the input through :meth:`TensorSplit.enter`
    first, so that gradients are summed.

    Parameters
    ----------
    split : TensorSplit
    weight, bias : Parameter
        ``bias`` may be ``None``.
    """

    is_transposed = True

    def __init__(self, split, weight, bias=None):
        super().__init__()
        self.split = split
        self.weight, self.bias = split.parameter(weight), split.parameter(bias)

    def block(self, units, unit=1):
        """Return this layer with the local rows of global units ``(start, stop)`` of ``unit`` rows each, for
        :class:`Projection`."""
        first = self.weight.shard.start // self.weight.shape[1]
        return self, tuple(unit * i - first for i in units)

    def forward(self, x_TD):
        """Return ``x w^T + b``: ``[T, D] -> [T, F/p]``."""
        return project(x_TD, Projection(self.split, (self, (0, len(self.weight)))))


class RowParallelLinear(ColumnParallelLinear):
    """A linear layer whose inputs are split over the tensor axis; its weight is stored input-first.

    It takes this rank's inputs; what it returns is a partial sum, for :meth:`leave`.

    Parameters
    ----------
    split, weight, bias
        As in :class:`ColumnParallelLinear`; the bias is whole on every rank.
    """

    is_transposed = False

    def leave(self, parts, total):
        """Sum the partial results of all blocks of all ranks and add the bias to what this rank then holds of ``total``
        tokens. Collective over the tensor axis, in one direction or both."""
        return self.add_bias(self.split.leave(parts), total)

    def add_bias(self, x_TD, total):
        """Add the bias to sums, where there is one. Local."""
        return x_TD if self.bias is None else _Bias.apply(x_TD, self.bias, self.split, total)


class _Bias(Node):
    """A bias that is whole on every rank, for the tokens that lie there."""

    @staticmethod
    def forward(ctx, x, bias, split, total):
        ctx.bias, ctx.split, ctx.total = bias, split, total
        return x + bias

    @staticmethod
    def backward(ctx, dy):
        ctx.split.weight_gradients.add(later(_accumulate_tokens, ctx.bias, ctx.split, dy, ctx.total))
        return dy, None, None, None


def _accumulate_tokens(bias, split, dy, total):
    wide = torch.promote_types(dy.dtype, torch.float32)
    add_over_blocks(bias, [block.sum(0, dtype=wide) if len(block) else None for block in split.token_blocks(dy, total)])


class Projection:
    """The product of one input with some rows of one weight or of several, without autograd: what the layers' autograd
    nodes are made of.

    Local. In flat storage the weights of a layer lie one behind the other; those of one input are then one matrix, and one
    product takes the place of several, forward and backward, unless some are frozen and others not. ``exact`` gives each
    weight a product of its own, whose bits do not depend on what lies beside it.

    Parameters
    ----------
    split : TensorSplit
    parts : tuple of (ColumnParallelLinear, tuple of int)
        Layers, each with its local rows ``(start, stop)``. A row-parallel one is the only part, and without its bias.

    Attributes
    ----------
    weight : Parameter
        The first one that is trained, for nodes to take as an input, so that their outputs have gradients whatever ``x`` has.
    is_trained : bool
        Whether any is. Otherwise backward needs no input, and ``x`` need not be kept.
    """

    def __init__(self, split, *parts):
        self.split, self.is_transposed = split, parts[0][0].is_transposed
        self._parts = [(layer.weight, rows) for layer, rows in parts]
        self._biases = [(layer.bias, rows) for layer, rows in parts if self.is_transposed and layer.bias is not None]
        self._widths = [stop - start for _, (start, stop) in parts]
        self._weights = [weight for weight, _ in self._parts + self._biases]
        self._trained, self.weight = trained(*self._weights), first_trained(*self._weights)
        self.is_trained = self.weight.requires_grad
        self._places, self._factors, self._added, self._gradients = None, [], [], None

    def forward(self, x_TD):
        """Return the outputs, one for each product: :meth:`parts` tells them apart."""
        self._find()
        outputs = [self.split.multiply(x_TD, right) for right, _ in self._factors]
        for output, bias in zip(outputs, self._added):
            output.add_(bias)
        return outputs

    def backward(self, x_TD, grads, needs_dx=True):
        """Return the gradient of the input, or None, and hand those of the weights to ``split.weight_gradients``.

        ``grads`` are those of the outputs of :meth:`forward`, which may wait as they are until a ``W`` action. The input
        gradients of several are summed in one buffer.
        """
        if self.is_trained:
            self.split.weight_gradients.add(later(_accumulate, self, x_TD.detach(), grads))
        dx = None
        if needs_dx:
            multiply = self.split.multiply
            for (_, left), dy in zip(self._factors, grads):
                dx = multiply(dy, left) if dx is None else add_product(dx, dy, left, multiply)
        return dx

    def empty(self, tokens, like):
        """Return room for the gradients of the outputs of so many tokens, of the type of a tensor."""
        return [like.new_empty(tokens, right.shape[1]) for right, _ in self._factors]

    def parts(self, outputs):
        """Return views of the outputs, or of their gradients, one for each part."""
        return outputs if len(outputs) == len(self._parts) else outputs[0].split(self._widths, 1)

    def gradients(self):
        """Return where the gradients of the weights are kept, one for each product, and of the biases, where there are some;
        of those that are frozen ``None``.
        """
        return self._gradients or [[gradient_of(*part) if part[0].requires_grad else None for part in own]
                                   for own in (self._parts, self._biases)]

    def _find(self):
        """Find the factors of the products, right ones of forward and of backward, and what is added; in flat storage once,
        since there they stay as long as weights and gradients lie where they did."""
        if self.split.keeps_rows_apart:
            if not self._factors:
                self._pack(self.split.multiply.pack)
            return
        is_flat = all(map(is_in_flat_storage, self._trained))
        places = is_flat and [x.data_ptr() for x in self._weights + [weight.main_grad for weight in self._trained]]
        if is_flat and places == self._places:
            return
        found = [[weight.detach()[slice(*rows)] for weight, rows in own] for own in (self._parts, self._biases)]
        self._gradients = None
        if is_flat:
            found += self.gradients()
            if not self.split.is_exact and all(map(lie_together, found)):
                found = [[joined(own)] if own else own for own in found]
            self._places, self._gradients = places, found[2:]
        matrices, self._added = found[:2]
        self._factors = [(m.t(), m) if self.is_transposed else (m, m.t()) for m in matrices]

    def _pack(self, pack):
        """Take the weights as they are from now on: there is no way back from such a product, and no backward."""
        found = [[weight.detach()[slice(*rows)] for weight, rows in own] for own in (self._parts, self._biases)]
        if not self.split.is_exact:
            found = [[torch.cat(own)] if own else own for own in found]
        matrices, self._added = found
        self._factors = [(pack(m if self.is_transposed else m.t()), None) for m in matrices]


def project(x_TD, projection):
    """Return the output of a projection of one part, with autograd. Local."""
    return _Project.apply(x_TD, projection.weight, projection)


class _Project(Node):
    @staticmethod
    def forward(ctx, x, weight, projection):
        ctx.save_for_backward(x if projection.is_trained else None)
        ctx.projection = projection
        return projection.forward(x)[0]

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return ctx.projection.backward(x, [dy], ctx.needs_input_grad[0]), None, None


def _accumulate(projection, x, grads):
    """Add the gradients of a projection's weights and biases."""
    of_weights, of_biases = projection.gradients()
    for gradient, dy in zip(of_weights, grads, strict=True):
        if gradient is not None:
            left, right = (dy, x) if projection.is_transposed else (x, dy)
            add_product(gradient, left.t(), right, projection.split.multiply)
    for gradient, dy in zip(of_biases, grads):
        if gradient is not None:
            gradient.add_(dy.sum(0, dtype=gradient.dtype))


def lie_together(tensors):
    """Tell whether contiguous tensors lie one behind the other in one storage, or there are none (``None``) at all. Local."""
    if any(x is None for x in tensors):
        return all(x is None for x in tensors)
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    return len(storages) <= 1 and all(x.data_ptr() + x.nbytes == following.data_ptr() for x, following in pairwise(tensors))


def joined(tensors):
    """Return matrices of equal width, or vectors, that :func:`lie_together` as one. Local."""
    first = tensors[0]
    if first is None:
        return None
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())

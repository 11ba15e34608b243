"""The head that gives real numbers, and its loss: the squared error, or the negative logarithm of a Gaussian's density.

Legend: R rows (positions or sequences), K numbers to predict, D model.
"""

import math

import torch
from torch import nn

from mpillm.autograd.regions import reduce_from
from mpillm.comm import collectives
from mpillm.nn.linear import ColumnParallelLinear, Projection, project


class ValueHead(nn.Module):
    """The matrix from hidden states to values, rows split over the tensor axis.

    A Gaussian has two rows a value: of its mean and of the logarithm of its variance.

    Parameters
    ----------
    split : TensorSplit
    model : mpillm.model.description.Model
    table : dict of str to Parameter
    """

    def __init__(self, split, model, table):
        super().__init__()
        self.split, self.size, self.unit = split, model.head_size, model.numbers_a_label
        self.linear = ColumnParallelLinear(split, table["head.weight"], table.get("head.bias"))
        self._units = split.owned_blocks(model.num_labels)
        self._projections = [Projection(split, self.linear.block(units, self.unit)) for units in self._units]

    @property
    def weight(self):
        """This rank's rows."""
        return self.linear.weight

    def forward(self, x_RD, targets_RK, scale):
        """Return ``scale`` (a number) times the summed loss, in float32 at least; a target that is not a number counts for
        nothing.

        Collective over the tensor axis. ``x`` is varying (behind :meth:`TensorSplit.enter`); the loss is replicated.
        """
        targets_RK = targets_RK.reshape(len(x_RD), -1)
        losses = [self._loss(project(x, projection), targets_RK[:, slice(*units)])
                  for x, projection, units in zip(self.split.hand_out(x_RD), self._projections, self._units)]
        return reduce_from(self.split.add(losses), self.split.group) * scale

    def _loss(self, found, targets):
        """Return the summed loss of some values."""
        wide = torch.promote_types(found.dtype, torch.float32)
        found, targets = found.to(wide).unflatten(1, (-1, self.unit)), targets.to(wide)
        is_counted = ~targets.isnan()
        squares = (found[..., 0] - torch.where(is_counted, targets, 0)).square()
        if self.unit == 2:
            log_variance = found[..., 1]
            squares = (log_variance + squares * (-log_variance).exp() + math.log(2 * math.pi)) / 2
        return torch.where(is_counted, squares, 0).sum()

    def logits(self, x_RD):
        """Return all numbers ``[R, head_size]`` on every rank: of a Gaussian mean and log variance in turn."""
        own = torch.cat([project(x_RD, projection) for projection in self._projections], 1).unflatten(1, (-1, self.unit))
        return collectives.allgather(own, self.split.group, 1, self.size // self.unit).flatten(1)

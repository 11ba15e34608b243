"""The head that gives real numbers, and its loss: the squared error, or the negative logarithm of a Gaussian's density.

Legend: R rows (positions or sequences), K numbers to predict, D model.
"""

import math

import torch

from mpillm.autograd.regions import reduce_from
from mpillm.nn.linear import project
from mpillm.nn.loss import Head


class ValueHead(Head):
    """Values, with their loss. A Gaussian has two outputs a value: its mean and the logarithm of its variance."""

    def forward(self, x_RD, targets_RK, scale):
        """Return ``scale`` (a number) times the summed loss, in float32 at least; a target that is not a number counts for
        nothing.

        Collective over the tensor axis. ``x`` is varying (behind :meth:`TensorSplit.enter`); the loss is replicated.
        """
        targets_RK = targets_RK.reshape(len(x_RD), -1)
        losses = [self._loss(project(x, projection), targets_RK[:, slice(*labels)])
                  for x, projection, labels in zip(self.split.hand_out(x_RD), self.projections, self.labels)]
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

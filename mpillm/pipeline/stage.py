"""One stage as the runner sees it: forward, backward and weight gradients of microbatches in flight."""

from dataclasses import dataclass

import torch

from mpillm.nn.attention import Batch


@dataclass
class Microbatch:
    """Some sequences of a batch: their tokens, what attention needs, and the weight of each token in the loss."""

    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    scale: float
    batch: Batch


class Stage:
    """A part of the model with what its microbatches in flight need.

    Parameters
    ----------
    index, num_stages : int
    module : TransformerStage
    """

    def __init__(self, index, num_stages, module):
        self.index, self.module = index, module
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self._in_flight, self._kept = {}, {}

    def when_gradients(self, module, function):
        """Call ``function`` whenever ``module``, and all behind it in the stage, have weight gradients of a microbatch.

        They have once backward has come to the input of ``module``; those that are kept, once they were computed.
        """
        weight_gradients = self.module.split.weight_gradients

        def mark(_, inputs):
            if torch.is_grad_enabled():
                inputs[0].register_hook(lambda grad: weight_gradients.add(function))

        module.register_forward_pre_hook(mark)

    def forward(self, microbatch, x, work):
        """Run microbatch ``work`` through the stage; return its activations, or the last stage's loss.

        ``x`` is what the previous stage sent; the first stage takes its tokens from ``work``.
        """
        if self.is_first:
            x = work.tokens_T
        elif torch.is_grad_enabled():
            x = x.requires_grad_()
        y = self.module(x, work.batch)
        if self.is_last:
            y = self.module.loss(y, work.batch, work.targets_T, work.scale)
        if torch.is_grad_enabled():
            self._in_flight[microbatch] = (x, y)
        return y.detach()

    def backward(self, microbatch, dy, keep_weights=False):
        """Return the gradient of the stage's input (``None`` on the first), from the output's or, last, from the loss.

        With ``keep_weights`` the weights' gradients wait for :meth:`weight_gradients`.
        """
        x, y = self._in_flight.pop(microbatch)
        pending = self.module.split.weight_gradients
        if keep_weights:
            pending.keep()
        torch.autograd.backward(y, dy)
        if keep_weights:
            self._kept[microbatch] = pending.take()
        return None if self.is_first else x.grad

    def weight_gradients(self, microbatch):
        """Compute what :meth:`backward` kept."""
        with torch.no_grad():
            self._kept.pop(microbatch)()

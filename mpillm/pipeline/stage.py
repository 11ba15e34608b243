"""One stage as the runner sees it: forward, backward and weight gradients of microbatches in flight."""

from dataclasses import dataclass

import torch

from mpillm.model.parameters import trained_from
from mpillm.nn.positions import Batch


@dataclass
class Microbatch:
    """Some sequences of a batch: what goes in (tokens ``[T]`` or patches ``[B, S, P]``), what the head is to say, the weight of
    each answer in the loss, and what layers need.

    Ranks without a first or last stage have no inputs and targets.
    """

    inputs: torch.Tensor | None
    targets: torch.Tensor | None
    scale: float
    batch: Batch


class Stage:
    """A part of the model with what its microbatches in flight need.

    Parameters
    ----------
    index, num_stages : int
    module : TransformerStage

    Attributes
    ----------
    has_backward, passes_gradient : bool
        Whether something is trained in this stage or before it, and whether before it. Otherwise there is no gradient to
        come, or none to send on.
    """

    def __init__(self, index, num_stages, module):
        self.index, self.num_stages, self.module = index, num_stages, module
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        first = trained_from(module.model, module.split.freeze)
        self.has_backward = self.is_last or first < module.stop
        self.passes_gradient = not self.is_first and first < module.start
        self._in_flight, self._kept = {}, {}

    def when_gradients(self, module, function):
        """Call ``function`` whenever ``module``, and all behind it in the stage, have weight gradients of a microbatch.

        They have once backward has come to the input of ``module``, which the gradient of that input tells. What is
        kept for a ``W`` action is computed in the order in which backward came by, and ``function`` called in its turn.
        """
        weight_gradients = self.module.split.weight_gradients

        def mark(_, inputs):
            if torch.is_grad_enabled():
                inputs[0].register_hook(lambda grad: weight_gradients.when_done(function))

        module.register_forward_pre_hook(mark)

    def forward(self, number, x, microbatch):
        """Run the microbatch of this number through the stage; return its activations, or the last stage's loss.

        ``x`` is what the previous stage sent; the first stage takes the inputs of ``microbatch``.
        """
        if self.is_first:
            x = microbatch.inputs
        elif torch.is_grad_enabled():
            x = x.requires_grad_(self.passes_gradient)
        y = self.module(x, microbatch.batch)
        if self.is_last:
            y = self.module.loss(y, microbatch.batch, microbatch.targets, microbatch.scale)
        if torch.is_grad_enabled() and self.has_backward:
            self._in_flight[number] = (x, y)
        return y.detach()

    def backward(self, number, dy, keep_weights=False):
        """Return the gradient of the stage's input (``None`` if nobody needs it), from the output's or, last, from the loss.

        Of a stage that :attr:`has_backward`. With ``keep_weights`` the weights' gradients wait for
        :meth:`compute_weight_gradients`.
        """
        x, y = self._in_flight.pop(number)
        pending = self.module.split.weight_gradients
        if keep_weights:
            pending.keep()
        torch.autograd.backward(y, dy)
        if keep_weights:
            self._kept[number] = pending.take()
        return x.grad if self.passes_gradient else None

    def compute_weight_gradients(self, number):
        """Compute what :meth:`backward` kept."""
        with torch.no_grad():
            self._kept.pop(number)()

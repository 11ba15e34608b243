"""The feed-forward half of a layer: ``down(act(up x))``, or with a gate ``down(act(gate x) * up x)`` (Shazeer 2020).

Legend: T tokens, D model, F feed-forward.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from mpillm.autograd.node import Node
from mpillm.elementwise import evenly
from mpillm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear

_aten = torch.ops.aten
# Each function, and what puts the gradient of its input in the place of the input, of (gradient of the output, input).
ACTIVATIONS = {
    "silu": (functional.silu, lambda dy, x: _aten.silu_backward.grad_input(dy, x, grad_input=x)),
    "gelu": (functional.gelu, lambda dy, x: _aten.gelu_backward.grad_input(dy, x, grad_input=x)),
    "gelu_tanh": (partial(functional.gelu, approximate="tanh"),
                  lambda dy, x: _aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=x)),
    "relu": (functional.relu, lambda dy, x: _aten.threshold_backward.grad_input(dy, x, 0, grad_input=x)),
    "tanh": (torch.tanh, lambda dy, x: _aten.tanh_backward.grad_input(dy, x.tanh_(), grad_input=x)),
}


class FeedForward(nn.Module):
    """The feed-forward half of a layer; each block of F maps the input to a partial output.

    Parameters
    ----------
    split : TensorSplit
    model : mpillm.model.description.Model
    table : dict of str to Parameter
        Of the layer.
    """

    def __init__(self, split, model, table):
        super().__init__()
        function, backward = ACTIVATIONS[model.activation]
        self.split, self.activation = split, (evenly(function) if split.keeps_rows_apart else function, backward)
        gate, up = (ColumnParallelLinear(split, table[f"ffn.{part}.weight"], table.get(f"ffn.{part}.bias"))
                    if f"ffn.{part}.weight" in table else None for part in ("gate", "up"))
        self.gate, self.up, self._function = gate, up, _Plain if gate is None else _Gated
        self.down = RowParallelLinear(split, table["ffn.down.weight"], table.get("ffn.down.bias"))
        self._blocks = [self._block(block) for block in split.owned_blocks(model.ffn_size)]

    def _block(self, units):
        """Return what a block is projected with, up and down."""
        ups = [layer.block(units) for layer in (self.gate, self.up) if layer is not None]
        return Projection(self.split, *ups), Projection(self.split, self.down.block(units))

    def forward(self, x_TD, batch):
        """Map activations as they lie between layers. Collective over the tensor axis."""
        return self.down.leave(self.parts(x_TD, batch), batch.tokens)

    def parts(self, x_TD, batch):
        """Return each block's partial output ``[T, D]`` for all tokens, without the bias."""
        return [self._function.apply(x, up.weight if up.is_trained else down.weight, up, down, self.activation)
                for (up, down), x in zip(self._blocks, self.split.enter(x_TD, batch.tokens))]


def _goes_on(ctx):
    """Tell whether backward goes on behind the product down: to weights that are not frozen, or to the input."""
    return ctx.up_projection.is_trained or ctx.needs_input_grad[0]


class _Gated(Node):
    """``down(act(gate x) * up x)``, of which the outputs of gate and up are kept."""

    @staticmethod
    def forward(ctx, x_TD, weight, up_projection, down_projection, activation):
        outputs = up_projection.forward(x_TD)
        gate_TF, up_TF = up_projection.parts(outputs)
        ctx.up_projection, ctx.down_projection, ctx.activation = up_projection, down_projection, activation
        ctx.save_for_backward(x_TD if up_projection.is_trained else None, *outputs)
        return down_projection.forward(activation[0](gate_TF).mul_(up_TF))[0]

    @staticmethod
    def backward(ctx, dy_TD):
        """Compute once more what lies between. The gradients of gate and up take their place, so this runs once."""
        x_TD, *outputs = ctx.saved_tensors
        act, act_backward = ctx.activation
        gate_TF, up_TF = ctx.up_projection.parts(outputs)
        act_TF = act(gate_TF)
        slope_TF = ctx.down_projection.backward(act_TF * up_TF, [dy_TD], _goes_on(ctx))
        if slope_TF is None:
            return (None,) * 5
        act_backward(slope_TF * up_TF, gate_TF)
        torch.mul(act_TF, slope_TF, out=up_TF)
        return ctx.up_projection.backward(x_TD, outputs, ctx.needs_input_grad[0]), None, None, None, None


class _Plain(Node):
    """``down(act(up x))``, of which the output of up is kept."""

    @staticmethod
    def forward(ctx, x_TD, weight, up_projection, down_projection, activation):
        (up_TF,) = up_projection.forward(x_TD)
        ctx.up_projection, ctx.down_projection, ctx.activation = up_projection, down_projection, activation
        ctx.save_for_backward(x_TD if up_projection.is_trained else None, up_TF)
        return down_projection.forward(activation[0](up_TF))[0]

    @staticmethod
    def backward(ctx, dy_TD):
        """Compute once more what lies between. The gradient of up takes its place, so this runs once."""
        x_TD, up_TF = ctx.saved_tensors
        act, act_backward = ctx.activation
        slope_TF = ctx.down_projection.backward(act(up_TF), [dy_TD], _goes_on(ctx))
        if slope_TF is None:
            return (None,) * 5
        act_backward(slope_TF, up_TF)
        return ctx.up_projection.backward(x_TD, [up_TF], ctx.needs_input_grad[0]), None, None, None, None

"""The head that chooses a word or a label, and its loss, computed together over chunks of tokens and blocks of the vocabulary.

The logits of a chunk are turned into their gradients where they lie and used at once for the gradients of input and
weight, so that no rank ever holds the logits of more than one chunk of its own part of the vocabulary. In flat storage
the weight's is added up there and then, in forward: no microbatch in flight holds one of its own.
Legend: T tokens, C tokens of a chunk, D width, V vocabulary.
"""

import torch
from torch import nn

from mpillm.autograd.node import Node
from mpillm.comm import collectives
from mpillm.elementwise import evenly
from mpillm.nn.linear import ColumnParallelLinear, Projection, project
from mpillm.nn.products import add_product
from mpillm.nn.split import first_trained, gradient_of, is_in_flat_storage, later, trained
from mpillm.schedules.blocks import bounds, loss_chunks
from mpillm.schedules.tree import tree_sum


class Head(nn.Module):
    """The matrix from hidden states to what a model gives, its rows split over the tensor axis: all of a label on one rank.

    Parameters
    ----------
    split : TensorSplit
    model : mpillm.model.description.Model
    table : dict of str to Parameter
    """

    def __init__(self, split, model, table):
        super().__init__()
        self.split, self.size, self.unit = split, model.head_size, model.outputs_per_label
        matrix = "embedding.weight" if model.tie_embeddings else "head.weight"
        self.linear = ColumnParallelLinear(split, table[matrix], table.get("head.bias"))
        self.labels = split.owned_blocks(self.size // self.unit)
        self.blocks = [self.linear.block(labels, self.unit) for labels in self.labels]
        self.projections = [Projection(split, block) for block in self.blocks]

    @property
    def weight(self):
        """This rank's rows."""
        return self.linear.weight

    def own_logits(self, x_TD):
        """Return this rank's blocks of the outputs, each with the number of its first label. Local."""
        return [(start, project(x_TD, projection)) for (start, _), projection in zip(self.labels, self.projections)]

    def logits(self, x_TD):
        """Return all outputs ``[T, head_size]`` on every rank."""
        own = torch.cat([part for _, part in self.own_logits(x_TD)], 1).unflatten(1, (-1, self.unit))
        return collectives.allgather(own, self.split.group, 1, self.size // self.unit).flatten(1)


class ChoiceHead(Head):
    """Logits of the words of a vocabulary, or of labels, with the cross-entropy behind them."""

    def __init__(self, split, model, table):
        super().__init__(split, model, table)
        self.softcap = model.logit_softcap

    def forward(self, x_TD, targets_T, scale):
        """Return ``scale`` (a number) times the sum over tokens of the cross-entropy, in float32 at least; a target below
        zero counts for nothing.

        Collective over the tensor axis. ``x`` is varying (behind :meth:`TensorSplit.enter`); the loss is replicated.

        With the weight in flat storage it is the end of what is computed: backward must follow, and start from it. The
        weight's gradient is added to ``main_grad`` by forward, as that of ``scale`` times the loss. It is not where
        there is no ``main_grad``, nor in ``exact``, which sums microbatches along a tree: backward adds it then, to any
        gradient of the loss, and each microbatch in flight holds a gradient as large as the weight.
        """
        weight = first_trained(self.weight, self.linear.bias)
        return _HeadLoss.apply(x_TD, weight, self, targets_T, scale, torch.is_grad_enabled())

    @property
    def adds_at_once(self):
        """Tell whether forward adds the gradients of weight and bias, unless frozen, to those of the other microbatches."""
        own = trained(self.weight, self.linear.bias)
        return not self.split.is_exact and bool(own) and all(map(is_in_flat_storage, own))

    def own_logits(self, x_TD):
        """Return this rank's blocks of the logits, each with the number of its first word. Local."""
        own = super().own_logits(x_TD)
        tanh = evenly(torch.tanh) if self.split.keeps_rows_apart else torch.tanh
        return [(start, tanh(part.div(self.softcap)).mul_(self.softcap)) for start, part in own] if self.softcap else own


class _HeadLoss(Node):
    @staticmethod
    def forward(ctx, x, weight, head, targets, scale, is_recorded):
        parameters = trained(head.weight, head.linear.bias)
        wide = torch.promote_types(x.dtype, torch.float32)
        dx, own, sums = None, [], {}
        if is_recorded and any(ctx.needs_input_grad[:2]):
            dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            if not head.adds_at_once:
                own = [torch.empty_like(parameter, dtype=wide) for parameter in parameters]  # chunks add up in float32 at least
            sums = dict(zip(parameters, own or [gradient_of(parameter) for parameter in parameters]))
        count = loss_chunks(len(x), head.size, x.device.type)
        chunks = [bounds(len(x), count, i) for i in range(count)]
        losses = [_chunk(head, x[low:high], targets[low:high], scale, dx if dx is None else dx[low:high], sums,
                         is_new=low == 0 and bool(own)) for low, high in chunks]
        ctx.split, ctx.gradients, ctx.has_added = head.split, (dx, list(zip(parameters, own))), bool(sums) and not own
        return torch.stack(losses).sum() * scale

    @staticmethod
    def backward(ctx, grad):
        (dx, own), ctx.gradients = ctx.gradients, None
        if own:
            ctx.split.weight_gradients.add(later(_accumulate, own, grad))
        if not ctx.has_added:
            dx = dx if dx is None else dx.mul_(grad)  # without asking whether it is one, for which the host waits for a GPU
        elif grad.device.type == "cpu" and grad != 1:
            raise ValueError(f"backward from {float(grad):.4g} times the head's loss: forward has added the weight's "
                             "gradient to main_grad already; give the head the factor as its scale")
        return dx, None, None, None, None, None


def _chunk(head, x, targets, scale, dx, sums, is_new):
    """Return the summed loss of a chunk of tokens; set ``dx``, unless it is None, and add to the ``sums``, by parameter, of
    gradients, or set them where they are ``is_new``. A call a chunk, so that none holds the logits of the one before."""
    wide, multiply, softcap = torch.promote_types(x.dtype, torch.float32), head.split.multiply, head.softcap
    weight, bias = head.weight.detach(), head.linear.bias
    rows = [slice(*block) for _, block in head.blocks]
    logits = [multiply(x, weight[own].t()).to(wide) for own in rows]
    if bias is not None:
        logits = [part.add_(bias.detach()[own]) for part, own in zip(logits, rows)]
    if softcap:
        logits = [part.div_(softcap).tanh_() for part in logits]
        capped, logits = logits, [part * softcap for part in logits]
    loss = _cross_entropy(logits, targets, head, scale)
    if dx is not None or sums:
        if softcap:
            logits = [part.mul_(1 - tanh.square_()) for part, tanh in zip(logits, capped)]
        slopes = [part.to(x.dtype) for part in logits]
        if dx is not None:
            dx.copy_(tree_sum([multiply(slope, weight[own]) for slope, own in zip(slopes, rows)], torch.add))
        for slope, own in zip(slopes, rows):
            if head.weight in sums:
                add_product(sums[head.weight][own], slope.t(), x, multiply, is_new)
            if bias in sums:
                total = sums[bias][own]
                torch.add(0 if is_new else total, slope.sum(0, dtype=wide), out=total)
    return loss


def _cross_entropy(logits, targets_C, head, scale):
    """Return the summed loss of a chunk and turn ``logits`` into ``scale`` times their gradients in place."""
    group, counts_C = head.split.group, (targets_C >= 0).to(logits[0].dtype)
    tallest = torch.stack([part.amax(1) if part.shape[1] else part.new_full((len(part),), -torch.inf)
                           for part in logits]).amax(0)
    tallest = collectives.allreduce(tallest, group, op="max")
    places = [_place(targets_C, block) for block in head.split.owned_blocks(head.size)]
    sums, picked = [], []
    for part, (is_here, place) in zip(logits, places):
        own = part.new_zeros(len(part))
        picked.append(torch.where(is_here, part[place] - tallest, own) if part.shape[1] else own)
        part.sub_(tallest[:, None]).exp_()
        sums.append(part.sum(1))
    total, own = collectives.allreduce(torch.stack([tree_sum(sums, torch.add), tree_sum(picked, torch.add)]), group)
    for part, (is_here, place) in zip(logits, places):
        part.mul_((scale / total * counts_C)[:, None])
        if part.shape[1]:
            part[place] -= is_here.to(part.dtype) * scale
    return ((total.log() - own) * counts_C).sum()


def _place(targets_C, block):
    """Return which targets are in a block of the vocabulary, and the place of each in its logits, of others the nearest.

    A selection would hold up a GPU, since the host has to wait for its length.
    """
    low, high = block
    is_here = (targets_C >= low) & (targets_C < high)
    nearest = targets_C.clamp(low, max(low, high - 1)) - low
    return is_here, (torch.arange(len(targets_C), device=targets_C.device), nearest)


def _accumulate(own, grad):
    """Add ``grad`` (a scalar on the device) times the gradients of a microbatch to the parameters'."""
    for parameter, gradient in own:
        gradient_of(parameter).addcmul_(gradient, grad)

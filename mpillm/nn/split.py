"""How the weights and activations of a layer are split over the tensor axis, and within a rank.

Every weight is split by rows (dim 0; a weight that is split along its input is stored input-first), so that a shard
is one contiguous range of the whole. ``numerics = "exact"`` splits further: the products of a layer are computed on
``exact_blocks`` fixed blocks of rows, of which each rank holds one branch, and added along a fixed tree.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mpillm.autograd.node import Node
from mpillm.autograd.regions import allgather_to, copy_to, reduce_from, reduce_scatter_from
from mpillm.comm.sums import combine_tree
from mpillm.model.parameters import Parameter, held, is_frozen
from mpillm.nn.products import plain
from mpillm.schedules.blocks import bounds, counts
from mpillm.schedules.tree import tree_sum


@dataclass(frozen=True)
class Shard:
    """Which part of which parameter a tensor is: elements ``[start, stop)`` of the row-major order of the ``whole``.

    ``is_replicated``: every tensor rank holds the whole. ``is_partial_grad``: and sees only a part of its gradient.
    """

    whole: Parameter
    start: int
    stop: int
    is_replicated: bool
    is_partial_grad: bool

    @property
    def name(self):
        """Of the parameter."""
        return self.whole.name

    @property
    def shape(self):
        """Of the whole parameter."""
        return self.whole.shape


class WeightGradients:
    """Where backward leaves the gradients of weights: computed at once, or kept until a ``W`` action asks for them."""

    def __init__(self):
        self._kept = None

    def add(self, compute):
        """Run ``compute``, which adds to ``.grad`` of some weight, now or when the kept ones are run."""
        if self._kept is None:
            compute()
        else:
            self._kept.append(compute)

    def when_done(self, function):
        """Call ``function`` once all that was added before is computed: now, or in its turn among what is kept."""
        self.add(function)

    def keep(self):
        """From now on keep what is added."""
        self._kept = []

    def take(self):
        """Return what was kept, as one function that computes it, and compute at once again."""
        kept, self._kept = self._kept, None

        def compute():
            while kept:
                kept.pop(0)()

        return compute


class TensorSplit:
    """The tensor axis as the layers see it.

    Parameters
    ----------
    group : Group
        The ranks of the tensor axis.
    sequence_parallel : bool
        Whether activations between the parallel regions are sharded by tokens rather than replicated.
    blocks : int, optional
        Blocks of the fixed computation of ``exact``; by default one a rank.
    dtype, device
        Of the weights.
    multiply : callable
        Two matrices, in one of the ways of :mod:`mpillm.nn.products`.
    freeze : tuple of str
        Patterns of the names of weights that are not trained: they require no gradient.
    """

    def __init__(self, group, sequence_parallel=False, blocks=None, dtype=torch.float32, device="cpu",
                 multiply=plain, freeze=()):
        self.group, self.rank, self.size = group, group.rank, group.size
        self.sequence_parallel = sequence_parallel and group.size > 1
        self.blocks = group.size if blocks is None else blocks
        self.is_exact = blocks is not None
        self.local_blocks = self.blocks // group.size
        self.dtype, self.device, self.multiply, self.freeze = dtype, device, multiply, freeze
        self.weight_gradients = WeightGradients()

    @property
    def keeps_rows_apart(self):
        """Tell whether this is inference, whose rows get the same bits whatever rows lie beside them."""
        return hasattr(self.multiply, "pack")

    def owned(self, units):
        """Return the units ``(start, stop)`` of this rank."""
        return bounds(units, self.size, self.rank)

    def owned_blocks(self, units):
        """Return the units ``(start, stop)`` of each of this rank's blocks."""
        first = self.rank * self.local_blocks
        return [bounds(units, self.blocks, first + i) for i in range(self.local_blocks)]

    def parameter(self, whole):
        """Create what this rank holds of a parameter; ``None`` of none."""
        if whole is None:
            return None
        start, stop, *flags = held(whole, self.size, self.rank, self.is_exact, self.sequence_parallel)
        values = torch.empty((stop - start, *whole.shape[1:]), dtype=self.dtype, device=self.device)
        weight = nn.Parameter(values, requires_grad=not is_frozen(whole.name, self.freeze))
        row = math.prod(whole.shape[1:])
        weight.shard = Shard(whole, start * row, stop * row, *flags)
        return weight

    def tokens(self, total):
        """Return how many of ``total`` tokens this rank holds between the parallel regions."""
        return counts(total, self.size)[self.rank] if self.sequence_parallel else total

    def own(self, x_T):
        """Return what belongs to the tokens that this rank holds between the parallel regions, of all tokens. Local."""
        return x_T[slice(*self.owned(len(x_T)))] if self.sequence_parallel else x_T

    def spread(self, x_TD, total):
        """Give every rank all ``total`` tokens of ``x`` for its own use; the gradients of all ranks are summed.

        Collective over the tensor axis, in one direction or both.
        """
        if self.size == 1:
            return x_TD
        return allgather_to(x_TD, self.group, 0, total) if self.sequence_parallel else copy_to(x_TD, self.group)

    def collect(self, x_TD):
        """Sum the ranks' partial ``x``, back to how activations lie between regions. The adjoint of :meth:`spread`."""
        if self.size == 1:
            return x_TD
        return reduce_scatter_from(x_TD, self.group) if self.sequence_parallel else reduce_from(x_TD, self.group)

    def enter(self, x_TD, total):
        """:meth:`spread` ``x`` and hand it to every block of this rank."""
        return self.hand_out(self.spread(x_TD, total))

    def hand_out(self, x):
        """Hand ``x`` to every block of this rank. Local."""
        return _FanOut.apply(x, self.local_blocks) if self.local_blocks > 1 else (x,)

    def leave(self, parts):
        """:meth:`add` the partial results of this rank's blocks and :meth:`collect` them. The adjoint of :meth:`enter`."""
        return self.collect(self.add(parts))

    def add(self, parts):
        """Add the partial results of this rank's blocks. Local; the adjoint of :meth:`hand_out`."""
        return _FanIn.apply(*parts) if self.local_blocks > 1 else parts[0]

    def token_blocks(self, x_TD, total):
        """Cut rows that this rank holds of ``total`` tokens into the fixed blocks of a sum over tokens."""
        if not self.is_exact:
            return [x_TD]
        if self.sequence_parallel:
            cuts = [bounds(total, self.blocks, self.rank * self.local_blocks + i) for i in range(self.local_blocks)]
        else:
            cuts = [bounds(total, self.blocks, i) for i in range(self.blocks)]
        offset = cuts[0][0]
        return [x_TD[low - offset:high - offset] for low, high in cuts]


class _FanOut(Node):
    """One tensor to several blocks; their gradients are added along the tree."""

    @staticmethod
    def forward(ctx, x, count):
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):
        return combine_tree(list(grads)), None


class _FanIn(Node):
    """Partial results of several blocks, added along the tree; each block gets the gradient."""

    @staticmethod
    def forward(ctx, *parts):
        ctx.count = len(parts)
        return combine_tree(list(parts))

    @staticmethod
    def backward(ctx, grad):
        return (grad,) * ctx.count


def trained(*weights):
    """Return those of some weights, of which some may be ``None``, that are not frozen. Local."""
    return [weight for weight in weights if weight is not None and weight.requires_grad]


def first_trained(*weights):
    """Return the first weight that is not frozen, or the first: what an autograd node takes as its input, so that it has a
    backward if it needs one."""
    return (trained(*weights) or weights)[0]


def is_in_flat_storage(weight):
    """Tell whether ``weight`` and its gradient lie in flat storage, which says so by a ``main_grad``."""
    return getattr(weight, "main_grad", None) is not None


def gradient_of(weight, rows=None):
    """Return where the gradient of ``weight`` is kept, or some rows ``(start, stop)`` of it.

    That is ``main_grad`` where flat storage has set one, else ``grad``, made of zeros if there is none yet.
    """
    if is_in_flat_storage(weight):
        grad = weight.main_grad
    else:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grad = weight.grad
    return grad if rows is None else grad[slice(*rows)]


def add_over_blocks(weight, gradients):
    """Add the gradients that blocks gave to the weight's, along the tree; ``None`` where a block had nothing to do. Those of a
    frozen weight go nowhere."""
    if not weight.requires_grad:
        return
    total = tree_sum(gradients, torch.add)
    if total is not None:
        gradient_of(weight).add_(total)


def later(function, *arguments):
    """Bind arguments, for :meth:`WeightGradients.add`."""
    return partial(function, *arguments)

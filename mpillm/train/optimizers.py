"""Optimisers: PyTorch's own, on this rank's pieces of the flat storage."""

import torch
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from mpillm.model.parameters import first_match, is_frozen


def state_kinds(train):
    """Return the names of the tensors that the optimiser keeps beside each weight: those of PyTorch's state."""
    kinds = {
        "adamw": ["exp_avg", "exp_avg_sq"],
        "adam": ["exp_avg", "exp_avg_sq"],
        "sgd": ["momentum_buffer"],
        "rmsprop": ["square_avg", "momentum_buffer"],
        "adagrad": ["sum"],
    }[train.optimizer]
    return kinds if train.momentum else [kind for kind in kinds if kind != "momentum_buffer"]


def update(train, lr, weight_decay, weights, gradients, state, steps):
    """Update weights and state in place by PyTorch's function of the ``[train]`` section's optimiser.

    Local. Its functions, not its classes: a class imports the compiler, which costs every rank a second and 70 MiB.

    Parameters
    ----------
    train : mpillm.config.Train
    lr, weight_decay : float
    weights, gradients : list of torch.Tensor
    state : dict of str to list of torch.Tensor
        By :func:`state_kinds`; zeros before the first step.
    steps : list of torch.Tensor
        One float32 scalar a weight on its device: the steps taken.
    """
    common = {"lr": lr, "weight_decay": weight_decay, "maximize": False}
    if train.optimizer in ("adamw", "adam"):
        function = adamw if train.optimizer == "adamw" else adam
        function(weights, gradients, state["exp_avg"], state["exp_avg_sq"], [], steps, fused=True, amsgrad=False,
                 beta1=train.betas[0], beta2=train.betas[1], eps=train.eps, **common)
    elif train.optimizer == "sgd":
        sgd(weights, gradients, state.get("momentum_buffer", [None] * len(weights)), fused=True,
            momentum=train.momentum, dampening=0.0, nesterov=False, **common)
    elif train.optimizer == "rmsprop":
        rmsprop(weights, gradients, state["square_avg"], [], state.get("momentum_buffer", []), steps, foreach=True,
                alpha=train.betas[1], eps=train.eps, momentum=train.momentum, centered=False, **common)
    elif train.optimizer == "adagrad":
        adagrad(weights, gradients, state["sum"], steps, fused=True, lr_decay=0.0, eps=train.eps, **common)
    else:
        raise KeyError(train.optimizer)


def decays(shape):
    """Tell whether a parameter of this shape is subject to weight decay: matrices are, norm weights are not."""
    return len(shape) > 1


class ShardedOptimizer:
    """Updates this rank's pieces of its buckets.

    Local. State exists only for the pieces; it is named and ranged like them, so that checkpoints fit any layout. Pieces of
    frozen parameters have none and stay as they are.

    Parameters
    ----------
    train : mpillm.config.Train
    buckets : list of Bucket
    """

    def __init__(self, train, buckets):
        self.train = train
        self.entries = [(bucket, piece) for bucket in buckets for piece in bucket.pieces()]
        # One {kind: tensor} a piece, with its padding. Weights are views of the buckets' masters, which are views of the
        # buckets' data, which the model's parameters are views of: an update in place here is one of the model. Where
        # masters are wider than the data, Bucket.distribute() rounds them into it.
        self._tensors = []
        for bucket, piece in self.entries:
            weight = bucket.master[piece.low:piece.high]
            kinds = () if is_frozen(piece.name, train.freeze) else state_kinds(train)
            self._tensors.append({"weight": weight, **{kind: torch.zeros_like(weight) for kind in kinds}})
        self._steps = [torch.zeros((), device=bucket.master.device) for bucket, _ in self.entries]
        self._groups = {}  # weight decay and factor of the learning rate to the numbers of their pieces
        for index, (_, piece) in enumerate(self.entries):
            if not is_frozen(piece.name, train.freeze):
                decay = train.weight_decay if decays(piece.shape) else 0.0
                factor = train.lr_factors.get(first_match(piece.name, train.lr_factors), 1.0)
                self._groups.setdefault((decay, factor), []).append(index)

    def step(self, gradients, lr):
        """Update from the reduced gradients, one a bucket as its range holds them."""
        for (weight_decay, factor), members in self._groups.items():
            state = {kind: [self._tensors[index][kind] for index in members] for kind in state_kinds(self.train)}
            parts = [gradients[bucket][piece.low:piece.high] for bucket, piece in (self.entries[i] for i in members)]
            update(self.train, factor * lr, weight_decay, [self._tensors[index]["weight"] for index in members], parts, state,
                   [self._steps[index] for index in members])

    def state(self):
        """Yield ``(piece, {kind: tensor})`` for every piece, the weights among them; views without padding."""
        for (_, piece), tensors in zip(self.entries, self._tensors):
            yield piece, {kind: tensor[:piece.stop - piece.start] for kind, tensor in tensors.items()}

    def restore(self, read, step):
        """Set weights and state of every piece from ``read(kind, piece)`` (numpy), as after ``step`` steps."""
        for piece, tensors in self.state():
            for kind, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(read(kind, piece)))
        for count in self._steps:
            count.fill_(step)

    def restore_weights(self, read):
        """Set the weights alone from ``read("weight", piece)``, an array or tensor; those of which it is ``None`` stay."""
        for piece, tensors in self.state():
            values = read("weight", piece)
            if values is not None:
                tensors["weight"].copy_(torch.as_tensor(values))

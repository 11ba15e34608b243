"""Optimisers: PyTorch's own, on this rank's pieces of the flat storage, and the learning rate over steps."""

import math

import torch


def learning_rate(train, step):
    """Return the learning rate of step ``step`` (the first is 1): linear warm-up, then the schedule down to ``min_lr``.

    Local; ``train`` is the ``[train]`` section.
    """
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    if train.lr_schedule == "constant":
        return train.lr
    shape = 1 - progress if train.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.min_lr + (train.lr - train.min_lr) * shape


def make_optimizer(train, groups):
    """Return the PyTorch optimiser of the ``[train]`` section over parameter groups."""
    adam = {"betas": train.betas, "eps": train.eps, "fused": True}
    kinds = {
        "adamw": (torch.optim.AdamW, adam),
        "adam": (torch.optim.Adam, adam),
        "sgd": (torch.optim.SGD, {"momentum": train.momentum, "fused": True}),
        "rmsprop": (torch.optim.RMSprop, {"alpha": train.betas[1], "eps": train.eps, "momentum": train.momentum,
                                          "foreach": True}),
        "adagrad": (torch.optim.Adagrad, {"eps": train.eps, "fused": True}),
    }
    kind, options = kinds[train.optimizer]
    return kind(groups, lr=train.lr, **options)


def decays(shape):
    """Tell whether a parameter of this shape is subject to weight decay: matrices are, norm weights are not."""
    return len(shape) > 1


class ShardedOptimizer:
    """Updates this rank's pieces of its buckets.

    Local. State exists only for the pieces; it is named and ranged like them, so that checkpoints fit any layout.

    Parameters
    ----------
    train : mpillm.config.Train
    buckets : list of Bucket
    """

    def __init__(self, train, buckets):
        self.train = train
        self.entries = [(bucket, piece) for bucket in buckets for piece in bucket.pieces()]
        self._parameters = [torch.nn.Parameter(bucket.master[piece.low:piece.high]) for bucket, piece in self.entries]
        groups = {True: [], False: []}
        for p, (_, piece) in zip(self._parameters, self.entries):
            groups[decays(piece.shape)].append(p)
        self._optimizer = make_optimizer(train, [
            {"params": members, "weight_decay": train.weight_decay if is_decayed else 0.0}
            for is_decayed, members in groups.items() if members
        ])

    def step(self, gradients, lr):
        """Update from the reduced gradients, one a bucket as its range holds them."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for p, (bucket, piece) in zip(self._parameters, self.entries):
            p.grad = gradients[bucket][piece.low:piece.high]
        self._optimizer.step()
        for p in self._parameters:
            p.grad = None

    def state(self):
        """Yield ``(piece, {kind: tensor})`` for every piece, the weights among them; views without padding."""
        for p, (_, piece) in zip(self._parameters, self.entries):
            count = piece.stop - piece.start
            tensors = {kind: value for kind, value in self._optimizer.state[p].items()
                       if torch.is_tensor(value) and value.shape == p.shape}
            yield piece, {kind: value[:count] for kind, value in {"weight": p.detach(), **tensors}.items()}

    def restore(self, read, step):
        """Set weights and state of every piece from ``read(kind, piece)`` (numpy), as after ``step`` steps."""
        self._make_state()
        for piece, tensors in self.state():
            for kind, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(read(kind, piece)))
        for p in self._parameters:
            if "step" in self._optimizer.state[p]:
                self._optimizer.state[p]["step"].fill_(step)

    def restore_weights(self, read):
        """Set the weights alone from ``read("weight", piece)``."""
        for piece, tensors in self.state():
            tensors["weight"].copy_(torch.from_numpy(read("weight", piece)))

    def _make_state(self):
        """Let PyTorch create its state, by a step that changes no weight."""
        kept = [p.detach().clone() for p in self._parameters]
        for p in self._parameters:
            p.grad = torch.zeros_like(p)
        self._optimizer.step()
        for p, old in zip(self._parameters, kept):
            p.grad = None
            p.detach().copy_(old)

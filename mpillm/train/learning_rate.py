"""The learning rate over steps."""

import math


def learning_rate(train, step):
    """Return the learning rate of step ``step`` (the first is 1): linear warm-up, then the schedule down to ``min_lr``.

    ``wsd`` (warm-up, stable, decay: Hu et al. 2024) stays at ``lr`` and goes down, in a line, over the last ``decay_steps``.

    Local; ``train`` is the ``[train]`` section.
    """
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    first = train.steps - train.decay_steps if train.lr_schedule == "wsd" else train.warmup_steps
    progress = min(1.0, max(0, step - first) / max(1, train.steps - first))
    if train.lr_schedule == "constant":
        return train.lr
    left = {"linear": 1 - progress, "wsd": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[train.lr_schedule]
    return train.min_lr + (train.lr - train.min_lr) * left

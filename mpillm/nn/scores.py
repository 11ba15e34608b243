"""What is said of answers beside their loss: counts that add up over microbatches and ranks, and the figures made of them."""

import torch


def of_choices(logits_RC, targets_R):
    """Return for every class how often it was right, how often it was to be chosen and how often it was, ``[C, 3]``. Local."""
    is_counted = targets_R >= 0
    targets, chosen = targets_R[is_counted], logits_RC[is_counted].argmax(1)
    count = logits_RC.shape[1]
    found = [targets[targets == chosen], targets, chosen]
    return torch.stack([torch.bincount(each, minlength=count) for each in found], 1).double()


def of_values(numbers_RN, targets_R):
    """Return the sums of squared and of absolute errors, and how many there are, ``[1, 3]``. Local."""
    targets_RK = targets_R.reshape(len(numbers_RN), -1)
    values_RK = numbers_RN.unflatten(1, (targets_RK.shape[1], -1))[..., 0]
    errors = (values_RK - targets_RK)[~targets_RK.isnan()].double()
    return torch.stack([errors.square().sum(), errors.abs().sum(), torch.tensor(float(len(errors)))])[None]


SCORES = {"classes": of_choices, "tags": of_choices, "values": of_values}


def figures(head, scores):
    """Return the figures that a head's field reports, by name, from scores of all ranks.

    ``accuracy`` is the part of answers that are right; ``macro_f1`` the mean over classes, those that were to be chosen or
    were, of the harmonic mean of precision and recall; ``mse`` and ``mae`` the mean squared and absolute errors.
    """
    if head == "values":
        squared, absolute, count = scores[0].tolist()
        return {"mse": squared / count, "mae": absolute / count}
    right, wanted, chosen = scores.unbind(1)
    occurs = wanted + chosen > 0
    f1 = 2 * right[occurs] / (wanted + chosen)[occurs]
    return {"accuracy": float(right.sum() / wanted.sum()), "macro_f1": float(f1.mean())}

"""Semi-Markov segmentation: a sequence is cut into labelled segments, by dynamic programming over where the last one ends.

A word lattice is such a thing: what is no word scores -inf. Local: sequences are short, ranks take one each.

Legend: T positions, L lengths, K labels.
"""

import torch

from mpillm.errors import ShapeError
from mpillm.scan.operators import log_sum_exp


def best_segmentation(scores_TLK, transitions_KK):
    """Find the segmentation with the greatest sum of scores. Local.

    Parameters
    ----------
    scores_TLK : Tensor, shape (T, L, K)
        ``[t, l, k]``: of the segment of ``l + 1`` positions that starts at ``t``, with label ``k``. -inf forbids; segments
        beyond the end are never taken.
    transitions_KK : Tensor, shape (K, K)
        From the label of one segment to that of the next; zeros where labels do not depend on each other.

    Returns
    -------
    segments : list of (start, stop, label)
        Of equally good ones, that whose last segment has the lowest label, then the shortest one before it with the lowest
        label, and so on. Empty if every segmentation is forbidden, or ``T`` is 0.
    score : float

    Raises
    ------
    ShapeError
        If shapes do not fit.
    """
    best_T1K, ways = _forward(scores_TLK.detach(), transitions_KK.detach(), lambda x: x.max(0).values)
    position, score = len(scores_TLK), float(best_T1K[-1].max())
    if not position or score == -torch.inf:
        return [], score
    segments, label = [], int(best_T1K[-1].argmax())
    while position:
        length, before = divmod(int(ways[position][:, label].argmax()), len(transitions_KK))
        segments.append((position - length - 1, position, label))
        position, label = position - length - 1, before
    return segments[::-1], score


def segmentation_log_partition(scores_TLK, transitions_KK):
    """Return the logarithm of the sum over all segmentations; its gradients are the segments' marginals. Local.

    Parameters are those of :func:`best_segmentation`.

    Returns
    -------
    Tensor, shape ()
    """
    totals_T1K, _ = _forward(scores_TLK, transitions_KK, lambda x: log_sum_exp(x, 0))
    return log_sum_exp(totals_T1K[-1], 0)


def _forward(scores, transitions, combine):
    """Return what ends at every position, by label, and the ways into it: lengths and labels before, in one row each."""
    if scores.dim() != 3 or transitions.shape != (scores.shape[-1],) * 2 or not scores.shape[1] * scores.shape[2]:
        raise ShapeError(f"segmentation: scores {list(scores.shape)}, transitions {list(transitions.shape)}: must be [T, L, K] "
                         "and [K, K], with L and K at least 1")
    steps, longest, labels = scores.shape
    start = scores.new_full((labels,), -torch.inf)
    start[0] = 0  # one way to begin; what is before the first segment has no label
    ends, ways = [start], [None]
    for stop in range(1, steps + 1):
        lengths = range(1, min(longest, stop) + 1)
        terms = [ends[stop - n][:, None] + scores[stop - n, n - 1] + (transitions if n < stop else 0) for n in lengths]
        ways.append(torch.cat(terms))
        ends.append(combine(ways[-1]))
    return ends, ways

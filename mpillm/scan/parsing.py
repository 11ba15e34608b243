"""Projective dependency parsing by Eisner's algorithm, for many sentences at once; marginals are gradients. Local.

Two half-trees meet and one word becomes the other's head; a half-tree and a finished one make a longer finished one. So all
spans of one width are computed together: ``n`` steps for sentences of ``n`` words, ``n**3`` sums each.

Eisner: Three new probabilistic models for dependency parsing (1996). Legend: B sentences, N words and the root, which is 0.
"""

import torch

from mpillm.errors import ShapeError
from mpillm.scan.operators import log_sum_exp


def best_trees(arcs_BNN, lengths_B=None):
    """Find the projective tree of every sentence with the greatest sum of arc scores. Local.

    Parameters
    ----------
    arcs_BNN : Tensor, shape (B, N, N)
        ``[b, h, m]``: word ``h`` is the head of word ``m``; 0 is the root, which may have several dependents.
    lengths_B : Tensor of int64, shape (B,), optional
        Words of each sentence, without the root, at most ``N - 1``.

    Returns
    -------
    heads_BN : Tensor of int64, shape (B, N)
        Head of each word, -1 for the root and beyond a sentence's end. Which of several equally good trees is not defined.
    scores_B : Tensor
    """
    with torch.enable_grad():
        arcs = arcs_BNN.detach().requires_grad_()
        scores = _chart(arcs, lengths_B, _first_greatest)
        taken = torch.autograd.grad(scores.sum(), arcs)[0] if arcs.shape[1] > 1 else torch.zeros_like(arcs)
    return torch.where(taken.sum(1) > 0, taken.argmax(1), -1), scores.detach()


def tree_log_partition(arcs_BNN, lengths_B=None):
    """Return the logarithm of the sum over all projective trees, for every sentence. Local.

    Parameters are those of :func:`best_trees`. The gradient of a sentence's is its :func:`tree_marginals`.

    Returns
    -------
    Tensor, shape (B,)
    """
    return _chart(arcs_BNN, lengths_B, lambda x: log_sum_exp(x, -1))


def tree_marginals(arcs_BNN, lengths_B=None):
    """Return the probability of every arc, shape (B, N, N). Local; without gradients."""
    with torch.enable_grad():
        arcs = arcs_BNN.detach().requires_grad_()
        return torch.autograd.grad(tree_log_partition(arcs, lengths_B).sum(), arcs)[0]


def _first_greatest(x):
    """Return the greatest along the last dim, with a gradient for the first of equal ones alone."""
    return x.max(-1).values


def _chart(arcs, lengths, combine):
    """Return, for every sentence, what the half-tree from the root to the last word combines to."""
    if arcs.dim() != 3 or arcs.shape[1] != arcs.shape[2] or not arcs.shape[1] or not arcs.is_floating_point():
        raise ShapeError(f"parsing: arcs {arcs.dtype} {list(arcs.shape)}: must be floating point [B, N, N], N at least 1")
    sentences, size = arcs.shape[:2]
    # Lists by width, of spans from i to i + width: headed by their left or right end. Open ones are at least one wide; the end
    # that is not the head has no dependents beyond it yet.
    zeros = arcs.new_zeros(sentences, size)
    left_headed, right_headed, left_open, right_open = [zeros], [zeros], [], []
    for width in range(1, size):
        halves = combine(_joined(left_headed, right_headed, width, 1))
        left_open.append(halves + arcs.diagonal(width, 1, 2))
        right_open.append(halves + arcs.diagonal(-width, 1, 2))
        left_headed.append(combine(_joined(left_open, left_headed, width, 1)))
        right_headed.append(combine(_joined(right_headed, right_open, width, 0)))
    roots = [spans[:, 0] for spans in left_headed]
    roots = torch.stack(roots, -1)
    if lengths is None:
        return roots[:, -1]
    if len(lengths) != sentences or any(not 0 <= length < size for length in lengths.tolist()):
        raise ShapeError(f"parsing: lengths {lengths.tolist()} of {sentences} sentences: from 0 to {size - 1}, one each")
    return roots.gather(1, lengths[:, None])[:, 0]


def _joined(lefts, rights, width, apart):
    """Return, along a last dim, all ways to join one of ``lefts`` and one of ``rights``, which begins ``apart`` words after
    the ``k``-th of the span, to spans of a width."""
    spans = max(lefts[0].shape[1], rights[0].shape[1]) - width
    return torch.stack([lefts[k][:, :spans] + rights[width - 1 - k][:, k + apart:k + apart + spans] for k in range(width)], -1)

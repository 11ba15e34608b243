"""Associative operators as data: how two neighbouring elements combine into one.

An element is a tensor, or a tuple of tensors of one dtype. Tensors carry elements along dim 0, and ``combine`` works on all
of them at once: ``combine(left, right)`` with ``left`` what comes earlier. Operators need not commute. ``dtypes`` says what
an operator takes: ``"float"``, or ``"any"``, which is integers too.

In integers there is no minus infinity: what is below ``-2**(bits - 3)`` counts as it, and it stays ``-2**(bits - 2)``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpillm.elementwise import evenly

_exp, _log = evenly(torch.exp), evenly(torch.log)  # the same bits wherever a number stands, so at any rank count


@dataclass(frozen=True)
class Operator:
    """An associative operator, one of those below or a user's own.

    Parameters
    ----------
    name : str
        For messages.
    combine : callable
        ``combine(left, right)`` of tensors, or of tuples of tensors, shape (n, ...), element by element. Differentiable,
        if gradients are wanted.
    identity : callable
        ``identity(like)`` for one element, shape (1, ...): what changes nothing. Without it an empty sequence cannot be
        reduced, nor scanned exclusively.
    dtypes : {"any", "float"}
    """

    name: str
    combine: Callable
    identity: Callable | None = None
    dtypes: str = "any"


def minus_infinity(dtype):
    """Return what stands for minus infinity in a dtype. Local."""
    return -torch.inf if dtype.is_floating_point else -(2 ** (torch.iinfo(dtype).bits - 2))


def log_sum_exp(x, dim):
    """Return the logarithm of a sum of exponentials along ``dim``; minus infinity has gradients of zero. Local."""
    shift = _finite(x.detach().amax(dim, keepdim=True))
    return _log_of_sum(_exp(x - shift).sum(dim)) + shift.squeeze(dim)


def companion(coefficients_TO, inputs_T):
    """Write a linear recurrence of a higher order as affine maps, for :data:`AFFINE_DENSE`. Local.

    ``h[t] = sum_o coefficients[t, o] h[t - 1 - o] + inputs[t]``, with zeros before the start. The state is
    ``(h[t], h[t-1], ...)``.

    Parameters
    ----------
    coefficients_TO : Tensor, shape (T, O)
    inputs_T : Tensor, shape (T,)

    Returns
    -------
    matrices_TOO : Tensor, shape (T, O, O)
    vectors_TO : Tensor, shape (T, O)
        Element ``[:, 0]`` of the vectors of the scan is ``h``.
    """
    steps, order = coefficients_TO.shape
    shifted = torch.eye(order - 1, order, dtype=coefficients_TO.dtype, device=coefficients_TO.device)
    matrices = torch.cat((coefficients_TO[:, None], shifted.expand(steps, -1, -1)), dim=1)
    return matrices, torch.cat((inputs_T[:, None], inputs_T.new_zeros(steps, order - 1)), dim=1)


def softmax_partials(scores_HQS, values_HSD):
    """Return what one part of the keys and values adds to attention, as one element for :data:`SOFTMAX`. Local.

    Parameters
    ----------
    scores_HQS : Tensor, shape (..., Q, S)
        Of Q queries and this part's S keys, which may be none; minus infinity where a key is masked.
    values_HSD : Tensor, shape (..., S, D)

    Returns
    -------
    maximum, total : Tensor, shape (1, ..., Q, 1)
    output : Tensor, shape (1, ..., Q, D)
        Not yet divided by the total.
    """
    if scores_HQS.shape[-1] == 0:
        maximum = scores_HQS.new_full((*scores_HQS.shape[:-1], 1), -torch.inf)
    else:
        maximum = scores_HQS.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores_HQS - _finite(maximum))
    return maximum[None], weights.sum(-1, keepdim=True)[None], (weights @ values_HSD)[None]


def _finite(x):
    """Return ``x`` with zeros for minus infinity, so that differences to it are numbers."""
    return torch.where(x == -torch.inf, 0, x)


def _log_of_sum(total):
    """Return the logarithm, of zero minus infinity with a gradient of zero."""
    is_zero = total == 0
    return torch.where(is_zero, -torch.inf, _log(torch.where(is_zero, 1, total)))


def _saturated(x):
    """Return ``x``, in integers with one minus infinity."""
    if x.dtype.is_floating_point:
        return x
    lowest = minus_infinity(x.dtype)
    return torch.where(x < lowest // 2, lowest, x)


def _affine(left, right):
    (scale, shift), (later_scale, later_shift) = left, right
    return later_scale * scale, later_scale * shift + later_shift


def _affine_dense(left, right):
    (matrix, vector), (later_matrix, later_vector) = left, right
    return _product(later_matrix, matrix), _product(later_matrix, vector[..., None])[..., 0] + later_vector


def _product(left, right):
    """Multiply matrices column by column: one by one in any batch, which makes the bits the same at any rank count."""
    terms = (left[..., :, k, None] * right[..., k, None, :] for k in range(left.shape[-1]))
    return sum(terms, start=next(terms))


def _max_plus(left, right):
    out = None
    for k in range(left.shape[-1]):
        term = left[..., :, k, None] + right[..., k, None, :]
        out = term if out is None else torch.maximum(out, term)
    return _saturated(out)


def _log_plus(left, right):
    shift = _finite(_max_plus(left.detach(), right.detach()))
    terms = (_exp(left[..., :, k, None] + right[..., k, None, :] - shift) for k in range(left.shape[-1]))
    return _log_of_sum(sum(terms, start=next(terms))) + shift


def _softmax(left, right):
    (left_max, left_sum, left_out), (right_max, right_sum, right_out) = left, right
    maximum = torch.maximum(left_max, right_max)
    shift = _finite(maximum)
    left_scale, right_scale = _exp(left_max - shift), _exp(right_max - shift)
    return maximum, left_scale * left_sum + right_scale * right_sum, left_scale * left_out + right_scale * right_out


def _eye(like, zero, one):
    size = like.shape[-1]
    is_diagonal = torch.eye(size, dtype=torch.bool, device=like.device)
    return torch.where(is_diagonal, torch.full_like(like, one), torch.full_like(like, zero))


def _lowest(like):
    return torch.full_like(like, minus_infinity(like.dtype))


ADD = Operator("add", torch.add, torch.zeros_like)
MAXIMUM = Operator("maximum", torch.maximum, _lowest)
LOG_ADD = Operator("log_add", lambda left, right: log_sum_exp(torch.stack((left, right)), 0), _lowest, "float")
# (a, b): h[t] = a[t] * h[t-1] + b[t], number by number
AFFINE = Operator("affine", _affine, lambda like: (torch.ones_like(like[0]), torch.zeros_like(like[1])))
# (A, b): h[t] = A[t] @ h[t-1] + b[t]; shapes (n, ..., K, K) and (n, ..., K)
AFFINE_DENSE = Operator("affine_dense", _affine_dense, lambda like: (_eye(like[0], 0, 1), torch.zeros_like(like[1])))
# Products of matrices from row to column, shape (n, ..., K, K): the best path, and the sum over all paths
MAX_PLUS = Operator("max_plus", _max_plus, lambda like: _eye(like, minus_infinity(like.dtype), 0))
LOG_PLUS = Operator("log_plus", _log_plus, lambda like: _eye(like, -torch.inf, 0), "float")
# (maximum, total, output) of softmax_partials
SOFTMAX = Operator("softmax", _softmax, lambda like: (_lowest(like[0]), torch.zeros_like(like[1]), torch.zeros_like(like[2])),
                   "float")

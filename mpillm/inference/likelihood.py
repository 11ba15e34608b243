"""Log-probabilities of given tokens out of logits whose columns lie on several ranks, or in the blocks of ``exact``: each part
gives four numbers a row, and no rank needs whole rows. A row's bits depend neither on the rows beside it nor on threads.

Legend: T rows, V columns of a part.
"""

import math

import torch
import torch.nn.functional as F

from mpillm.comm import collectives
from mpillm.elementwise import evenly

_exp = evenly(torch.exp)


def log_probabilities(parts, split, vocab_size, tokens):
    """Return the log-probability of each row's token, and whether it is the likeliest, on every rank of the tensor axis.

    Collective over it.

    Parameters
    ----------
    parts : list of (int, Tensor)
        This rank's blocks of logits ``[T, V]``, each with its first column, as
        :meth:`mpillm.nn.transformer.TransformerStage.own_logits` gives them.
    split : TensorSplit
    vocab_size : int
        Columns from there on are padding.
    tokens : list of int
        One a row.

    Returns
    -------
    list of (float, bool)
        To 1e-6 where logits are float32; not finite where logits are not.
    """
    own = torch.stack([_summary(part[:, :max(0, vocab_size - start)], start, tokens) for start, part in parts], 1)
    return [_joined(row) for row in collectives.allgather(own, split.group, 1, split.blocks).tolist()]


def _summary(logits_TV, start, tokens):
    """Return what the columns from ``start`` on say of each row, ``[T, 4]`` in float64: the largest logit, the sum of
    exponentials relative to it, the token's logit, and whether that is the first of the largest."""
    rows, columns = logits_TV.shape
    found = logits_TV.new_zeros(rows, 4, dtype=torch.float64)
    found[:, ::2] = -math.inf
    if not columns:
        return found
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    tallest = logits_TV.amax(1)
    powers = _exp(logits_TV - tallest[:, None])
    if rows == 1:  # the library would share its sum among threads
        powers = F.pad(powers, (0, 0, 0, 1))
    found[:, 0], found[:, 1] = tallest, powers.sum(1)[:rows]
    places = torch.tensor(tokens, device=logits_TV.device) - start
    here = ((places >= 0) & (places < columns)).nonzero()[:, 0]
    found[here, 2] = logits_TV[here, places[here]].double()
    largest = (found[:, 2] == found[:, 0]).nonzero()[:, 0]
    found[largest, 3] = (logits_TV[largest].argmax(1) == places[largest]).double()
    return found


def _joined(parts):
    """Return what all parts together say of a row."""
    tallest = max(part[0] for part in parts)
    total = sum(power * math.exp(largest - tallest) for largest, power, *_ in parts)
    is_first = next((part[3] for part in parts if part[0] == tallest), 0)
    return max(part[2] for part in parts) - tallest - math.log(total), bool(is_first)

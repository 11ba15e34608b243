"""Positions: by how much each turns queries and keys (Su et al. 2021), and which see which.

Legend: S positions, N head width, R numbers of a head that are turned.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from mpillm.model.rotary import rotary_rates


@dataclass
class Batch:
    """The shape of a microbatch and what layers need of it.

    ``cos_SR``, ``sin_SR`` are the rotary tables of the positions at hand, one for each pair of turned numbers; ``mask``
    (B, 1, S, S') says who sees whom, ``None`` what the model's attention says by itself. ``lengths_B`` are those of
    sequences where some are shorter. In inference all tokens are one row, of as many requests as there are: ``places_S`` says
    at which position each stands, and ``cache`` (:class:`mpillm.inference.cache.Pages`) does the attention.
    """

    sequences: int
    positions: int
    cos_SR: torch.Tensor
    sin_SR: torch.Tensor
    mask: torch.Tensor | None = None
    lengths_B: torch.Tensor | None = None
    places_S: torch.Tensor | None = None
    cache: object = None

    @cached_property
    def tokens(self):
        """The number of tokens."""
        return self.sequences * self.positions


def shares_of_mean(batch, like):
    """Return what each token counts in the mean of its sequence, ``[T]``: nothing behind its end."""
    whole_B = like.new_full((batch.sequences,), batch.positions)
    lengths_B = whole_B if batch.lengths_B is None else batch.lengths_B.to(like.dtype)
    is_there = torch.arange(batch.positions, device=like.device) < lengths_B[:, None]
    return (is_there / lengths_B[:, None]).flatten()


def pooled(x_TD, batch, pooling):
    """Return one vector a sequence ``[B, D]``: that of its ``first`` or ``last`` position; or the ``mean`` of all it has, of
    tokens that were multiplied by :func:`shares_of_mean` before."""
    x_BSD, lengths_B = x_TD.unflatten(0, (batch.sequences, batch.positions)), batch.lengths_B
    if pooling == "first":
        return x_BSD[:, 0]
    if pooling == "last":
        return x_BSD[:, -1] if lengths_B is None else x_BSD[torch.arange(len(x_BSD), device=x_BSD.device), lengths_B - 1]
    return x_BSD.sum(1)


def rotary_tables(model, positions, dtype, device="cpu"):
    """Return cos and sin of the angles by which a model turns pairs at ``positions``, each ``[S, R/2]``; computed in float64.
    """
    rates, scale = rotary_rates(model)
    rates = torch.as_tensor(rates, dtype=torch.float64, device=device)
    angles = torch.as_tensor(positions, dtype=torch.float64, device=device)[:, None] * rates
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def turn(x_BHSN, batch, sign):
    """Turn the pairs ``(i, i + R/2)`` of each head by ``sign`` (1 or -1) times the position's angles, where they lie."""
    half = batch.cos_SR.shape[1]
    a, b = x_BHSN[..., :half], x_BHSN[..., half:2 * half]
    a_before = a.clone()
    a.mul_(batch.cos_SR).addcmul_(b, batch.sin_SR, value=-sign)
    b.mul_(batch.cos_SR).addcmul_(a_before, batch.sin_SR, value=sign)


def visible(model, start, stop, device="cpu", documents_BS=None):
    """Return which positions the positions ``[start, stop)`` see of ``[0, stop)``: a mask that :class:`Batch` takes.

    ``documents_BS`` says in which document a position is: it sees no others. ``None`` where nothing is left to say: from the
    first position on, within no document and no window, attention itself knows what is causal.
    """
    is_banded = model.window is not None and model.window < stop
    is_causal = model.attention == "causal"
    if not is_banded and documents_BS is None and (start == 0 or not is_causal):
        return None
    queries, keys = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
    seen = keys <= queries if is_causal else torch.ones(stop - start, stop, dtype=torch.bool, device=device)
    if is_banded:
        seen &= (queries - keys).abs() < model.window
    if documents_BS is None:
        return seen[None, None]
    return (seen & (documents_BS[:, start:, None] == documents_BS[:, None, :]))[:, None]

"""A token out of logits: in one thread and row by row, so that equal logits give the same token everywhere."""

import numpy as np


def choose(logits, sampling, position, seen=()):
    """Return the token to stand at ``position``, or -1 if some of ``logits`` (numpy, ``[V]``) are not finite.

    Local. The random number comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by the seed and started at
    the position. Penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2025)
    act in this order.

    Parameters
    ----------
    logits : ndarray
    sampling : mpillm.inference.requests.Sampling
    position : int
    seen : sequence of int
        Tokens that are there already.
    """
    if not np.isfinite(logits).all():
        return -1
    if sampling.repetition_penalty != 1 and len(seen):
        logits, seen = logits.copy(), np.unique(seen)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / sampling.repetition_penalty,
                                logits[seen] * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.astype(np.float64)
    odds = np.exp((logits - logits.max()) / sampling.temperature)
    odds = _truncated(odds, sampling)
    sums = odds.cumsum()
    generator = np.random.Generator(np.random.Philox(key=sampling.seed, counter=[0, 0, 0, position]))
    return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))


def _truncated(odds, sampling):
    """Return odds with those of tokens that are not to be chosen set to zero; of equals the first are kept."""
    if sampling.top_k and sampling.top_k < len(odds) or sampling.top_p < 1:
        order = np.argsort(-odds, kind="stable")[:sampling.top_k or None]
        if sampling.top_p < 1:
            sums = odds[order].cumsum()
            order = order[:1 + np.searchsorted(sums, sampling.top_p * sums[-1], side="left")]
        kept = np.zeros_like(odds)
        kept[order] = odds[order]
        odds = kept
    return np.where(odds < sampling.min_p * odds.max(), 0, odds) if sampling.min_p else odds


def log_softmax(logits):
    """Return the log-probabilities of a row (numpy) in float64. Local."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())


def likeliest(logprobs, count):
    """Return the ``count`` likeliest tokens of a row (numpy) with their log-probabilities, the likeliest first."""
    order = np.argsort(-logprobs, kind="stable")[:count]
    return [(int(token), float(logprobs[token])) for token in order]

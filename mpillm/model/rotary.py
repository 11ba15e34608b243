"""Rotary positions (Su et al. 2021): how fast the pairs of a head turn, also for sequences longer than those trained on."""

import math

import numpy as np


def rotary_rates(model):
    """Return the angles that a position turns the pairs of a head by, and what cosines and sines are multiplied with.

    Local. A scaling slows pairs down by its factor: all of them (``linear``), or those that turn slowly, with a share for the
    pairs between. ``llama3`` measures that share by the turns that a pair makes in the length trained on before, ``yarn`` (Peng
    et al. 2023) by the pair's place between those of two such numbers of turns.

    Parameters
    ----------
    model : mpillm.model.description.Model

    Returns
    -------
    rates : numpy.ndarray, shape (rotary_dim / 2,)
        In float64, of the pairs ``(i, i + rotary_dim / 2)``.
    scale : float
    """
    dim, scaling, scale = model.rotary_dim, model.rope_scaling, 1.0
    rates = model.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return rates, scale
    if scaling.kind == "linear":
        kept = np.zeros(len(rates))
    elif scaling.kind == "llama3":
        turns = scaling.original_max_seq_len * rates / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        kept = _kept_by_place(model, dim, scaling)
        scale = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    kept = kept.clip(0, 1)
    return rates * (kept + (1 - kept) / scaling.factor), scale


def _kept_by_place(model, dim, scaling):
    """Return 1 or more for pairs before the place of ``beta_fast`` turns, 0 or less for those behind that of ``beta_slow``."""
    first, last = (dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))
                   for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 * (first == last)
    return (last - np.arange(dim // 2)) / (last - first)

"""Dynamic program and linear program: what to keep and what to compute again under a memory limit."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.optimize import linprog

from mpillm.errors import ConfigError

UNITS = 4096  # into which the memory limit is cut


@dataclass(frozen=True)
class Choice:
    """A mode for every layer.

    Attributes
    ----------
    modes : tuple of int
        The row of ``time_s`` and ``n_bytes`` that each layer takes.
    time_s, n_bytes : float
        Of all layers.
    """

    modes: tuple
    time_s: float
    n_bytes: float
    _program: tuple = field(repr=False, compare=False)

    @property
    def bound_s(self):
        """What no choice, of parts of modes too, could beat."""
        return self._relaxed[0]

    @property
    def price_s_per_byte(self):
        """By how much the bound falls for a byte more: the dual of the limit."""
        return self._relaxed[1]

    @cached_property
    def _relaxed(self):
        return _relaxed(*self._program)


def choose_modes(time_s, n_bytes, limit_bytes):
    """Choose one mode a layer so that all together take the least time within a memory limit.

    Local. A multiple-choice knapsack: the dynamic program goes over layers and units of memory, ``E(l, v) = min over
    modes of E(l - 1, v - bytes) + time`` (Miao et al. 2022); what a layer takes is rounded up to units, so that the
    answer always fits, and is the best one but for the rounding; what that leaves goes to whichever layers it makes
    faster. The linear program lets layers mix modes; at its
    optimum one layer at most does (Sinha and Zoltners 1979).

    Parameters
    ----------
    time_s, n_bytes : array of shape (modes, layers)
    limit_bytes : float

    Returns
    -------
    Choice

    Raises
    ------
    ConfigError
        If not even the leanest modes fit.

    Notes
    -----
    Time: layers times modes times :data:`UNITS`.
    """
    time_s, n_bytes = np.asarray(time_s, float), np.asarray(n_bytes, float)
    modes, layers = time_s.shape
    least = n_bytes.min(0).sum()
    if least > limit_bytes:
        raise ConfigError(f"{layers} layers keep at least {least:.4g} bytes, the limit is {limit_bytes:.4g}: split "
                          "them over more ranks, or take a smaller microbatch")
    total = min(limit_bytes, n_bytes.max(0).sum())
    unit = max(total / UNITS, 1e-300)
    needs = np.ceil(n_bytes / unit - 1e-9).astype(int)
    best, chosen = np.zeros(UNITS + 1), np.zeros((layers, UNITS + 1), int)
    for layer in range(layers):
        options = np.full((modes, UNITS + 1), np.inf)
        for mode in range(modes):
            need = needs[mode, layer]
            if need <= UNITS:
                options[mode, need:] = best[:UNITS + 1 - need] + time_s[mode, layer]
        chosen[layer] = options.argmin(0)
        best = options.min(0)
    if np.isinf(best[-1]):  # only rounding up does not fit
        picked = n_bytes.argmin(0)
    else:
        picked, left = np.zeros(layers, int), UNITS
        for layer in range(layers - 1, -1, -1):
            picked[layer] = chosen[layer, left]
            left -= needs[picked[layer], layer]
    where = picked, np.arange(layers)
    left = max(0.0, limit_bytes - n_bytes[where].sum())
    for layer in range(layers):
        more = n_bytes[:, layer] - n_bytes[picked[layer], layer]
        picked[layer] = np.where(more <= left, time_s[:, layer], np.inf).argmin()
        left -= more[picked[layer]]
    return Choice(tuple(picked.tolist()), float(time_s[where].sum()), float(n_bytes[where].sum()),
                  (time_s, n_bytes, limit_bytes))


def _relaxed(time_s, n_bytes, limit_bytes):
    """Return the least time with mixed modes, and the price of the limit."""
    modes, layers = time_s.shape
    unit = max(limit_bytes, 1e-300)
    once = np.tile(np.eye(layers), modes)
    found = linprog(time_s.ravel(), A_ub=[n_bytes.ravel() / unit], b_ub=[limit_bytes / unit], A_eq=once,
                    b_eq=np.ones(layers), bounds=(0, 1), method="highs")
    return float(found.fun), float(-found.ineqlin.marginals[0] / unit)

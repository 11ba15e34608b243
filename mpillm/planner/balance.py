"""Linear program: shares of a batch over unequal ranks."""

from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
from scipy.optimize import linprog

from mpillm.errors import ConfigError


@dataclass(frozen=True)
class Balance:
    """A batch dealt out.

    Attributes
    ----------
    shares : tuple of int
        Items of every rank.
    time_s : float
        Of the slowest rank with them.
    bound_s : float
        What no division, of parts of items too, could beat.
    item_price_s : float
        By how much the bound rises with one item more: the dual of the sum.
    rank_prices : tuple of float
        By how much the bound rises for a second more that a rank takes: the duals of the ranks.
    """

    shares: tuple
    time_s: float
    bound_s: float
    item_price_s: float
    rank_prices: tuple


def balance(items, item_s, start_s=0.0, most=None):
    """Deal out ``items`` so that the last rank is done as early as possible.

    Local. The linear program minimises ``T`` under ``start_s[r] + item_s[r] x[r] <= T``, ``sum(x) = items`` and
    ``0 <= x <= most``. Whole items are dealt out one by one to the rank that would be done first, which is optimal for
    them; they take at most one item of the slowest rank longer than the bound.

    Parameters
    ----------
    items : int
    item_s : sequence of float
        Seconds an item of every rank.
    start_s : float or sequence of float
        What a rank takes besides.
    most : sequence of int, optional
        The items that a rank's memory holds.

    Returns
    -------
    Balance

    Raises
    ------
    ConfigError
        If the ranks cannot hold all items.
    """
    item_s = np.asarray(item_s, float)
    ranks = len(item_s)
    start_s = np.broadcast_to(np.asarray(start_s, float), ranks)
    most = [items] * ranks if most is None else list(most)
    if sum(most) < items:
        raise ConfigError(f"{items} items: the ranks hold {most}, in all {sum(most)}: take more ranks, or fewer items")
    unit = (start_s + item_s * items / ranks).max()
    found = linprog(np.r_[np.zeros(ranks), 1.0], A_ub=np.c_[np.diag(item_s / unit), -np.ones(ranks)],
                    b_ub=-start_s / unit, A_eq=[[1.0] * ranks + [0.0]], b_eq=[items],
                    bounds=[*((0, limit) for limit in most), (None, None)], method="highs")
    queue = [(start + each, rank) for rank, (start, each) in enumerate(zip(start_s, item_s)) if most[rank] > 0]
    heapify(queue)
    shares = [0] * ranks
    for _ in range(items):
        _, rank = queue[0]
        shares[rank] += 1
        is_full = shares[rank] == most[rank]
        heapreplace(queue, (np.inf if is_full else start_s[rank] + (shares[rank] + 1) * item_s[rank], rank))
    time_s = max((start_s + item_s * shares)[np.asarray(shares) > 0], default=0.0)
    return Balance(tuple(shares), float(time_s), float(found.x[-1] * unit), float(found.eqlin.marginals[0] * unit),
                   tuple((-found.ineqlin.marginals).tolist()))

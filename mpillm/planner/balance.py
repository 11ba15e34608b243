"""Shares of a batch over unequal ranks, or of a message over several routes: a linear program solved by filling up."""

from bisect import bisect_left
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np

from mpillm.errors import ConfigError

BELOW = 1 - 1e-12  # so that rounding does not make more of what is full


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
        By how much the bound rises for a second more that a rank takes: the duals of the ranks, which add up to 1; 0 of
        one that gets nothing, or all that it holds.
    """

    shares: tuple
    time_s: float
    bound_s: float
    item_price_s: float
    rank_prices: tuple


def balance(items, item_s, start_s=0.0, most=None):
    """Deal out ``items`` so that the last rank is done as early as possible.

    Local. Least ``T`` with ``start_s[r] + item_s[r] x[r] <= T`` for every rank that gets anything, ``sum(x) = items``
    and ``0 <= x <= most``. With the ranks that take part given it is a linear program; these are the ones that start
    before ``T``. So ranks are filled up like vessels until all items are in, which takes ``O(N log N)`` and gives the
    duals too. Whole items are dealt out one by one to the rank that would be done first, which is optimal for them;
    they take at most one item of the slowest rank longer than the bound.

    Parameters
    ----------
    items : int
        Sequences of a batch; or bytes of a message, and then the ranks are routes or algorithms.
    item_s : sequence of float
        Seconds an item of every rank.
    start_s : float or sequence of float
        What a rank takes besides, if it gets anything.
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
    most = np.full(ranks, items) if most is None else np.asarray(most)
    if most.sum() < items:
        raise ConfigError(f"{items} items: the ranks hold {most.tolist()}, in all {most.sum()}: take more ranks, or "
                          "fewer items")
    full_s = start_s + item_s * most

    def held(time_s):
        return np.clip((time_s - start_s) / item_s, 0, most)

    steps = np.unique(np.r_[start_s, full_s])  # between two of them the same ranks take part
    low = max(0, bisect_left(steps, items * BELOW, key=lambda time_s: held(time_s).sum()) - 1)
    takes = np.where((start_s <= steps[low]) & (steps[low] < full_s), 1 / item_s, 0.0)
    item_price_s = 1 / takes.sum() if takes.any() else 0.0
    bound_s = steps[low] + (items - held(steps[low]).sum()) * item_price_s
    # None is done later than the bound with the items that it can finish by then: the rest, less than one a rank.
    shares = np.floor(held(bound_s) * BELOW).astype(int)
    queue = [((np.inf if shares[rank] == most[rank] else start_s[rank] + (shares[rank] + 1) * item_s[rank]), rank)
             for rank in range(ranks)]
    heapify(queue)
    for _ in range(items - shares.sum()):
        _, rank = queue[0]
        shares[rank] += 1
        is_full = shares[rank] == most[rank]
        heapreplace(queue, (np.inf if is_full else start_s[rank] + (shares[rank] + 1) * item_s[rank], rank))
    time_s = max((start_s + item_s * shares)[shares > 0], default=0.0)
    return Balance(tuple(shares.tolist()), float(time_s), float(bound_s), float(item_price_s),
                   tuple((takes * item_price_s).tolist()))


def price_speeds(items, speeds, step_s):
    """Return what a unit more of each data rank's speed is worth: rows of a plan's ``binding``; none if all are equal.

    Local. A rank that is one per cent faster takes one per cent of the step less for its share, and the dual says what
    that brings once the batch is dealt out anew.
    """
    if len(set(speeds)) == 1:
        return []
    prices = balance(items, 1 / np.asarray(speeds)).rank_prices
    return [{"what": f"speed of data rank {rank}", "value": speed, "limit": speed,
             "price_s_per_unit": price * step_s / speed}
            for rank, (speed, price) in enumerate(zip(map(float, speeds), prices))]

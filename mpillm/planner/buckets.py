"""Dynamic program: which gradients travel together."""

import numpy as np


def bucket_cuts(ready_s, n_bytes, time_s, free_s=0.0):
    """Return the first gradient of every bucket after the first, so that the last bucket arrives as early as possible.

    Local. Gradients become ready in order; a bucket starts when its last gradient is ready and the bucket before has
    arrived. With ``E(j)`` for the arrival of the first ``j``: ``E(j) = min over i of max(E(i), ready(j)) +
    time(bytes(i..j))`` (Shi et al. 2019, whose greedy merging this generalises to any cost). Among equal optima the
    last bucket is the largest.

    Parameters
    ----------
    ready_s : sequence of float
        When each gradient is ready, ascending.
    n_bytes : sequence of int
        Of each gradient.
    time_s : callable
        From an array of bytes to an array of seconds: what a bucket takes.
    free_s : float
        When what went before has arrived.

    Returns
    -------
    cuts : tuple of int
    end_s : float
        When the last bucket has arrived.

    Notes
    -----
    Time: ``O(len(n_bytes)**2)``.
    """
    sums = np.concatenate([[0.0], np.cumsum(n_bytes, dtype=float)])
    ends, origin = np.full(len(sums), free_s, float), np.zeros(len(sums), int)
    for stop in range(1, len(sums)):
        found = np.maximum(ends[:stop], ready_s[stop - 1]) + time_s(sums[stop] - sums[:stop])
        origin[stop] = int(found.argmin())
        ends[stop] = found[origin[stop]]
    cuts, place = [], len(n_bytes)
    while place and (place := int(origin[place])):
        cuts.append(place)
    return tuple(reversed(cuts)), float(ends[-1])


"""Which sample stands where in training: an order that depends only on the seed and the global sample number."""

import math
from functools import lru_cache

import numpy as np

ORDER = "feistel"  # of new runs; a run keeps the one that it began with
_ROUNDS = 8  # four do where there are many samples; few need more to come in every order alike


def training_order(num_samples, seed, first, count, order=ORDER):
    """Return the samples that global sample numbers ``first ... first + count`` stand for.

    Local. Epoch ``e`` visits all samples once, in an order drawn from ``(seed, e)``.

    Parameters
    ----------
    num_samples, seed, first, count : int
    order : {"feistel", "permutation"}
        How it is drawn. ``"permutation"`` is that of runs before there was a choice: it holds all samples of an epoch.

    Notes
    -----
    Cost of ``"feistel"``: some fifty operations of numpy on rows of ``count``.
    """
    found = []
    while count:
        epoch, place = divmod(first, num_samples)
        part = min(count, num_samples - place)  # up to the end of the epoch
        found += ORDERS[order](num_samples, seed, epoch, place, part)
        first, count = first + part, count - part
    return found


def _feistel(num_samples, seed, epoch, place, count):
    """Draw places one by one: a generalised Feistel cipher, walked until it falls among the samples.

    Source: Black and Rogaway (2002), Ciphers with arbitrary finite domains, method 3; its round function is the
    finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)  # rows x columns is at least num_samples, and hardly more
    keys = np.random.Philox(key=[seed, epoch]).random_raw(2 * _ROUNDS).reshape(_ROUNDS, 2)
    samples = np.arange(place, place + count, dtype=np.uint64)
    outside = np.ones(count, bool)
    while outside.any():
        row, column = np.divmod(samples[outside], np.uint64(columns))
        for row_key, column_key in keys:
            row = (row + _mixed(column + row_key) % np.uint64(rows)) % np.uint64(rows)
            column = (column + _mixed(row + column_key) % np.uint64(columns)) % np.uint64(columns)
        samples[outside] = row * np.uint64(columns) + column
        outside = samples >= num_samples
    return samples.tolist()


def _mixed(x):
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _permutation(num_samples, seed, epoch, place, count):
    """Draw all places and take some."""
    return _whole_permutation(num_samples, seed, epoch)[place:place + count].tolist()


@lru_cache(maxsize=2)  # a step may see the end of one epoch and the beginning of the next
def _whole_permutation(num_samples, seed, epoch):
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)


ORDERS = {"feistel": _feistel, "permutation": _permutation}

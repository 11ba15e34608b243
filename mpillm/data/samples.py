"""Which sample stands where in training: an order that depends only on the seed and the global sample number."""

from functools import lru_cache

import numpy as np


def training_order(num_samples, seed, first, count):
    """Return the samples that global sample numbers ``first ... first + count`` stand for.

    Local. Epoch ``e`` visits all samples once, in an order drawn from ``(seed, e)``.
    """
    places = (divmod(number, num_samples) for number in range(first, first + count))
    return [int(_epoch_order(num_samples, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)  # a step may see the end of one epoch and the beginning of the next
def _epoch_order(num_samples, seed, epoch):
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)

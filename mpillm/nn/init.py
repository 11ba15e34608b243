"""Initial weights of the parts of parameters that a rank holds."""

from itertools import pairwise

import torch

from mpillm.model.parameters import TILE, initial_values


def initialise(parameter, seed):
    """Fill a sharded parameter with its part of the initial values, tile by tile. Local."""
    shard, flat = parameter.shard, parameter.detach().view(-1)
    ends = range(shard.start // TILE * TILE + TILE, shard.stop, TILE)
    for low, high in pairwise([shard.start, *ends, shard.stop]):
        flat[low - shard.start:high - shard.start] = torch.from_numpy(initial_values(shard.whole, seed, low, high))

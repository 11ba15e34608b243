"""Initial weights that depend on a parameter's name and global index, never on the layout.

A parameter is cut into fixed tiles of its row-major order. Each tile is drawn by a counter-based generator (Philox,
Salmon et al. 2011) keyed by the run's seed and the parameter's name and started at the tile's number; any rank can
draw any range of any parameter by itself.
"""

import hashlib
from itertools import pairwise

import numpy as np
import torch

TILE = 65536
INITIAL_STD = 0.02


def initial_values(name, seed, start, stop, std):
    """Return elements ``[start, stop)`` of the row-major order of parameter ``name`` as float64.

    Local. ``std`` is the standard deviation around zero, or ``None`` for ones.
    """
    if std is None:
        return np.ones(stop - start)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    first, last = start // TILE, -(-stop // TILE)
    tiles = [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, tile]))
             .standard_normal(min(TILE, stop - tile * TILE)) for tile in range(first, last)]
    values = np.concatenate(tiles) if tiles else np.empty(0)
    return std * values[start - first * TILE:stop - first * TILE]


def initialise(parameter, seed):
    """Fill a sharded parameter with its part of the initial values, tile by tile. Local."""
    shard, flat = parameter.shard, parameter.detach().view(-1)
    ends = range(shard.start // TILE * TILE + TILE, shard.stop, TILE)
    for low, high in pairwise([shard.start, *ends, shard.stop]):
        values = initial_values(shard.name, seed, low, high, shard.std)
        flat[low - shard.start:high - shard.start] = torch.from_numpy(values)


def parameter_table(model):
    """Return every parameter of a model: ``{name: (whole shape, initial standard deviation or None for ones)}``.

    Local. Weights split along their input (``output``, ``down``) are stored input-first.
    """
    width, ffn, std = model.hidden_size, model.ffn_size, INITIAL_STD
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    out_std = std / (2 * model.num_layers) ** 0.5
    shapes = {"embedding.weight": ((model.vocab_size, width), std)}
    for i in range(model.num_layers):
        layer = {
            "attention_norm.weight": ((width,), None), "attention.query.weight": ((queries, width), std),
            "attention.key.weight": ((keys, width), std), "attention.value.weight": ((keys, width), std),
            "attention.output.weight": ((queries, width), out_std), "ffn_norm.weight": ((width,), None),
            "ffn.gate.weight": ((ffn, width), std), "ffn.up.weight": ((ffn, width), std),
            "ffn.down.weight": ((ffn, width), out_std),
        }
        shapes.update({f"layers.{i}.{name}": value for name, value in layer.items()})
    shapes["norm.weight"] = ((width,), None)
    if not model.tie_embeddings:
        shapes["head.weight"] = ((model.vocab_size, width), std)
    return shapes

"""The table of a model's parameters: of each its name, shape, initial values, and how tensor ranks divide it.

Layers are built from it, the planner sums it, checkpoints and converters name their tensors by it. Weights that are split
along their input (``output``, ``down``) are stored input-first, so that what a rank holds of any parameter is some of its rows.
"""

import hashlib
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from mpillm.schedules.blocks import bounds

INITIAL_STD = 0.02
TILE = 65536  # values that one counter of the generator gives


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model.

    Attributes
    ----------
    name : str
        As in ``layers.3.attention.query.weight``.
    shape : tuple of int
    std, mean : float
        Of its initial values.
    split : str
        What tensor ranks divide. Its rows: by ``query_heads`` or ``kv_heads``, or one by one (``rows``). Or the work on it,
        of which each rank then has a part of the gradient, while all hold the whole: ``tokens``, where activations are
        sharded by tokens, or ``heads``.
    unit, group : int
        Rows of a head, and query heads that share a key and a value.
    """

    name: str
    shape: tuple
    std: float = INITIAL_STD
    mean: float = 0.0
    split: Literal["query_heads", "kv_heads", "rows", "tokens", "heads"] = "rows"
    unit: int = 1
    group: int = 1

    @property
    def size(self):
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def row_size(self):
        """How many numbers are never divided: a row of a matrix, the part of a head in a vector."""
        if len(self.shape) > 1:
            return math.prod(self.shape[1:])
        return self.size if self.split in ("tokens", "heads") else self.unit


class Held(NamedTuple):
    """What a tensor rank has of a parameter: rows ``[start, stop)``; whether these are all, on every rank; and whether its
    gradient is a part of the sum."""

    start: int
    stop: int
    is_replicated: bool = False
    is_partial_grad: bool = False


def held(parameter, ranks, rank, is_exact, is_sharded_by_tokens):
    """Return what tensor rank ``rank`` of ``ranks`` has of a parameter. Local.

    With at least as many key/value heads as ranks, a rank has whole groups of heads. With fewer, query heads are divided one
    by one, and every rank has all keys and values; but ``exact`` always divides whole groups, so that its blocks are the
    same for any number of ranks.
    """
    rows, unit, split = parameter.shape[0], parameter.unit, parameter.split
    if split in ("tokens", "heads"):
        return Held(0, rows, True, ranks > 1 and (split == "heads" or is_sharded_by_tokens))
    if split in ("query_heads", "kv_heads"):
        are_groups = in_groups(rows // (unit * parameter.group), ranks, is_exact)
        if split == "kv_heads" and not are_groups:
            return Held(0, rows, True, True)
        unit *= parameter.group if are_groups else 1
    start, stop = bounds(rows // unit, ranks, rank)
    return Held(start * unit, stop * unit)


def in_groups(num_kv_heads, ranks, is_exact):
    """Tell whether heads are divided by groups that share a key and a value. Local."""
    return is_exact or ranks <= num_kv_heads


@lru_cache(maxsize=64)
def parameters(model):
    """Return every parameter of a model by name: embedding, layers, head. Local.

    Parameters
    ----------
    model : mpillm.model.description.Model
        With ``vocab_size``.

    Returns
    -------
    dict of str to Parameter
    """
    table = {**first_parameters(model)}
    for index in range(model.num_layers):
        table.update({parameter.name: parameter for parameter in layer_parameters(model, index).values()})
    return {**table, **last_parameters(model)}


def first_match(name, patterns):
    """Return the first of some patterns, such as ``layers.0.*``, that a parameter's name matches, or ``None``. Local."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def is_frozen(name, freeze):
    """Tell whether ``train.freeze`` keeps a parameter as it is. Local."""
    return first_match(name, freeze) is not None


@lru_cache(maxsize=64)
def trained_from(model, freeze):
    """Return where the first parameter stands that is trained: at a layer, -1 before all of them, or behind the last. Local.

    Gradients go back to there and no further.
    """
    groups = [first_parameters(model)] + [{one.name: one for one in layer_parameters(model, index).values()}
                                          for index in range(model.num_layers if freeze else 0)]
    return next((place for place, table in enumerate(groups, -1) if not all(is_frozen(name, freeze) for name in table)),
                model.num_layers)


def first_parameters(model):
    """Return what stands before the first layer, by name. Local."""
    width = model.hidden_size
    if model.inputs == "patches":
        table = [Parameter("patches.weight", (model.patch_size, width)),
                 Parameter("patches.bias", (width,), 0.0, split="tokens")]
        if model.class_position:
            table.append(Parameter("class_position.weight", (1, width)))
    else:
        table = [Parameter("embedding.weight", (model.vocab_size, width))]
    if model.positions == "learned":
        table.append(Parameter("positions.weight", (model.max_seq_len, width)))
    if model.embedding_norm:
        table += _norm("embedding_norm", model)
    return _by_name(table)


def last_parameters(model):
    """Return what stands behind the last layer, by name; a head that shares the embedding's matrix has none of its own.
    Local."""
    width, table = model.hidden_size, []
    if model.has_final_norm:
        table += _norm("norm", model)
    if model.head == "masked" or model.pooler:
        table += [Parameter("head.transform.weight", (width, width), split="tokens"),
                  Parameter("head.transform.bias", (width,), 0.0, split="tokens")]
    if model.head == "masked":
        table += _norm("head.norm", model)
    if not model.tie_embeddings:
        table.append(Parameter("head.weight", (model.head_size, width), unit=model.outputs_per_label))
    if model.head_bias:
        table.append(Parameter("head.bias", (model.head_size,), 0.0, unit=model.outputs_per_label))
    return _by_name(table)


def layer_parameters(model, index=0):
    """Return the parameters of layer ``index`` by the rest of their names. Local."""
    prefix = f"layers.{index}."
    return {parameter.name.removeprefix(prefix): parameter for parameter in _layer(model, prefix)}


def _layer(model, prefix):
    """Yield the parameters of a layer."""
    width, head_dim, ffn = model.hidden_size, model.head_dim, model.ffn_size
    group = model.num_heads // model.num_kv_heads
    queries = {"split": "query_heads", "unit": head_dim, "group": group}
    keys = {"split": "kv_heads", "unit": head_dim}
    heads = {"query": (model.num_heads, queries), "key": (model.num_kv_heads, keys), "value": (model.num_kv_heads, keys)}
    out_std = INITIAL_STD / math.sqrt(2 * model.num_layers)
    yield from _norm(f"{prefix}attention_norm", model)
    for part, (count, divided) in heads.items():
        yield Parameter(f"{prefix}attention.{part}.weight", (count * head_dim, width), **divided)
        if model.attention_bias:
            yield Parameter(f"{prefix}attention.{part}.bias", (count * head_dim,), 0.0, **divided)
    for part in ("query", "key") if model.qk_norm != "none" else ():
        count, divided = heads[part] if model.qk_norm == "whole" else (1, {"split": "heads"})
        yield Parameter(f"{prefix}attention.{part}_norm.weight", (count * head_dim,), 0.0, _initial_norm(model), **divided)
    yield Parameter(f"{prefix}attention.output.weight", (model.num_heads * head_dim, width), out_std, **queries)
    if model.output_bias:
        yield Parameter(f"{prefix}attention.output.bias", (width,), 0.0, split="tokens")
    yield from _norm(f"{prefix}ffn_norm", model)
    for part in ("gate", "up") if model.is_gated else ("up",):
        yield Parameter(f"{prefix}ffn.{part}.weight", (ffn, width))
        if model.ffn_bias:
            yield Parameter(f"{prefix}ffn.{part}.bias", (ffn,), 0.0)
    yield Parameter(f"{prefix}ffn.down.weight", (ffn, width), out_std)
    if model.ffn_bias:
        yield Parameter(f"{prefix}ffn.down.bias", (width,), 0.0, split="tokens")


def _norm(name, model):
    """Return the parameters of a norm over the width of the model."""
    weight = Parameter(f"{name}.weight", (model.hidden_size,), 0.0, _initial_norm(model), "tokens")
    bias = Parameter(f"{name}.bias", (model.hidden_size,), 0.0, split="tokens")
    return [weight, bias] if model.norm == "layer" else [weight]


def _initial_norm(model):
    """Return the initial weight of norms: they start as the identity."""
    return 0.0 if model.norm_offset else 1.0


def _by_name(table):
    return {parameter.name: parameter for parameter in table}


def initial_values(parameter, seed, start, stop):
    """Return elements ``[start, stop)`` of the row-major order of a parameter's initial values as float64.

    Local. They depend on the parameter's name and the place in it, never on the layout. A parameter is cut into fixed tiles.
    Each tile is drawn by a counter-based generator (Philox, Salmon et al. 2011) keyed by the run's seed and the parameter's
    name and started at the tile's number; any rank can draw any range of any parameter by itself.
    """
    if not parameter.std:
        return np.full(stop - start, parameter.mean)
    digest = hashlib.sha256(f"{seed}/{parameter.name}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    first, last = start // TILE, -(-stop // TILE)
    tiles = [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, tile]))
             .standard_normal(min(TILE, stop - tile * TILE)) for tile in range(first, last)]
    values = np.concatenate(tiles) if tiles else np.empty(0)
    return parameter.mean + parameter.std * values[start - first * TILE:stop - first * TILE]

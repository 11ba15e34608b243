"""What a model holds and computes, summed from the table of its parameters: numbers, FLOPs, the bytes of an item and of the
optimiser's state.

Below the configuration, which cuts a pipeline by it where nobody says how.
"""

from functools import lru_cache
from typing import NamedTuple

from mpillm.model.parameters import (
    first_parameters,
    held,
    in_groups,
    is_frozen,
    last_parameters,
    layer_parameters,
    trained_from,
)

STATES = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 2, "adagrad": 1}  # vectors of optimiser state a parameter
OF_MOMENTUM = {"sgd": 1, "rmsprop": 1}  # of which so many are there with momentum alone
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# A layer's products: what weights of the same input make together.
PRODUCTS = {"heads": ("attention.query", "attention.key", "attention.value"), "output": ("attention.output",),
            "ups": ("ffn.gate", "ffn.up"), "down": ("ffn.down",)}


class Sizes(NamedTuple):
    """How many numbers there are of what stands before the first layer, of a layer, and of what stands behind the last; and of
    the matrix that both ends share, which is in both."""

    first: int
    layer: int
    last: int
    shared: int


class Trained(NamedTuple):
    """How many of the numbers of :class:`Sizes` are trained, of every layer by itself."""

    first: int
    layers: tuple
    last: int
    shared: int


class LayerTrained(NamedTuple):
    """What of a layer is trained: of each of its products some weights; whether backward comes to it at all."""

    heads: bool = True
    output: bool = True
    ups: bool = True
    down: bool = True
    has_backward: bool = True


ALL_TRAINED = LayerTrained()


class Crossings(NamedTuple):
    """How often a layer enters what tensor ranks split, and leaves it; and how often it leaves once more where it is
    recomputed, which ends with the last number that backward needs."""

    enters: int
    leaves: int
    leaves_again: int


def num_states(train):
    """Return how many vectors of optimiser state a parameter has. Local."""
    return STATES[train.optimizer] - (0 if train.momentum else OF_MOMENTUM.get(train.optimizer, 0))


def ends(model):
    """Return the parameters before the first layer and those behind the last, two lists; a matrix that the head shares with
    the embedding is the last of the one and the first of the other. Local."""
    first, last = list(first_parameters(model).values()), list(last_parameters(model).values())
    return first, last + first[:1] * model.tie_embeddings


def matrices(table):
    """Return those of some parameters that are matrices. Local."""
    return [parameter for parameter in table if len(parameter.shape) > 1]


def held_size(parameter, own):
    """Return how many numbers a rank has that holds :class:`mpillm.model.parameters.Held` of a parameter. Local."""
    return (own.stop - own.start) * (parameter.size // parameter.shape[0])


@lru_cache(maxsize=1024)
def held_sizes(model, tensor=1, is_exact=False):
    """Return the :class:`Sizes` of the fullest of so many tensor ranks, which the last one is. Local.

    Parameters
    ----------
    model : mpillm.model.description.Model
        With ``vocab_size``.
    tensor : int
    is_exact : bool
        Whether numerics are exact, which never part key/value groups.
    """
    def size(table):
        return sum(held_size(one, held(one, tensor, tensor - 1, is_exact, False)) for one in table)

    first, last = ends(model)
    return Sizes(size(first), size(layer_parameters(model).values()), size(last), size(first[:1] * model.tie_embeddings))


@lru_cache(maxsize=1024)
def trained_sizes(model, freeze, tensor=1, is_exact=False):
    """Return the :class:`Trained` of the fullest of so many tensor ranks. Local; arguments as of :func:`held_sizes`, and the
    patterns of ``train.freeze``."""
    def size(table):
        return sum(held_size(one, held(one, tensor, tensor - 1, is_exact, False)) for one in table
                   if not is_frozen(one.name, freeze))

    first, last = ends(model)
    layers = tuple(size(layer_parameters(model, index).values()) for index in range(model.num_layers if freeze else 1))
    return Trained(size(first), layers if freeze else layers * model.num_layers, size(last),
                   size(first[:1] * model.tie_embeddings))


@lru_cache(maxsize=1024)
def trained_layers(model, freeze):
    """Return the :class:`LayerTrained` of every layer. Local."""
    if not freeze:
        return (ALL_TRAINED,) * model.num_layers
    begin, found = trained_from(model, freeze), []
    for index in range(model.num_layers):
        own = {name for name, one in layer_parameters(model, index).items() if not is_frozen(one.name, freeze)}
        weights = {product: {f"{layer}.weight" for layer in layers} for product, layers in PRODUCTS.items()}
        for product in ("heads", "ups"):  # the biases of others are added behind the sum over tensor ranks
            weights[product] |= {f"{layer}.bias" for layer in PRODUCTS[product]}
        found.append(LayerTrained(**{product: bool(names & own) for product, names in weights.items()},
                                  has_backward=index >= begin))
    return tuple(found)


@lru_cache(maxsize=1024)
def layer_rows(model, tensor, is_exact):
    """Return how many rows of every matrix of a layer a tensor rank multiplies with at most, by name: of keys and values
    that it holds those of the heads that its queries ask, unless a norm goes over the width of all. Local."""
    table = {name: one for name, one in layer_parameters(model).items() if len(one.shape) > 1}
    rows = {}
    for name, one in table.items():
        last = held(one, tensor, tensor - 1, is_exact, False)
        rows[name] = last.stop - last.start
    if model.qk_norm != "whole":
        query = table["attention.query.weight"]
        group = query.unit * query.group  # rows of queries that share a key
        own = [held(query, tensor, rank, is_exact, False) for rank in range(tensor)]
        asked = max(-(-one.stop // group) - one.start // group for one in own)
        rows |= {name: asked * one.unit for name, one in table.items() if one.split == "kv_heads"}
    return rows


def crossings(model):
    """Return the :class:`Crossings` of a layer. Local.

    A parallel one adds both halves before it leaves. Where norms come first, backward needs nothing of the last sum.
    """
    leaves = 1 if model.residual == "parallel" else 2
    return Crossings(2, leaves, leaves - (model.norm_placement == "pre"))


def crossings_back(model, freeze, index):
    """Return by how many of the places where layer ``index`` enters what is split, and where it leaves it, backward comes; and
    whether it comes by the norms of queries and keys. Local."""
    begin, each = trained_from(model, freeze), crossings(model)
    if index != begin:
        return (each.enters, each.leaves, True) if index > begin else (0, 0, False)
    trained = {name for name, one in layer_parameters(model, index).items() if not is_frozen(one.name, freeze)}
    inside = trained - {"attention.output.bias", "ffn.down.bias"}  # those are added where the layer has left what is split

    def has(names, *beginnings):
        return any(name.startswith(beginnings) for name in names)

    is_pre = model.norm_placement == "pre"
    into_attention, into_ffn = is_pre and has(trained, "attention_norm."), is_pre and has(trained, "ffn_norm.")
    out_of_attention, out_of_ffn = into_attention or has(inside, "attention."), into_ffn or has(inside, "ffn.")
    norms = into_attention or has(trained, "attention.query", "attention.key")
    if model.residual == "parallel":
        return into_attention + into_ffn, int(out_of_attention or out_of_ffn), norms
    through_ffn = has(trained, "attention")  # its norm, too: what comes of attention goes into the other half
    return into_attention + (through_ffn or into_ffn), out_of_attention + (through_ffn or out_of_ffn), norms


def passes_head(model, freeze):
    """Tell whether a gradient goes from the head's product to what stands before it. Local."""
    before = [one.name for one in ends(model)[1] if one.name.startswith(("norm.", "head.transform.", "head.norm."))]
    return trained_from(model, freeze) < model.num_layers or not all(is_frozen(name, freeze) for name in before)


def divided_norms(model, tensor, is_exact):
    """Return of how many norms of a layer tensor ranks hold parts of a token, whose squares they add up. Local."""
    if model.qk_norm != "whole" or tensor == 1:
        return 0
    return 1 + in_groups(model.num_kv_heads, tensor, is_exact)  # of the keys, too, unless every rank has them all


def layer_flops(model, seq_len):
    """Return the forward FLOPs of a layer per token: products of weights, and attention to the positions that it sees.

    Local. A position counts half of those up to itself as the mean over a sequence, in a window as many fewer.

    Parameters
    ----------
    model : mpillm.model.description.Model
    seq_len : int
        Tokens of a sequence.

    Returns
    -------
    int
    """
    table = layer_parameters(model)
    width, window = table["attention.query.weight"].shape[0], min(seq_len, model.window or seq_len)
    sides = 1 if model.attention == "causal" else 2
    return _product_flops(table.values()) + 2 * sides * width * window * (2 * seq_len - window) // seq_len


def num_answers(model, seq_len, tokens):
    """Return for how many of so many tokens, or of their sequences, the head has an answer. Local."""
    return tokens if model.pooling == "none" else tokens // seq_len


def head_flops(model):
    """Return the forward FLOPs of the output head per token.

    Local.

    Parameters
    ----------
    model : mpillm.model.description.Model
        With ``vocab_size``.

    Returns
    -------
    int
    """
    return _product_flops(ends(model)[1])


def _product_flops(table):
    """Return the FLOPs of multiplying a token with all matrices of a table."""
    return 2 * sum(matrix.size for matrix in matrices(table))


@lru_cache(maxsize=64)
def trained_flops(model, seq_len, freeze=()):
    """Return the FLOPs of a training step per token, of every layer and of the head.

    Local. Forward, and twice that backward (Narayanan et al. 2021). Frozen weights have no gradient; nor has what goes into a
    layer up to the first that is trained.

    Parameters
    ----------
    model : mpillm.model.description.Model
        With ``vocab_size``.
    seq_len : int
        Tokens of a sequence.
    freeze : tuple of str
        The patterns of ``train.freeze``.

    Returns
    -------
    list of int, int
    """
    def of_weights(table):
        return _product_flops(one for one in table if not is_frozen(one.name, freeze))

    begin, layer, head = trained_from(model, freeze), layer_flops(model, seq_len), head_flops(model)
    inputs = 2 * layer - _product_flops(layer_parameters(model).values())  # with attention, which has no weights
    layers = [layer + (index > begin) * inputs + of_weights(layer_parameters(model, index).values())
              for index in range(model.num_layers)]
    return layers, head + passes_head(model, freeze) * head + of_weights(ends(model)[1])


def step_flops(model, seq_len, tokens, freeze=()):
    """Return the FLOPs of a training step of so many tokens: int. Local; arguments as of :func:`trained_flops`."""
    layers, head = trained_flops(model, seq_len, freeze)
    return tokens * (sum(layers) + head)

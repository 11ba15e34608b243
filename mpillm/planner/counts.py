"""What a model holds and computes: parameters, FLOPs, the bytes of an item and of the optimiser's state.

Below the configuration, which cuts a pipeline by it where nobody says how.
"""

STATES = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 2, "adagrad": 1}  # vectors of optimiser state a parameter
FFN_MATRICES = {"llama": 3, "gpt": 2}  # gate, up and down; up and down
OF_MOMENTUM = {"sgd": 1, "rmsprop": 1}  # of which so many are there with momentum alone
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def num_states(train):
    """Return how many vectors of optimiser state a parameter has. Local."""
    return STATES[train.optimizer] - (0 if train.momentum else OF_MOMENTUM.get(train.optimizer, 0))


def layer_parameters(model):
    """Return how many parameters a layer has, norms left aside.

    Local.

    Parameters
    ----------
    model : mpillm.config.Model

    Returns
    -------
    int
    """
    heads, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return model.hidden_size * (2 * heads + 2 * keys + FFN_MATRICES[model.kind] * model.ffn_size)


def layer_flops(model, seq_len):
    """Return the forward FLOPs of a layer per token: products of weights, and attention over half of ``seq_len``.

    Local.

    Parameters
    ----------
    model : mpillm.config.Model
    seq_len : int
        Tokens of a sequence.

    Returns
    -------
    int
    """
    return 2 * layer_parameters(model) + 2 * seq_len * model.num_heads * model.head_dim


def head_flops(model):
    """Return the forward FLOPs of the output head per token.

    Local.

    Parameters
    ----------
    model : mpillm.config.Model
        With ``vocab_size``.

    Returns
    -------
    int
    """
    return 2 * model.hidden_size * model.vocab_size


def step_flops(model, seq_len, tokens):
    """Return the FLOPs of a training step: forward, and twice that backward (Narayanan et al. 2021).

    Local.

    Parameters
    ----------
    model : mpillm.config.Model
        With ``vocab_size``.
    seq_len : int
        Tokens of a sequence.
    tokens : int
        Of the whole batch.

    Returns
    -------
    int
    """
    return 3 * tokens * (model.num_layers * layer_flops(model, seq_len) + head_flops(model))

"""What a model costs: FLOPs per layer, parameters, and the messages of one training step."""



def layer_flops(model, seq_len):
    """Return the forward FLOPs per token of one layer: products of weights, and attention over half of ``seq_len``."""
    heads, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = model.hidden_size * (2 * heads + 2 * keys + 3 * model.ffn_size)
    return 2 * weights + 2 * seq_len * heads


def head_flops(model):
    """Return the forward FLOPs per token of the output head."""
    return 2 * model.hidden_size * model.vocab_size


def step_flops(model, seq_len, tokens):
    """Return the FLOPs of a training step over ``tokens``: forward, and twice that backward (Narayanan et al. 2021)."""
    return 3 * tokens * (model.num_layers * layer_flops(model, seq_len) + head_flops(model))

"""The table of the Llama family: its names at Hugging Face, and which of its settings mpillm computes alike.

Both sides turn the pairs ``(i, i + N/2)`` of a head, so that rotary positions need nothing. Weights that mpillm splits
along their input are stored input-first: these are transposed.
"""

NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
TRANSPOSED = ("attention.output.weight", "ffn.down.weight")
RUN_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}

# Keys of [model] and of config.json that mean the same.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "ffn_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# Keys of config.json that change what is computed, with the values for which mpillm computes the same.
SUPPORTED = {
    "model_type": ["llama"], "architectures": [["LlamaForCausalLM"], None], "hidden_act": ["silu", "swish", None],
    "attention_bias": [False, None], "mlp_bias": [False, None], "quantization_config": [None],
    "partial_rotary_factor": [1.0, None],
}


def hf_name(name):
    """Translate the name of a parameter: ``layers.0.ffn.up.weight`` → ``model.layers.0.mlp.up_proj.weight``."""
    part = name.removesuffix(".weight")
    if not part.startswith("layers."):
        return f"{NAMES[part]}.weight"
    _, layer, part = part.split(".", 2)
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def turned(name, matrix):
    """Turn a weight from one side's storage to the other's."""
    return matrix.T if name.endswith(TRANSPOSED) else matrix

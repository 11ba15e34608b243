"""Ten families: what the files of each call things, and for which settings mpillm computes the same.

Both sides turn the pairs ``(i, i + N/2)`` of a head, so that rotary positions need nothing. To add a family, add a table.
"""

from mpillm.hf.family import Family, Key
from mpillm.hf.folder import Refused
from mpillm.hf.heads import with_labels
from mpillm.hf.rope import Rope

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
BIASED = {"norm": "layer", "ffn_bias": True}
BOTH_BIASES = "attention_bias output_bias"


def sizes(max_seq_len, norm_eps, is_tied=False):
    """Return the keys of Llama and its kin, with the defaults that differ between them."""
    return {
        "vocab_size": Key("vocab_size"), "hidden_size": Key("hidden_size"), "intermediate_size": Key("ffn_size"),
        "num_hidden_layers": Key("num_layers"), "num_attention_heads": Key("num_heads"),
        "num_key_value_heads": Key("num_kv_heads", None), "head_dim": Key("head_dim", None),
        "max_position_embeddings": Key("max_seq_len", max_seq_len), "rms_norm_eps": Key("norm_eps", norm_eps),
        "hidden_act": Key("ffn", "silu", GATED), "tie_word_embeddings": Key("tie_embeddings", is_tied),
    }


ENDS = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
ATTENTION = {
    "model.layers.{}.self_attn.q_proj": "attention.query", "model.layers.{}.self_attn.k_proj": "attention.key",
    "model.layers.{}.self_attn.v_proj": "attention.value", "model.layers.{}.self_attn.o_proj": "attention.output",
}
QK_NORMS = {"model.layers.{}.self_attn.q_norm": "attention.query_norm",
            "model.layers.{}.self_attn.k_norm": "attention.key_norm"}
FFN = {"model.layers.{}.mlp.gate_proj": "ffn.gate", "model.layers.{}.mlp.up_proj": "ffn.up",
       "model.layers.{}.mlp.down_proj": "ffn.down"}
NORMS = {"model.layers.{}.input_layernorm": "attention_norm", "model.layers.{}.post_attention_layernorm": "ffn_norm"}
DECODER = {**ENDS, **NORMS, **ATTENTION, **FFN}
ANGLES = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # tables in old files

LLAMA = Family(
    "llama", ("LlamaForCausalLM",), DECODER,
    {**sizes(2048, 1e-6), "attention_bias": Key(BOTH_BIASES, False), "mlp_bias": Key("ffn_bias", False)},
    only={"rope_interleaved": (False,)}, rope=Rope(), ignored=ANGLES, harmless=("is_llama_config",),
)

MISTRAL = Family(
    "mistral", ("MistralForCausalLM",), DECODER,
    {**sizes(4096 * 32, 1e-6), "num_key_value_heads": Key("num_kv_heads", 8), "sliding_window": Key("window", 4096)},
    rope=Rope(), ignored=ANGLES,
)


def _read_window(values):
    """Return the window of a Qwen, which some of its layers may have and others not."""
    num_layers, full = values.get("num_hidden_layers"), values.get("max_window_layers", 28)
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    kinds, all_layers = values.get("layer_types"), num_layers if type(num_layers) is int else 0
    if kinds is None:
        is_mixed = window is not None and type(num_layers) is type(full) is int and 0 < full < num_layers
        if is_mixed:
            raise Refused("max_window_layers", full, f"only layers behind these have a window, and mpillm has one for all "
                          f"{num_layers} or none: convert another model")
        return {"window": window if full == 0 else None}
    if kinds not in [[kind] * all_layers for kind in ("full_attention", "sliding_attention")]:
        raise Refused("layer_types", kinds, "mpillm has one kind of attention for all layers: convert another model")
    is_sliding = "sliding_attention" in kinds
    if is_sliding and window is None:
        raise Refused("layer_types", kinds, "asks for a window, but use_sliding_window and sliding_window give none")
    return {"window": window if is_sliding else None}


def _write_window(model):
    return {"use_sliding_window": model.window is not None, "sliding_window": model.window, "max_window_layers": 0}


QWEN_WINDOW = {
    "read": _read_window, "write": _write_window,
    "read_keys": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), "only": {"use_mrope": (False,)},
}

QWEN2 = Family(
    "qwen2", ("Qwen2ForCausalLM",), DECODER, {**sizes(32768, 1e-6), "num_key_value_heads": Key("num_kv_heads", 32)},
    fixed={"attention_bias": True}, rope=Rope(), ignored=ANGLES, **QWEN_WINDOW,
)

QWEN3 = Family(
    "qwen3", ("Qwen3ForCausalLM",), {**DECODER, **QK_NORMS},
    {**sizes(32768, 1e-6), "num_key_value_heads": Key("num_kv_heads", 32), "head_dim": Key("head_dim", 128),
     "attention_bias": Key(BOTH_BIASES, False)},
    fixed={"qk_norm": "head"}, rope=Rope(), **QWEN_WINDOW,
)


def _read_gemma(values):
    width = values.get("hidden_size")
    return {"embedding_scale": width ** 0.5 if type(width) is int and width > 0 else 1.0}


GEMMA = Family(
    "gemma", ("GemmaForCausalLM",), DECODER,
    {**sizes(8192, 1e-6, is_tied=True), "num_key_value_heads": Key("num_kv_heads", 16), "head_dim": Key("head_dim", 256),
     # Files of the first release say gelu where the approximation by tanh is meant: transformers computes that.
     "hidden_act": Key("ffn", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "geglu", "gelu": "geglu", "gelu_new": "geglu"}),
     "attention_bias": Key(BOTH_BIASES, False)},
    fixed={"norm_offset": True}, only={"use_bidirectional_attention": (False,), "hidden_activation": ("gelu_pytorch_tanh",)},
    rope=Rope(), read=_read_gemma,
)

OLMO2 = Family(
    "olmo2", ("Olmo2ForCausalLM",),
    {**ENDS, **ATTENTION, **QK_NORMS, **FFN, "model.layers.{}.post_attention_layernorm": "attention_norm",
     "model.layers.{}.post_feedforward_layernorm": "ffn_norm"},
    {**sizes(2048, 1e-5), "attention_bias": Key(BOTH_BIASES, False)},
    fixed={"norm_placement": "output", "qk_norm": "whole"}, rope=Rope(),
)

PHI3 = Family(
    "phi3", ("Phi3ForCausalLM",),
    {**ENDS, **NORMS, "model.layers.{}.self_attn.qkv_proj": "attention.query attention.key attention.value",
     "model.layers.{}.self_attn.o_proj": "attention.output", "model.layers.{}.mlp.gate_up_proj": "ffn.gate ffn.up",
     "model.layers.{}.mlp.down_proj": "ffn.down"},
    {**sizes(4096, 1e-5), "sliding_window": Key("window", None)}, only={"attention_bias": (False,)},
    rope=Rope(("default",), fraction=("partial_rotary_factor",)), harmless=("original_max_position_embeddings",),
)


def _read_gpt2(values):
    width = values.get("n_embd")
    return {"ffn_size": 4 * width if type(width) is int else width}


GPT2 = Family(
    "gpt2", ("GPT2LMHeadModel",),
    {"transformer.wte": "embedding", "transformer.wpe": "positions", "transformer.ln_f": "norm", "lm_head": "head",
     "transformer.h.{}.ln_1": "attention_norm", "transformer.h.{}.ln_2": "ffn_norm",
     "transformer.h.{}.attn.c_attn": "attention.query attention.key attention.value",
     "transformer.h.{}.attn.c_proj": "attention.output", "transformer.h.{}.mlp.c_fc": "ffn.up",
     "transformer.h.{}.mlp.c_proj": "ffn.down"},
    {"vocab_size": Key("vocab_size"), "n_embd": Key("hidden_size"), "n_inner": Key("ffn_size", None),
     "n_layer": Key("num_layers"), "n_head": Key("num_heads"), "n_positions": Key("max_seq_len", 1024),
     "layer_norm_epsilon": Key("norm_eps", 1e-5), "activation_function": Key("ffn", "gelu_new", PLAIN),
     "tie_word_embeddings": Key("tie_embeddings", True)},
    fixed={**BIASED, "positions": "learned", "attention_bias": True, "output_bias": True},
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}, read=_read_gpt2,
    input_first=("c_attn.weight", "c_fc.weight", "c_proj.weight"), base="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # its mask, in old files
    harmless=("n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn", "summary_*"),
)

GPT_NEOX = Family(
    "gpt_neox", ("GPTNeoXForCausalLM",),
    {"gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "norm", "embed_out": "head",
     "gpt_neox.layers.{}.input_layernorm": "attention_norm", "gpt_neox.layers.{}.post_attention_layernorm": "ffn_norm",
     "gpt_neox.layers.{}.attention.query_key_value": "attention.query attention.key attention.value",
     "gpt_neox.layers.{}.attention.dense": "attention.output", "gpt_neox.layers.{}.mlp.dense_h_to_4h": "ffn.up",
     "gpt_neox.layers.{}.mlp.dense_4h_to_h": "ffn.down"},
    {"vocab_size": Key("vocab_size"), "hidden_size": Key("hidden_size"), "intermediate_size": Key("ffn_size"),
     "num_hidden_layers": Key("num_layers"), "num_attention_heads": Key("num_heads"),
     "max_position_embeddings": Key("max_seq_len", 2048), "layer_norm_eps": Key("norm_eps", 1e-5),
     "hidden_act": Key("ffn", "gelu", PLAIN), "attention_bias": Key(BOTH_BIASES, True),
     "use_parallel_residual": Key("residual", True, {True: "parallel", False: "sequential"}),
     "tie_word_embeddings": Key("tie_embeddings", False)},
    fixed=BIASED, rope=Rope(theta=("rotary_emb_base", "rope_theta"), fraction=("rotary_pct", "partial_rotary_factor"),
                            default_fraction=0.25),
    is_fused_by_head=True, base="gpt_neox.",
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),  # in old files
)

_BERT_LAYER = "bert.encoder.layer.{}."
BERT = Family(
    "bert", ("BertForMaskedLM", "BertForPreTraining"),
    {"bert.embeddings.word_embeddings": "embedding", "bert.embeddings.position_embeddings": "positions",
     "bert.embeddings.LayerNorm": "embedding_norm", "cls.predictions.transform.dense": "head.transform",
     "cls.predictions.transform.LayerNorm": "head.norm", "cls.predictions.bias": "head.bias",
     **{_BERT_LAYER + theirs: ours for theirs, ours in {
         "attention.self.query": "attention.query", "attention.self.key": "attention.key",
         "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
         "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "ffn.up", "output.dense": "ffn.down",
         "output.LayerNorm": "ffn_norm"}.items()}},
    {"vocab_size": Key("vocab_size"), "hidden_size": Key("hidden_size"), "intermediate_size": Key("ffn_size"),
     "num_hidden_layers": Key("num_layers"), "num_attention_heads": Key("num_heads"),
     "max_position_embeddings": Key("max_seq_len", 512), "layer_norm_eps": Key("norm_eps", 1e-12),
     "hidden_act": Key("ffn", "gelu", PLAIN)},
    fixed={**BIASED, "norm_placement": "post", "positions": "learned", "attention": "bidirectional", "attention_bias": True,
           "output_bias": True, "embedding_norm": True, "head": "masked", "head_bias": True, "tie_embeddings": True},
    only={"tie_word_embeddings": (True,), "is_decoder": (False,), "position_embedding_type": ("absolute",)},
    base="bert.", copies={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                          "cls.predictions.decoder.bias": "cls.predictions.bias"},
    ignored=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"bert\.embeddings\.position_ids"),
    added={"positions.weight": "bert.embeddings.token_type_embeddings.weight"},
    harmless=("directionality", "pooler_*", "type_vocab_size"),
)

_POOLER = {"bert.pooler.dense": "head.transform", "classifier": "head"}
# For a model of several, the first is written.
FAMILIES = {family.model_type: family for family in (
    with_labels(LLAMA, "Llama"), with_labels(MISTRAL, "Mistral"), with_labels(QWEN2, "Qwen2"), with_labels(QWEN3, "Qwen3"),
    with_labels(GEMMA, "Gemma"), with_labels(OLMO2, "Olmo2", None), with_labels(PHI3, "Phi3"),
    with_labels(GPT2, "GPT2", "classifier"), with_labels(GPT_NEOX, "GPTNeoX", "classifier"),
    with_labels(BERT, "Bert", "classifier", _POOLER, pooling="first", pooler=True, head_bias=True))}

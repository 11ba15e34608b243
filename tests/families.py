"""Tiny random models of ``transformers`` for each family, at awkward sizes, in folders as ``save_pretrained`` writes them.

Of every case all weights are random, those of norms and biases too, and large enough for logits of order one. Some have every
optional key of their family off its default.
"""

from contextlib import contextmanager, nullcontext

import numpy as np
import torch

SEQUENCES, POSITIONS, VOCAB = 2, 23, 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 50,
         "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": [0, 3]}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 36, "n_layer": 2, "n_head": 6, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}


def rope(kind, **figures):
    """A scaling whose original length is far shorter than the sequences here."""
    figures = {"factor": 4.0, **({"original_max_position_embeddings": 8} if kind != "linear" else {}), **figures}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 300.0, **figures}}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
# Of each case: the class, and what its configuration says.
CASES = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-3.1": ("LlamaForCausalLM", {**GROUPED, **LLAMA3}),
    "llama-3.2": ("LlamaForCausalLM", {**GROUPED, **LLAMA3, "tie_word_embeddings": True, "head_dim": 10}),
    "llama-linear": ("LlamaForCausalLM", {**SIZES, **rope("linear")}),
    "llama-biases": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
                                          "rms_norm_eps": 1e-2}),
    "llama-gelu": ("LlamaForCausalLM", {**GROUPED, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "mistral-no-window": ("MistralForCausalLM", {**GROUPED, "sliding_window": None, "head_dim": 4}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", {**GROUPED, **WINDOW}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {**GROUPED, **rope("yarn")}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 10}),
    "qwen3-biases": ("Qwen3ForCausalLM", {**GROUPED, **WINDOW, "head_dim": 4, "attention_bias": True}),
    "qwen3-yarn": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16, **rope("yarn", beta_fast=3.0, beta_slow=0.5,
                                                                          attention_factor=1.3, truncate=False)}),
    "gemma": ("GemmaForCausalLM", {**SIZES, "num_key_value_heads": 1, "head_dim": 10}),
    "gemma-untied": ("GemmaForCausalLM", {**GROUPED, "head_dim": 6, "tie_word_embeddings": False, "attention_bias": True}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "olmo2-biases": ("Olmo2ForCausalLM", {**SIZES, "attention_bias": True, **rope("yarn", mscale=1.0, mscale_all_dim=0.5)}),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "sliding_window": 5}),
    "phi3-partial": ("Phi3ForCausalLM", {**SIZES, "hidden_size": 48, "num_key_value_heads": 3, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", {**GPT2, "n_inner": 50, "tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, "hidden_size": 48, "rotary_pct": 0.25}),
    "gpt_neox-sequential": ("GPTNeoXForCausalLM", {**SIZES, "use_parallel_residual": False, "rotary_pct": 1.0,
                                                   "rotary_emb_base": 300, "hidden_act": "gelu_new"}),
    "gpt_neox-unbiased": ("GPTNeoXForCausalLM", {**SIZES, "hidden_size": 48, "attention_bias": False,
                                                 "tie_word_embeddings": True,
                                                 **rope("linear", partial_rotary_factor=0.5)}),
    "bert": ("BertForMaskedLM", SIZES),
    "bert-tanh": ("BertForMaskedLM", {**SIZES, "hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}),
}
PAD = VOCAB - 1  # which no tokens here have
LABELS = {"num_labels": 3, "pad_token_id": PAD}
# The same with other heads.
HEADS = {
    "llama-classes": ("LlamaForSequenceClassification", {**GROUPED, **LABELS, "tie_word_embeddings": True}),
    "llama-values": ("LlamaForSequenceClassification", {**GROUPED, **LABELS, "problem_type": "regression"}),
    "llama-one-value": ("LlamaForSequenceClassification", {**GROUPED, **LABELS, "num_labels": 1}),
    "llama-tags": ("LlamaForTokenClassification", {**GROUPED, **LABELS}),
    "mistral-classes": ("MistralForSequenceClassification", {**GROUPED, **LABELS, "num_labels": 2, "sliding_window": 5}),
    "mistral-tags": ("MistralForTokenClassification", {**GROUPED, **LABELS, "sliding_window": 5}),
    "qwen2-classes": ("Qwen2ForSequenceClassification", {**GROUPED, **LABELS, **WINDOW}),
    "qwen2-tags": ("Qwen2ForTokenClassification", {**GROUPED, **LABELS}),
    "qwen3-classes": ("Qwen3ForSequenceClassification", {**GROUPED, **LABELS, "head_dim": 10}),
    "qwen3-tags": ("Qwen3ForTokenClassification", {**GROUPED, **LABELS, "head_dim": 10}),
    "gemma-classes": ("GemmaForSequenceClassification", {**GROUPED, **LABELS, "head_dim": 6}),
    "gemma-tags": ("GemmaForTokenClassification", {**GROUPED, **LABELS, "head_dim": 6}),
    "olmo2-classes": ("Olmo2ForSequenceClassification", {**GROUPED, **LABELS}),
    "phi3-classes": ("Phi3ForSequenceClassification", {**GROUPED, **LABELS}),
    "phi3-tags": ("Phi3ForTokenClassification", {**GROUPED, **LABELS, "partial_rotary_factor": 0.67}),
    "gpt2-classes": ("GPT2ForSequenceClassification", {**GPT2, **LABELS}),
    "gpt2-tags": ("GPT2ForTokenClassification", {**GPT2, **LABELS}),
    "gpt_neox-classes": ("GPTNeoXForSequenceClassification", {**SIZES, **LABELS, "hidden_size": 48}),
    "gpt_neox-tags": ("GPTNeoXForTokenClassification", {**SIZES, **LABELS, "hidden_size": 48}),
    "bert-classes": ("BertForSequenceClassification", {**SIZES, **LABELS}),
    "bert-values": ("BertForSequenceClassification", {**SIZES, **LABELS, "problem_type": "regression"}),
    "bert-tags": ("BertForTokenClassification", {**SIZES, **LABELS, "num_labels": 2}),
}


def make_model(case, dtype=torch.float32, **changes):
    """Return a random model of a case. What is computed with one of float64 takes :func:`in_float64`."""
    import transformers

    name, values = {**CASES, **HEADS}[case]
    kind = getattr(transformers, name)
    config = kind.config_class(**{**values, **changes, "attn_implementation": "eager"})
    with in_float64() if dtype is torch.float64 else nullcontext():  # for its tables of angles
        model = kind(config).to(dtype).eval()
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.from_numpy(generator.normal(size=tuple(weight.shape))).to(dtype)
            weight.copy_(weight.mean() + 0.2 * noise if weight.dim() == 1 else 0.15 * noise)
    return model


def make_folder(folder, case, dtype=torch.float32, file_size="5GB", **changes):
    """Save the random model of a case; return it."""
    model = make_model(case, dtype, **changes)
    model.save_pretrained(folder, max_shard_size=file_size)
    return model


def make_run(folder, case):
    """Make a run of the random weights of a case in float64; return the configuration that trains on from it."""
    from mpillm import hf
    from mpillm.config import Config

    make_folder(folder / "hf", case, torch.float64)
    hf.from_hf(folder / "run", folder / "hf")
    config = Config.load(folder / "run" / "config.toml")
    return config.with_values({"train.init_from": str(folder / "run"), "train.run_dir": str(folder / "next")})


def make_tokens(seed=0):
    """Return random tokens ``[B, S]``."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, PAD, (SEQUENCES, POSITIONS)))


def make_labels(model, tokens):
    """Return what a model is to predict: the tokens themselves, which its class shifts, or a third of them if it is masked;
    labels of sequences, or of a third of the positions; real numbers."""
    kind, config, draw = type(model).__name__, model.config, np.random.default_rng(1)
    is_counted = torch.from_numpy(draw.random(tokens.shape) < 0.3)
    if kind.endswith("ForSequenceClassification"):
        if config.problem_type == "regression" or config.num_labels == 1:
            return torch.from_numpy(draw.normal(size=(len(tokens), config.num_labels))).to(next(model.parameters()).dtype)
        return torch.arange(len(tokens)) % config.num_labels
    if kind.endswith("ForTokenClassification"):
        return (tokens % config.num_labels).masked_fill(~is_counted, -100)
    return tokens.masked_fill(~is_counted, -100) if kind == "BertForMaskedLM" else tokens


def reference_of(run, dtype):
    """Return the serial reference with the weights of a run."""
    from mpillm.checkpoint.reading import Checkpoint
    from mpillm.verify.reference import Reference

    source = Checkpoint(run)
    reference = Reference(source.model(), 0, dtype)
    with torch.no_grad():
        for name, weight in reference.parameters.items():
            weight.copy_(torch.from_numpy(source.read(name)).view(weight.shape))
    return reference


def relative(a, b):
    """Return the largest difference beside the largest value. That of some is zero but for rounding: a bias that all keys have
    in common changes no attention, unless they are turned."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-5))


@contextmanager
def in_float64():
    """Let the code of ``transformers`` compute in float64, where it says float32: in norms, angles, softmax and loss."""
    names = {"float32": torch.float32, "float": torch.float}
    of_tensors = torch.Tensor.float
    try:
        torch.float32 = torch.float = torch.float64
        torch.Tensor.float = torch.Tensor.double
        yield
    finally:
        for name, value in names.items():
            setattr(torch, name, value)
        torch.Tensor.float = of_tensors

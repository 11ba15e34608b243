"""Every key of the configuration: a plan depends on it, or here it says why not. A new key without a line fails."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional

from mpillm.comm.single import SingleComm
from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.machine import PRESETS
from mpillm.nn.positions import Batch, rotary_tables
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import TransformerStage
from mpillm.planner.search import price_layout
from mpillm.planner.workload import TensorRanks, embedding_work, layer_work

BASE = {
    "model": {"hidden_size": 64, "num_layers": 8, "num_heads": 4, "ffn_size": 172, "vocab_size": 512, "max_seq_len": 512},
    "train": {"seq_len": 256, "global_batch": 16, "microbatch": 2},
    "layout": {"data": 2, "pipeline": 2, "tensor": 2, "chunks": 1, "order": ["pipeline", "data", "tensor"],
               "stage_cuts": [4], "schedule": "1f1b", "zero": 0, "sequence_parallel": False, "recompute": "none",
               "shares": [8, 8], "bucket_cuts": [2]},
}
A_NUMBER = "a number in a formula that costs the same whatever it is"
MASKED = {"model.head": "masked", "model.ffn": "gelu"}
LONG = {**MASKED, "train.seq_len": 512}  # than the blocks that causal kernels leave out
LABELS = {"model.head": "tags", "model.num_labels": 5}
VALUES = {"model.head": "values", "model.num_labels": 50}
PATCHES = {"model.inputs": "patches", "model.patch_size": 48}
NOT_A_STEP = "what it asks for is done between steps"
NOT_TRAINING = "what requests are worked on with"
# Of every key another value, with what must change beside it; or why a plan does not depend on it.
KEYS = {
    "model.hidden_size": {"model.hidden_size": 96}, "model.num_layers": {"model.num_layers": 9},
    "model.num_heads": {"model.num_heads": 8, "model.head_dim": 16}, "model.ffn_size": {"model.ffn_size": 200},
    "model.vocab_size": {"model.vocab_size": 600}, "model.num_kv_heads": {"model.num_kv_heads": 2},
    "model.head_dim": {"model.head_dim": 32}, "model.max_seq_len": {"model.max_seq_len": 255},
    "model.norm": {"model.norm": "layer"}, "model.norm_eps": A_NUMBER, "model.norm_offset": A_NUMBER,
    "model.norm_placement": {"model.norm_placement": "post"}, "model.positions": {"model.positions": "learned"},
    "model.rope_theta": A_NUMBER, "model.rope_scaling": A_NUMBER,
    "model.rope_fraction": "queries and keys are turned where they lie, right behind the product that wrote them",
    "model.attention": (LONG, {**LONG, "model.attention": "bidirectional"}),
    "model.window": {"model.window": 100}, "model.qk_norm": {"model.qk_norm": "head"},
    "model.attention_bias": {"model.attention_bias": True}, "model.output_bias": {"model.output_bias": True},
    "model.ffn": {"model.ffn": "gelu"}, "model.ffn_bias": {"model.ffn_bias": True},
    "model.residual": {"model.residual": "parallel"}, "model.embedding_scale": A_NUMBER,
    "model.embedding_norm": {"model.embedding_norm": True}, "model.head": ({"model.ffn": "gelu"}, MASKED),
    "model.inputs": (LABELS, {**LABELS, **PATCHES}), "model.patch_size": ({**LABELS, **PATCHES}, {
        **LABELS, **PATCHES, "model.patch_size": 999}),
    "model.class_position": ({**LABELS, **PATCHES}, {**LABELS, **PATCHES, "model.class_position": True}),
    "model.num_labels": (LABELS, {**LABELS, "model.num_labels": 999}),
    "model.pooling": (VALUES, {**VALUES, "model.pooling": "mean"}),
    "model.pooler": ({**VALUES, "model.pooling": "mean"}, {**VALUES, "model.pooling": "mean", "model.pooler": True}),
    "model.value_loss": (VALUES, {**VALUES, "model.value_loss": "gaussian"}),
    "model.head_bias": {"model.head_bias": True},
    "model.logit_softcap": {"model.logit_softcap": 30.0}, "model.tie_embeddings": {"model.tie_embeddings": True},
    "data.mask_token": "which token it is", "data.path": "which tokens they are",
    "data.mask_documents": {"data.mask_documents": True},
    "inference.batch": NOT_TRAINING, "inference.cache_bytes": NOT_TRAINING, "inference.pass_tokens": NOT_TRAINING,
    "inference.share_prefixes": NOT_TRAINING,
    "train.run_dir": "where files go", "train.steps": "a plan is for one step", "train.seq_len": {"train.seq_len": 128},
    "train.global_batch": {"train.global_batch": 18, "layout.shares": "auto"},
    "train.microbatch": {"train.microbatch": 1}, "train.optimizer": {"train.optimizer": "sgd"},
    "train.lr": A_NUMBER, "train.min_lr": A_NUMBER, "train.betas": A_NUMBER, "train.eps": A_NUMBER,
    "train.momentum": ({"train.optimizer": "sgd"}, {"train.optimizer": "sgd", "train.momentum": 0.0}),
    "train.lr_schedule": A_NUMBER, "train.warmup_steps": A_NUMBER, "train.decay_steps": A_NUMBER,
    "train.weight_decay": A_NUMBER,
    "train.grad_clip": {"train.grad_clip": 0.0}, "train.dtype": {"train.dtype": "float64"},
    "train.numerics": {"train.numerics": "exact"},
    "train.exact_blocks": "a product in blocks is priced as one: by how much it is slower the probe does not measure; the "
                          "same for all layouts but those that it refuses",
    "train.seed": A_NUMBER, "train.log_every": "a line or none", "train.eval_every": NOT_A_STEP,
    "train.eval_batches": NOT_A_STEP, "train.checkpoint_every": NOT_A_STEP, "train.checkpoint_keep": "files on a disk",
    "train.checkpoint_background": {"train.checkpoint_background": True},
    "train.freeze": {"train.freeze": ["layers.0.*"]}, "train.lr_factors": A_NUMBER,
    "train.init_from": "which weights they are", "train.trace": "lines beside a step, some microseconds each",
    "train.checked": "for finding faults: a plan is for the run without it", "train.hang_limit_s": "when to give up",
    "train.skip_limit": "when to give up", "train.digests": {"train.digests": True},
    "train.device": "the machine was measured on it",
    **{f"layout.{key}": {f"layout.{key}": value} for key, value in {
        "order": ["tensor", "data", "pipeline"], "stage_cuts": [5], "schedule": "gpipe", "zero": 1,
        "sequence_parallel": True, "recompute": "full", "shares": [12, 4], "bucket_cuts": [1, 5]}.items()},
    "layout.data": {"layout.data": 4, "layout.tensor": 1, "layout.shares": "auto"},
    "layout.pipeline": {"layout.data": 1, "layout.pipeline": 4, "layout.stage_cuts": "auto", "layout.shares": "auto"},
    "layout.tensor": {"layout.tensor": 4, "layout.data": 1, "layout.shares": "auto"},
    "layout.chunks": {"layout.chunks": 2, "layout.schedule": "interleaved", "layout.stage_cuts": "auto"},
}
# Two ranks a node of two: gradients go over nodes, beside backward.
MACHINE = PRESETS["cpu-node"]


def predicted(overrides=None):
    plan = price_layout(Config.from_dict(BASE, overrides), MACHINE, 8)
    return plan.predicted["step_s"], plan.predicted["memory_bytes_per_rank"]


def test_every_key_has_a_line_and_no_line_is_of_no_key():
    assert set(KEYS) == {f"{section.name}.{key.name}" for section in fields(Config) for key in fields(section.type)}


@pytest.mark.parametrize("key", [key for key, line in KEYS.items() if not isinstance(line, str)])
def test_a_plan_depends_on_the_key(key):
    line = KEYS[key]
    before, after = line if isinstance(line, tuple) else ({}, line)
    try:
        found = predicted(after)
    except ConfigError as error:
        assert key in str(error)  # it is refused
        return
    assert found != predicted(before)


def test_a_frozen_body_costs_less_time_and_memory():
    frozen = ["embedding.*", "layers.*", "norm.*"]
    for layout in ({}, {"layout.zero": 1}, {"train.numerics": "exact"}, {"layout.schedule": "zb-h1"}):
        (plain_s, plain_bytes), (frozen_s, frozen_bytes) = predicted(layout), predicted({**layout, "train.freeze": frozen})
        assert frozen_s < 0.7 * plain_s and frozen_bytes < 0.7 * plain_bytes, layout


def test_what_stands_before_the_layers_costs_time():
    plain_s, _ = predicted()
    for change in ({"model.positions": "learned"}, {"model.embedding_norm": True}):
        assert predicted(change)[0] > plain_s
    model = Config.from_dict(BASE).model
    alone, split, by_tokens = (embedding_work(model, MACHINE, TensorRanks(size, MACHINE.levels[0], is_by_tokens), 512, 4)
                               for size, is_by_tokens in ((1, False), (2, False), (2, True)))
    # Ranks add up what they have of it; where each goes on with some of the tokens, backward gathers their gradients.
    assert split.forward_s > by_tokens.forward_s > alone.forward_s and by_tokens.input_s > split.input_s == 0
    frozen = embedding_work(model, MACHINE, TensorRanks(2, MACHINE.levels[0], True), 512, 4, is_trained=False)
    assert frozen == (by_tokens.forward_s, 0, 0)


def test_a_window_costs_a_mask_that_a_microbatch_has_once():
    (plain_s, plain_bytes), (banded_s, banded_bytes) = predicted(), predicted({"model.window": 100})
    assert banded_bytes - plain_bytes == pytest.approx(4 * 256**2 + 2 * 4 * 256**2) and banded_s >= plain_s
    assert predicted({"model.window": 256}) == (plain_s, plain_bytes)
    assert predicted({"data.mask_documents": True, "model.window": 100}) == predicted({"data.mask_documents": True})


def test_scores_that_a_machine_keeps_cost_memory_and_time():
    config, (plain_s, plain_bytes) = Config.from_dict(BASE), predicted()
    kept = price_layout(config, replace(MACHINE, keeps_scores=True), 8).predicted
    assert kept["step_s"] > plain_s
    # Five bytes a score of two heads in place of four a row of them, of the two microbatches of four layers in flight.
    assert kept["memory_bytes_per_rank"] - plain_bytes == pytest.approx(2 * 4 * 2 * (2 * 256) * (5 * 256 - 4))


def test_masks_of_documents_cost_memory_and_time():
    (plain_s, plain_bytes), (masked_s, masked_bytes) = predicted(), predicted({"data.mask_documents": True})
    # A byte a pair of positions of the 4 microbatches of 2 sequences, and 4 bytes of the two that 1f1b has in flight.
    assert masked_bytes - plain_bytes == pytest.approx(4 * 2 * 256**2 + 2 * 4 * 2 * 256**2)
    long = {"train.seq_len": 512}
    assert predicted({**long, "data.mask_documents": True})[0] > predicted(long)[0] and masked_s >= plain_s
    model = Config.from_dict(BASE).model
    for seq_len, least, most in ((256, 1.0, 1.0), (4096, 1.7, 2.0)):
        attention = [layer_work(model, MACHINE, TensorRanks(1, MACHINE.levels[0]), seq_len, seq_len, 4, "selective", is_masked)
                     for is_masked in (False, True)]
        plain, masked = (work.input_s for work in attention)
        assert plain * least <= masked <= plain * most


def saved_by(stage, x, batch):
    """Bytes of square matrices that backward keeps, and the output."""
    kept = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2] == batch.positions:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = stage(x, batch)
    return sum(kept.values()), out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_a_stage_keep_one_mask_and_give_the_same_bits(dtype):
    model, positions = Config.from_dict(BASE).model, 32
    split = TensorSplit(SingleComm(), dtype=dtype)
    torch.manual_seed(0)
    stage = TransformerStage(model, split, 1, 4)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    documents = torch.arange(positions)[None].repeat(2, 1) // 10
    mask = ((documents[:, :, None] == documents[:, None, :]) & torch.ones(positions, positions).tril().bool())[:, None]
    batch = Batch(2, positions, *rotary_tables(model, range(positions), dtype), mask)
    x = torch.randn(2 * positions, model.hidden_size, dtype=dtype)
    n_bytes, out = saved_by(stage, x, batch)
    assert n_bytes == 2 * positions**2 * dtype.itemsize
    q = torch.randn(2, 4, positions, 16, dtype=dtype)
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
    assert torch.equal(functional.scaled_dot_product_attention(q, q, q, attn_mask=mask),
                       functional.scaled_dot_product_attention(q, q, q, attn_mask=added))
    assert out.isfinite().all()

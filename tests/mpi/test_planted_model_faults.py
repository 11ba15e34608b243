"""Faults planted in what a description of a model and its head says: each must be found, and the first wrong tensor named (see
``planted.py``)."""

from dataclasses import replace

import pytest
from planted import PIPELINE, SEQUENCE, TENSOR, Faults
from tiny import FAMILIES

from mpillm.comm.sums import combine_tree
from mpillm.nn import attention, embedding, linear, loss, norm, qk_norm, transformer
from mpillm.train import engine, flat_buffers

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

LEARNED = {"model.positions": "learned", "model.embedding_scale": 3.0, "model.max_seq_len": 21}
FAULTS = Faults()
fault = FAULTS.fault


def another_model(patch, name, **changes):
    """Let the engine call a function with another description."""
    right = getattr(engine, name)
    patch.setattr(engine, name, lambda model, *args: right(replace(model, **changes), *args))


def bias_before_the_sum(patch):
    patch.setattr(linear.RowParallelLinear, "leave",
                  lambda self, parts, total: self.split.leave([self.add_bias(part, total) for part in parts]))


@fault(TENSOR | {"model.output_bias": True}, "step 2: loss")
def a_row_bias_is_counted_once_a_rank(patch, config):
    """It is zero at first, and its gradient is right."""
    bias_before_the_sum(patch)


@fault(SEQUENCE | {"model.ffn_bias": True}, "gradient of layers.{last}.ffn.down.bias")
def the_gradient_of_a_row_bias_is_counted_once_a_rank(patch, config):
    bias_before_the_sum(patch)


@fault(TENSOR | {"model.attention_bias": True}, "gradient of layers.{last}.attention.value.bias")
def a_column_bias_has_no_gradient(patch, config):
    right = linear._accumulate

    def wrong(projection, x, grads):
        of_weights, of_biases = projection.gradients()
        kept = [gradient.clone() for gradient in of_biases]
        right(projection, x, grads)
        for gradient, before in zip(of_biases, kept):
            gradient.copy_(before)

    patch.setattr(linear, "_accumulate", wrong)


@fault(PIPELINE | FAMILIES["gpt2"], "gradient of norm.weight")
def the_mean_of_a_layer_norm_is_not_taken_off_in_backward(patch, config):
    right = norm._layer_gradients
    patch.setattr(norm, "_layer_gradients", lambda dy, x, mean, *others: right(dy, x, mean * 0, *others))


@fault(TENSOR | FAMILIES["gemma"], "gradient of layers.{last}.ffn.down.weight")
def the_offset_of_norms_is_forgotten_in_backward(patch, config):
    right = norm.rms_gradients
    patch.setattr(norm, "rms_gradients", lambda dy, x, inverse, scale, is_exact: right(dy, x, inverse, scale - 1, is_exact))


@fault(TENSOR | {"model.norm_placement": "post"}, "loss")
def a_norm_behind_the_sum_is_taken_before_it(patch, config):
    patch.setattr(transformer.Layer, "_add",
                  lambda self, x, half, norm, batch: x + norm(half(x, batch), batch.tokens))


@fault(TENSOR | FAMILIES["mistral"], "loss")
def a_window_is_off_by_one(patch, config):
    another_model(patch, "visible", window=config.model.window + 1)


@fault(TENSOR | FAMILIES["bert"], "loss")
def attention_is_causal_where_it_should_see_both_ways(patch, config):
    right = attention.F.scaled_dot_product_attention
    patch.setattr(attention.F, "scaled_dot_product_attention",
                  lambda q, k, v, attn_mask, is_causal: right(q, k, v, is_causal=True))


@fault(TENSOR | FAMILIES["gpt_neox"], "loss")
def the_whole_head_is_turned_in_place_of_its_fraction(patch, config):
    another_model(patch, "rotary_tables", rope_fraction=1.0)


@fault(TENSOR | FAMILIES["yarn"], "loss")
def the_attention_factor_of_yarn_is_forgotten(patch, config):
    another_model(patch, "rotary_tables", rope_scaling=replace(config.model.rope_scaling, attention_factor=1.0))


@fault(TENSOR | FAMILIES["qwen3"], "gradient of layers.{last}.attention.key_norm.weight")
def partial_gradients_of_norms_of_heads_are_not_added(patch, config):
    patch.setattr(flat_buffers.Bucket, "sum_partial", lambda self: None)


def means_of_one_rank(norms, *parts):
    return [combine_tree(part) / width for part, width in zip(parts, norms.widths)]


@fault(TENSOR | FAMILIES["olmo2"], "loss")
def squares_of_a_norm_over_the_width_are_those_of_one_rank(patch, config):
    patch.setattr(qk_norm.WholeNorms, "means", means_of_one_rank)


@fault(TENSOR | FAMILIES["olmo2"], "gradient of layers.{last}.attention.key.weight")
def the_backward_of_a_norm_over_the_width_is_that_of_one_rank(patch, config):
    right = qk_norm._WholeNorms.backward

    def wrong(ctx, *grads):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(qk_norm.WholeNorms, "means", means_of_one_rank)
            return right(ctx, *grads)

    patch.setattr(qk_norm._WholeNorms, "backward", staticmethod(wrong))


@fault(TENSOR | FAMILIES["gpt_neox"], "gradient of layers.{last}.ffn.down.bias")
def the_second_bias_of_a_parallel_layer_is_missing(patch, config):
    right = linear.RowParallelLinear.add_bias
    patch.setattr(linear.RowParallelLinear, "add_bias",
                  lambda self, x, total: x if "ffn.down" in self.weight.shard.name else right(self, x, total))


@fault(TENSOR | LEARNED, "loss")
def positions_are_scaled_as_words_are(patch, config):
    right = embedding.Table.forward
    patch.setattr(embedding.Table, "forward", lambda self, indices: right(self, indices) * (
        config.model.embedding_scale if self.weight.shard.name == "positions.weight" else 1))


@fault(TENSOR | {"model.logit_softcap": 0.3}, "gradient of head.weight")
def the_slope_of_capped_logits_is_forgotten(patch, config):
    right, softcap = loss._cross_entropy, config.model.logit_softcap

    def wrong(logits, *others):
        slopes = [1 - (part / softcap) ** 2 for part in logits]
        found = right(logits, *others)
        for part, slope in zip(logits, slopes):  # by which it is multiplied next
            part.div_(slope)
        return found

    patch.setattr(loss, "_cross_entropy", wrong)


@fault(TENSOR | FAMILIES["tags"], "loss")
def targets_that_do_not_count_are_counted(patch, config):
    right = loss.ChoiceHead.forward
    patch.setattr(loss.ChoiceHead, "forward", lambda self, x, targets, scale: right(self, x, targets.clamp(min=0), scale))


@fault(TENSOR | FAMILIES["tags"], "loss")
def the_loss_is_divided_by_targets_that_do_not_count(patch, config):
    right = engine.Engine.train_step
    patch.setattr(engine.Engine, "train_step", lambda self, read, lr, counted: right(self, read, lr))


@fault(TENSOR | FAMILIES["tags"], "loss")
def attention_sees_what_stands_behind_the_end(patch, config):
    right = engine.visible
    patch.setattr(engine, "visible", lambda model, start, stop, device, documents: right(model, start, stop, device))


@fault(TENSOR | FAMILIES["means"], "loss")
def the_mean_over_positions_counts_those_behind_the_end(patch, config):
    right = transformer.shares_of_mean
    patch.setattr(transformer, "shares_of_mean", lambda batch, like: right(replace(batch, lengths_B=None), like))


@pytest.mark.parametrize("comm", [2], ids="{}-ranks".format, indirect=True)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(comm, name, monkeypatch):
    FAULTS.check(name, comm, monkeypatch)


@pytest.mark.parametrize("comm", [2], ids="{}-ranks".format, indirect=True)
def test_without_a_fault_nothing_is_found(comm):
    FAULTS.check_without(comm)

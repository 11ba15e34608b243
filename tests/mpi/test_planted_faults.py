"""Faults planted in training and its messages: each must be found, and the first wrong tensor named (``planted.py``)."""

import math
from dataclasses import replace

import pytest
import torch
from planted import PIPELINE, SEQUENCE, TENSOR, Faults
from tiny import GROUPED

from mpillm.autograd import regions
from mpillm.comm import p2p, shared
from mpillm.comm.collectives import Pending
from mpillm.nn import attention, embedding, linear, norm, split
from mpillm.pipeline import runner, stage
from mpillm.train import engine, flat_buffers, gradient_store, optimizers

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

ZERO_BUBBLE = {"layout.pipeline": 2, "layout.schedule": "zb-h1"}
DATA = {"layout.data": 2, "layout.zero": 1}
WHOLE = {"layout.data": 2, "layout.zero": 0}
TIED = {"model.tie_embeddings": True}
FROZEN = {"train.freeze": ["embedding.*", "layers.0.*", "layers.1.ffn.*"],
          "train.lr_factors": {"layers.3.*": 0.5, "layers.*": 2.0, "head.*": 3.0}}
FAULTS = Faults()
fault = FAULTS.fault


def movement(move, adjoint):
    return lambda x, group: regions._Movement.apply(x, group, move, adjoint)


@fault(TENSOR, "gradient of norm.weight")
def backward_of_copy_to_is_identity(patch, config):
    patch.setattr(split, "copy_to", movement(regions._identity, regions._identity))


@fault(TENSOR, "gradient of layers.{last}.ffn.down.weight")
def backward_of_reduce_from_is_allreduce(patch, config):
    patch.setattr(split, "reduce_from", movement(regions._allreduce, regions._allreduce))


@fault(TENSOR, "loss")
def reduce_from_is_forgotten(patch, config):
    patch.setattr(split, "reduce_from", movement(regions._identity, regions._identity))


@fault(SEQUENCE, "gradient of norm.weight")
def backward_of_allgather_to_is_a_slice(patch, config):
    patch.setattr(split, "allgather_to", lambda x, group, dim, size: regions.gather_from(x, group, dim, size))


@fault(SEQUENCE, "gradient of layers.{last}.ffn.down.weight")
def backward_of_reduce_scatter_from_gathers_in_the_wrong_order(patch, config):
    def wrong(x, group):
        return regions.collectives.allgather(x, group, 0).roll(1, 0)

    patch.setattr(split, "reduce_scatter_from", movement(regions._reduce_scatter(0), wrong))


@fault(SEQUENCE, "loss")
def allgather_to_gathers_in_the_wrong_order(patch, config):
    right = split.allgather_to
    patch.setattr(split, "allgather_to", lambda *args: right(*args).roll(1, 0))


@fault(SEQUENCE, "loss")
def reduce_scatter_from_keeps_its_own_part(patch, config):
    patch.setattr(split, "reduce_scatter_from", lambda x, group: regions.scatter_to(x, group))


@fault(PIPELINE, "loss")
def every_microbatch_is_divided_by_its_own_tokens(patch, config):
    right = engine.Engine._microbatch
    share = len(config.microbatch_bounds()[0])
    patch.setattr(engine.Engine, "_microbatch",
                  lambda self, read, start, stop, scale: right(self, read, start, stop, 1 / (
                      share * (stop - start) * self.config.train.seq_len)))


@fault(DATA, "loss")
def the_loss_is_divided_by_the_tokens_of_the_rank(patch, config):
    right = engine.Engine._microbatch
    patch.setattr(engine.Engine, "_microbatch", lambda self, *cut_and_scale: right(
        self, *cut_and_scale[:-1], 2 * cut_and_scale[-1]))


@fault(PIPELINE, "loss")
def two_microbatches_change_places_on_the_way(patch, config):
    one, other = p2p.tag_of(p2p.FORWARD, 1, 0, 5), p2p.tag_of(p2p.FORWARD, 1, 1, 5)
    swapped = {one: other, other: one}
    patch.setattr(runner, "isend", lambda x, group, to, tag: p2p.isend(x, group, to, swapped.get(tag, tag)))


@fault(PIPELINE, "loss")
def a_stage_is_given_the_previous_activation(patch, config):
    right, kept = runner._Pass._receive, {}

    def stale(self, key, action):
        x = right(self, key, action)
        if key[0] == p2p.FORWARD and key[2] < 2:
            kept.setdefault("first", x.clone())
            return kept["first"].clone()
        return x

    patch.setattr(runner._Pass, "_receive", stale)


@fault(PIPELINE, "gradient of layers.{cut}.ffn.down.weight")
def a_stage_is_given_the_previous_gradient(patch, config):
    right, kept = runner._Pass._receive, {}

    def stale(self, key, action):
        x = right(self, key, action)
        return kept.setdefault("first", x) if key[0] == p2p.BACKWARD and key[2] < 2 else x

    patch.setattr(runner._Pass, "_receive", stale)


@fault(PIPELINE, "gradient of layers.{cut}.ffn.down.weight")
def the_backward_of_a_microbatch_is_skipped(patch, config):
    right = stage.Stage.backward

    def wrong(self, microbatch, dy, keep_weights=False):
        if self.is_first and microbatch == 0:
            dy = torch.zeros_like(dy)
        return right(self, microbatch, dy, keep_weights)

    patch.setattr(stage.Stage, "backward", wrong)


@fault(ZERO_BUBBLE, "gradient of layers.{cut}.ffn.down.weight")
def a_weight_action_is_dropped(patch, config):
    right = stage.Stage.compute_weight_gradients
    patch.setattr(stage.Stage, "compute_weight_gradients",
                  lambda self, microbatch: None if self.is_first and microbatch == 2 else right(self, microbatch))


@fault(DATA, "gradient of head.weight")
def the_reduction_over_data_is_skipped(patch, config):
    patch.setattr(flat_buffers.Bucket, "reduce", lambda self, is_whole: self.grad[slice(*self.range)])


@fault(DATA | {"layout.bucket_cuts": [0, 2, 4]}, "gradient of head.weight")
def a_bucket_starts_before_its_last_gradient(patch, config):
    patch.setenv(shared.SWITCH, "0")
    right = gradient_store.GradientStore.begin
    patch.setattr(gradient_store.GradientStore, "begin", lambda self, numbers, total: right(self, numbers[1:], total))


@fault(WHOLE, "gradient of head.weight")
def the_mean_over_data_is_taken_for_the_sum(patch, config):
    right = flat_buffers.Bucket.reduce
    patch.setattr(flat_buffers.Bucket, "reduce", lambda self, is_whole: right(self, is_whole).div_(2))


@fault(SEQUENCE, "gradient of norm.weight")
def partial_gradients_of_norms_are_not_added(patch, config):
    patch.setattr(flat_buffers.Bucket, "sum_partial", lambda self: None)


@fault(TENSOR | GROUPED["shared"], "gradient of layers.{last}.attention.value.weight")
def partial_gradients_of_shared_heads_are_not_added(patch, config):
    patch.setattr(flat_buffers.Bucket, "sum_partial", lambda self: None)


@fault(PIPELINE | TIED, "gradient of embedding.weight")
def the_two_gradients_of_a_tied_matrix_are_not_added(patch, config):
    patch.setattr(gradient_store.GradientStore, "_tie", lambda self, reduced: None)


@fault(TENSOR, "gradient norm")
def replicated_weights_count_twice_in_the_norm(patch, config):
    right = flat_buffers.Piece
    patch.setattr(flat_buffers, "Piece", lambda *args: right(*args[:-1], True))


@fault(WHOLE, "gradient norm")
def every_data_rank_counts_in_the_norm(patch, config):
    right = flat_buffers.Bucket.pieces
    patch.setattr(flat_buffers.Bucket, "pieces", lambda self: [replace(piece, is_counted=True) for piece in right(self)])


@fault(DATA, "gradient of head.weight")
def the_gradient_is_not_clipped(patch, config):
    patch.setattr(gradient_store.GradientStore, "clip", lambda self, reduced, limit: self.norm(reduced))


@fault(DATA, "weight of head.weight")
def the_learning_rate_is_a_step_late(patch, config):
    right, rates = optimizers.ShardedOptimizer.step, [0.0]

    def late(self, reduced, lr):
        rates.append(lr)
        right(self, reduced, rates[-2])

    patch.setattr(optimizers.ShardedOptimizer, "step", late)


@fault(TENSOR, "weight of norm.weight")
def norms_decay(patch, config):
    patch.setattr(optimizers, "decays", lambda shape: True)


@fault(DATA | FROZEN, "weight of layers.1.ffn.down.weight")
def a_frozen_weight_moves(patch, config):
    """It decays."""
    right = optimizers.ShardedOptimizer.step

    def wrong(self, reduced, lr):
        right(self, reduced, lr)
        for _, tensors in self.state():
            if tensors.keys() == {"weight"}:
                tensors["weight"].mul_(1 - lr * config.train.weight_decay)

    patch.setattr(optimizers.ShardedOptimizer, "step", wrong)


@fault(TENSOR | FROZEN, "gradient norm")
def frozen_weights_count_in_the_norm(patch, config):
    patch.setattr(split, "is_frozen", lambda name, freeze: False)


@fault(PIPELINE | FROZEN | {"layout.stage_cuts": [2]}, "gradient of layers.1.ffn_norm.weight")
def the_gradient_stops_a_layer_too_early(patch, config):
    right = stage.trained_from
    patch.setattr(stage, "trained_from", lambda model, freeze: right(model, freeze) + 1)


@fault(DATA | FROZEN, "weight of head.weight")
def a_factor_of_the_learning_rate_is_not_applied(patch, config):
    patch.setattr(optimizers, "first_match", lambda name, patterns: None)


@fault(TENSOR | FROZEN, "weight of layers.3.ffn.down.weight")
def the_last_factor_that_matches_counts(patch, config):
    right = optimizers.first_match
    patch.setattr(optimizers, "first_match", lambda name, patterns: right(name, [*patterns][::-1]))


@fault(DATA, "weight of head.weight")
def the_updated_weights_are_not_given_to_the_others(patch, config):
    patch.setenv(shared.SWITCH, "0")  # of weights in shared memory there is one copy
    patch.setattr(flat_buffers.Bucket, "distribute", lambda self: None)


@fault(PIPELINE | TIED, "weight of embedding.weight")
def the_second_copy_of_a_tied_matrix_is_not_updated(patch, config):
    right = optimizers.ShardedOptimizer.__init__
    patch.setattr(optimizers.ShardedOptimizer, "__init__", lambda self, train, buckets: right(
        self, train, [bucket for bucket in buckets if bucket.is_counted]))


@fault(PIPELINE, "step 2: gradient of head.weight")
def gradients_are_not_zeroed_between_steps(patch, config):
    patch.setattr(gradient_store.GradientStore, "zero", lambda self: None)


@fault(PIPELINE, "step 2: weight of head.weight")
def the_optimizer_forgets_its_state(patch, config):
    right = optimizers.ShardedOptimizer.step

    def forgetful(self, reduced, lr):
        for _, tensors in self.state():
            for kind in tensors.keys() - {"weight"}:
                tensors[kind].zero_()
        right(self, reduced, lr)

    patch.setattr(optimizers.ShardedOptimizer, "step", forgetful)


@fault(TENSOR, "gradient of layers.{last}.attention.key.weight")
def rotary_positions_turn_the_wrong_way_back(patch, config):
    right = attention.turn
    patch.setattr(attention, "turn", lambda x, batch, sign: right(x, batch, 1))


@fault(TENSOR, "loss")
def rotary_positions_turn_the_wrong_way(patch, config):
    right = engine.rotary_tables

    def wrong(*args):
        cos, sin = right(*args)
        return cos, -sin

    patch.setattr(engine, "rotary_tables", wrong)


@fault(TENSOR, "loss")
def initial_weights_are_those_of_the_local_index(patch, config):
    right = gradient_store.initialise

    def wrong(parameter, seed):
        shard = parameter.shard
        parameter.shard = replace(shard, start=0, stop=shard.stop - shard.start)
        right(parameter, seed)
        parameter.shard = shard

    patch.setattr(gradient_store, "initialise", wrong)


@fault(TENSOR | {"layout.recompute": "full"}, "gradient of layers.{last}.ffn.down.weight")
def recompute_sees_something_else(patch, config):
    """The attention of the last layer is computed from half the input the second time."""
    right, seen = attention.Attention.forward, set()

    def wrong(self, x, batch):
        first = (self, id(batch)) not in seen
        seen.add((self, id(batch)))
        return right(self, x if first else x / 2, batch)

    patch.setattr(attention.Attention, "forward", wrong)


@fault(TENSOR, "gradient of layers.{last}.ffn.gate.weight")
def the_gradient_of_one_product_goes_to_two(patch, config):
    right = linear._accumulate

    def wrong(projection, x, grads):
        if "gate" in projection.weight.shard.name:
            grads = [grad.clone() for grad in grads]
            gate, up = projection.parts(grads)
            gate.copy_(up)
        right(projection, x, grads)

    patch.setattr(linear, "_accumulate", wrong)


@fault(WHOLE, "gradient of layers.{last}.ffn.up.weight")
def a_joined_gradient_is_split_one_row_too_late(patch, config):
    right = linear._accumulate

    def wrong(projection, x, grads):
        is_joined = len(grads) < len(projection.parts(grads))
        right(projection, x, [grad.roll(1, 1) for grad in grads] if is_joined else grads)

    patch.setattr(linear, "_accumulate", wrong)


@fault(WHOLE, "gradient of layers.{last}.ffn.up.weight")
def a_joined_gradient_is_a_copy(patch, config):
    right = linear.joined
    patch.setattr(linear, "joined", lambda matrices: torch.cat(matrices) if len(matrices) > 1 else right(matrices))


@fault(SEQUENCE, "gradient of norm.weight")
def the_gradient_of_a_norm_misses_its_first_token(patch, config):
    right = norm.rms_gradients
    patch.setattr(norm, "rms_gradients", lambda dy, x, inverse, *others: (
        right(dy, x, inverse, *others)[0], right(dy[1:], x[1:], inverse[1:], *others)[1]))


@fault(TENSOR, "loss")
def tokens_of_other_ranks_are_looked_up_as_well(patch, config):
    patch.setattr(embedding._Lookup, "forward", staticmethod(wrong_lookup))


def wrong_lookup(ctx, tokens, weight, table):
    ctx.table, ctx.indices = table, tokens
    return weight[(tokens - table.rows[0]) % len(weight)]


@fault(PIPELINE | {"data.mask_documents": True}, "loss")
def attention_crosses_documents(patch, config):
    right = engine.Engine._microbatch
    patch.setattr(engine.Engine, "_microbatch",
                  lambda self, read, *others: right(self, lambda low, high: (*read(low, high)[:2], None), *others))


@fault(PIPELINE, "loss")
def a_buffer_is_changed_before_it_was_sent(patch, config):
    right = p2p.isend

    def wrong(x, group, to, tag):
        y = x.clone()
        y[0] = math.pi
        return Pending(x, right(y, group, to, tag)._request, (y,))

    patch.setattr(runner, "isend", wrong)


@pytest.mark.parametrize("comm", [2], ids="{}-ranks".format, indirect=True)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(comm, name, monkeypatch):
    FAULTS.check(name, comm, monkeypatch)


@pytest.mark.parametrize("comm", [2], ids="{}-ranks".format, indirect=True)
def test_without_a_fault_nothing_is_found(comm):
    FAULTS.check_without(comm)

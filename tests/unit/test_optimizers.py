"""Learning rates against values worked out by hand; sharded optimisers against PyTorch's on the whole, bit for bit."""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from tiny import tiny

from mpillm.config import Train
from mpillm.schedules.blocks import align, bounds
from mpillm.train.flat_buffers import ALIGNMENT, Piece
from mpillm.train.gradient_store import sum_of_squares
from mpillm.train.learning_rate import learning_rate
from mpillm.train.optimizers import ShardedOptimizer, decays, state_kinds, update
from mpillm.verify.reference import make_optimizer

OPTIMIZERS = ["adamw", "adam", "sgd", "rmsprop", "adagrad"]
SHAPES = {"head": (9, 7), "norm": (7,), "query": (8, 40), "up": (54, 40)}


def rates(numbers, **values):
    train = tiny({f"train.{key}": value for key, value in {"lr": 1.0, **values}.items()}).train
    return [learning_rate(train, step) for step in numbers]


@pytest.mark.parametrize(("schedule", "wanted"), [
    ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
    ("wsd", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1]),
    ("cosine", [0.25, 0.5, 0.75, 1.0, 0.868198051533946, 0.55, 0.231801948466054, 0.1, 0.1]),
])
def test_learning_rates(schedule, wanted):
    found = rates(range(1, 10), lr_schedule=schedule, warmup_steps=4, steps=8, min_lr=0.1,
                  decay_steps=2 if schedule == "wsd" else 0)
    assert found == pytest.approx(wanted, rel=1e-14)


def test_learning_rates_without_warmup_and_with_nothing_else():
    assert rates([1, 2, 3, 4], lr_schedule="linear", warmup_steps=0, steps=4) == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert rates([1, 2], lr_schedule="cosine", warmup_steps=2, steps=2) == [0.5, 1.0]


def test_every_name_that_a_configuration_takes_is_handled_and_no_other():
    """A schedule or an optimiser that comes in must not fall into one of those that are there."""
    train, names = tiny().train, {field.name: get_args(field.type) for field in fields(Train)}
    assert {"constant", "cosine"} < set(names["lr_schedule"]) and set(names["optimizer"]) == set(OPTIMIZERS)
    for name in names["lr_schedule"]:
        assert 0 <= learning_rate(replace(train, lr_schedule=name, decay_steps=int(name == "wsd")), 4) <= train.lr
    for name in names["optimizer"]:
        assert state_kinds(replace(train, optimizer=name, momentum=0.9))
    unknown = SimpleNamespace(**vars(train) | {"lr_schedule": "sqrt", "optimizer": "lion"})
    for refused in (lambda: learning_rate(unknown, 4), lambda: state_kinds(unknown),
                    lambda: update(unknown, 0.1, 0.0, [torch.ones(1)], [torch.ones(1)], {"sum": [torch.zeros(1)]},
                                   [torch.zeros(())])):
        with pytest.raises(KeyError, match="sqrt|lion"):
            refused()


def test_matrices_decay_and_norms_do_not():
    assert decays((9, 7)) and not decays((7,))


@dataclass(eq=False)
class FakeBucket:
    """What the optimiser sees of a data rank's storage: its part of the flat weights and the pieces in it."""

    master: torch.Tensor
    found: list

    def pieces(self):
        return self.found


def flat_storage(dtype):
    """Return the flat weights and where each parameter starts."""
    offsets, end = {}, 0
    for name, shape in SHAPES.items():
        offsets[name], end = end, align(end + torch.Size(shape).numel(), ALIGNMENT)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(align(end, ALIGNMENT * 12), generator=generator, dtype=dtype), offsets


def fake_bucket(flat, offsets, ranks, rank):
    low, high = bounds(len(flat), ranks, rank)
    pieces = []
    for name, shape in SHAPES.items():
        first = offsets[name]
        start, stop = max(low, first), min(high, first + torch.Size(shape).numel())
        if start < stop:
            padded = min(high, align(stop, ALIGNMENT)) - low
            pieces.append(Piece(name, shape, start - first, stop - first, start - low, padded, True))
    return FakeBucket(flat[low:high].clone(), pieces)


def whole_optimizer(train, flat, offsets, is_padded):
    """Return PyTorch's optimiser on whole parameters by name, with or without the padding of flat storage."""
    whole = {}
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        count = align(count, ALIGNMENT) if is_padded else count
        whole[name] = torch.nn.Parameter(flat[offsets[name]:offsets[name] + count].clone())
    return whole, make_optimizer(train, [
        {"params": [p for name, p in whole.items() if (len(SHAPES[name]) > 1) == is_matrix],
         "weight_decay": train.weight_decay if is_matrix else 0.0} for is_matrix in (True, False)])


def train_whole(whole, optimizer, train, offsets, step, gradient):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(train, step)
    for name, parameter in whole.items():
        parameter.grad = gradient[offsets[name]:offsets[name] + len(parameter)]
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_give_the_bits_of_the_whole(name, dtype):
    train = tiny({"train.optimizer": name, "train.weight_decay": 0.1}).train
    flat, offsets = flat_storage(dtype)
    whole, optimizer = whole_optimizer(train, flat, offsets, is_padded=True)
    plain, plain_optimizer = whole_optimizer(train, flat, offsets, is_padded=False)
    ranks_of_all = [(ranks, rank) for ranks in (1, 2, 3, 4) for rank in range(ranks)]
    buckets = {(ranks, rank): fake_bucket(flat, offsets, ranks, rank) for ranks, rank in ranks_of_all}
    sharded = {key: ShardedOptimizer(train, [bucket]) for key, bucket in buckets.items()}
    for step in range(1, 6):
        gradient = torch.randn(flat.shape, generator=torch.Generator().manual_seed(step), dtype=dtype)
        train_whole(whole, optimizer, train, offsets, step, gradient)
        train_whole(plain, plain_optimizer, train, offsets, step, gradient)
        for (ranks, rank), bucket in buckets.items():
            own = gradient[slice(*bounds(len(flat), ranks, rank))]
            sharded[ranks, rank].step({bucket: own}, learning_rate(train, step))
    for key, shard in sharded.items():
        for piece, tensors in shard.state():
            state = {"weight": whole[piece.name].detach(), **optimizer.state[whole[piece.name]]}
            assert set(tensors) == {kind for kind, value in state.items() if kind != "step" and value is not None}
            for kind, value in tensors.items():
                assert torch.equal(value, state[kind][piece.start:piece.stop]), (key, piece.name, kind)
            near = plain[piece.name].detach()[piece.start:piece.stop]
            torch.testing.assert_close(tensors["weight"], near)  # without padding only the rounding differs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_on_other_shards_it_goes_on_with_the_same_bits(name):
    train = tiny({"train.optimizer": name}).train
    flat, offsets = flat_storage(torch.float32)

    def optimisers(ranks):
        buckets = [fake_bucket(flat, offsets, ranks, rank) for rank in range(ranks)]
        return [(bucket, ShardedOptimizer(train, [bucket])) for bucket in buckets]

    def steps(parts, numbers):
        for step in numbers:
            gradient = torch.randn(flat.shape, generator=torch.Generator().manual_seed(step))
            for rank, (bucket, optimizer) in enumerate(parts):
                own = gradient[slice(*bounds(len(flat), len(parts), rank))]
                optimizer.step({bucket: own}, learning_rate(train, step))

    def gathered(parts):
        found = {}
        for _, optimizer in parts:
            for piece, tensors in optimizer.state():
                for kind, value in tensors.items():
                    nothing = torch.full((torch.Size(piece.shape).numel(),), torch.nan)
                    found.setdefault((kind, piece.name), nothing)[piece.start:piece.stop] = value
        return found

    unbroken, first = optimisers(3), optimisers(2)
    steps(unbroken, range(1, 7))
    steps(first, range(1, 4))
    saved, resumed = gathered(first), optimisers(3)
    for _, optimizer in resumed:
        optimizer.restore(lambda kind, piece: saved[kind, piece.name][piece.start:piece.stop].numpy(), 3)
    steps(resumed, range(4, 7))
    wanted = gathered(unbroken)
    assert all(torch.equal(value, wanted[key]) for key, value in gathered(resumed).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_is_one_of_the_rate_and_what_is_frozen_stays(name):
    flat, offsets = flat_storage(torch.float32)

    def weights(**values):
        train = replace(tiny({"train.optimizer": name}).train, **values)
        bucket = fake_bucket(flat, offsets, 1, 0)
        optimizer = ShardedOptimizer(train, [bucket])
        optimizer.step({bucket: torch.ones_like(flat)}, train.lr)
        state = {piece.name: set(tensors) for piece, tensors in optimizer.state()}
        sizes = {shard: torch.Size(shape).numel() for shard, shape in SHAPES.items()}
        return {shard: bucket.master[offsets[shard]:offsets[shard] + size] for shard, size in sizes.items()}, state

    (plain, _), (fast, _) = weights(), weights(lr=3e-2)
    found, state = weights(lr_factors={"u*": 3.0}, freeze=("n*",))
    assert torch.equal(found["up"], fast["up"]) and not torch.equal(found["up"], plain["up"])
    assert torch.equal(found["norm"], flat[offsets["norm"]:offsets["norm"] + len(found["norm"])])
    assert state["norm"] == {"weight"} and state["up"] > {"weight"} or name == "sgd"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_and_the_decay_matter(name):
    """Guards the comparisons above: they would see a rate or a decay that is not used."""
    flat, offsets = flat_storage(torch.float32)

    def weights(**values):
        train = tiny({"train.optimizer": name, **{f"train.{key}": value for key, value in values.items()}}).train
        bucket = fake_bucket(flat, offsets, 1, 0)
        ShardedOptimizer(train, [bucket]).step({bucket: torch.ones_like(flat)}, train.lr)
        return bucket.master

    def part(values, shard):
        return values[offsets[shard]:offsets[shard] + torch.Size(SHAPES[shard]).numel()]

    plain, decayed = weights(weight_decay=0.0), weights(weight_decay=0.5)
    assert not torch.equal(plain, weights(weight_decay=0.0, lr=0.5))
    assert torch.equal(part(plain, "norm"), part(decayed, "norm"))
    assert not torch.equal(part(plain, "up"), part(decayed, "up"))


def test_the_norm_of_millions_of_numbers():
    """Added up in float32 from the first to the last, the squares of so many are 1e-4 off."""
    x = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, 1 << 23)
    wanted = x.double().square().sum()
    assert abs(sum_of_squares([x[:5], x[5:]]) / wanted - 1) < 1e-6
    assert sum_of_squares([]) == 0

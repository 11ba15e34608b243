"""Layouts against the serial reference in float64: loss, every gradient, norm and weights of every step to 1e-10.

The everyday choice of layouts; ``tests/soak.sh`` compares them all.
"""

import numpy as np
import pytest
import torch
from helpers import assert_all
from pytorch_schedules import made_by_pytorch
from tiny import FAMILIES, GROUPED, one_for_every_degrees, reference_steps, representative, tiny, with_layout

from mpillm.comm.single import SingleComm
from mpillm.data.labelled import counted
from mpillm.nn import products
from mpillm.nn.scores import figures
from mpillm.planner.keys import describe
from mpillm.planner.synthesis import TEXTBOOK, synthesise
from mpillm.schedules import make_schedule
from mpillm.train import engine
from mpillm.train.engine import Engine
from mpillm.train.learning_rate import learning_rate
from mpillm.verify import compare
from mpillm.verify.compare import all_layouts, compare_layout

pytestmark = [pytest.mark.mpi, pytest.mark.slow]


def check(configs, comm, steps=2):
    """Hold configurations that differ in their layout alone against the reference."""
    batches, expected = reference_steps(configs[0], steps, comm)
    found = {describe(config.layout): compare_layout(config, comm, batches, expected) for config in configs}
    wrong = [f"{name}: {difference}" for name, difference in found.items() if difference.first]
    assert_all(not wrong, "; ".join(wrong), comm)
    return found


def test_every_degree_with_every_setting(comm):
    found = check(representative(all_layouts(tiny(), comm.size)), comm)
    assert {difference.tensors for difference in found.values()} == {2 * (2 + 2 * (3 + 9 * 7))}


def test_fewer_key_value_heads_than_ranks_tied_embeddings_and_documents(comm):
    config = tiny({**GROUPED["shared"], "model.tie_embeddings": True, "data.mask_documents": True})
    check(one_for_every_degrees(config, comm.size), comm, steps=1)


def test_straddling_groups_stage_cuts_mixed_recompute_another_order_and_batch(comm):
    config = tiny({**GROUPED["straddling"], "layout.order": ["tensor", "data", "pipeline"], "train.global_batch": 7})
    configs = []
    for found in one_for_every_degrees(config, comm.size):
        stages = found.layout.pipeline * found.layout.chunks
        mixed = ("none", "selective", "full", "none", "full", "none", "selective")
        configs.append(with_layout(found, recompute=mixed, stage_cuts=tuple(range(1, stages))).resolve(comm.size))
    check(configs, comm, steps=1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop", "adagrad"])
def test_every_optimizer_sharded_and_not(comm, optimizer):
    config = tiny({"train.optimizer": optimizer, "model.num_layers": 2, "layout.data": comm.size})
    check([with_layout(config, zero=zero).resolve(comm.size) for zero in (0, 1)], comm, steps=3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_products_that_go_by_their_size(comm, monkeypatch):
    """In float32, with oneDNN from such sizes on that this model has larger and smaller ones, and sums in several parts."""
    for name, value in {"_LEAST_WORK": 5000, "_LEAST_SUM_WORK": 5000, "_LEAST_TERMS": 13, "_LEAST_COLUMNS": 16,
                        "SUM_BYTES": 5000}.items():
        monkeypatch.setattr(products, name, value)
    multiply, asked = products.by_onednn, set()
    monkeypatch.setattr(products, "by_onednn", lambda left, right: asked.add(left.dtype) or multiply(left, right))
    monkeypatch.setattr(engine, "fast_product", lambda *_: products.by_size)
    monkeypatch.setattr(compare, "TOLERANCE", 1e-4)
    config = tiny({"train.dtype": "float32", "train.optimizer": "sgd", "model.num_layers": 4})
    check(one_for_every_degrees(config, comm.size), comm)
    assert_all(asked == {torch.float32}, f"oneDNN was not asked: {asked}", comm)


def test_uneven_shares(comm):
    shares = [2] * (comm.size - 1) + [9 - 2 * (comm.size - 1)]
    config = tiny({"model.num_layers": 2, "layout.data": comm.size, "layout.shares": shares}, comm.size)
    check([config], comm)


@pytest.mark.parametrize("chunks", [1, 2])
def test_schedules_that_pytorch_wrote(comm, comm_path, chunks):
    """In its longer form the one, in its shorter the others."""
    names = {"ScheduleInterleaved1F1B": "compute_comms", "ScheduleInterleavedZeroBubble": "compute_only",
             "ScheduleLoopedBFS": "compute_only"}
    configs = [tiny({"layout.pipeline": comm.size, "layout.chunks": chunks, "layout.schedule": str(comm_path / f"{name}.csv"),
                     "model.num_layers": 8, "train.global_batch": 12}) for name in names]
    if comm.rank == 0:
        for name, form in names.items():
            made_by_pytorch(name, comm.size, 6, chunks)._dump_csv(comm_path / f"{name}.csv", form)
    comm.Barrier()
    check([config.resolve(comm.size) for config in configs], comm, steps=1)


def test_a_synthesised_schedule(comm, comm_path):
    """In memory for one microbatch less than zb-h1 holds, with unequal ranks: an order that no textbook has."""
    made = synthesise(comm.size, 5, [3.0 + rank for rank in range(comm.size)], 2.0, 1.0, 0.5,
                      memory_limit=max(1, comm.size - 1)).schedule
    assert all(made.actions != make_schedule(name, comm.size, 5).actions for name in TEXTBOOK) or comm.size == 1
    path = comm_path / "auto.txt"
    if comm.rank == 0:
        path.write_text(made.to_text())
    comm.Barrier()
    check([tiny({"layout.pipeline": comm.size, "layout.schedule": str(path)}, comm.size)], comm, steps=2)


def test_exact_numerics_are_right_too(comm):
    config = tiny({"train.numerics": "exact", **GROUPED["shared"], "model.tie_embeddings": True, "model.num_layers": 4})
    check(one_for_every_degrees(config, comm.size), comm, steps=1)


@pytest.mark.parametrize("name", ["llama3", "classes", "tags", "values"])
def test_evaluation_gives_the_reference_loss_and_figures(comm, name):
    """Of a whole batch and of a last short one."""
    for config in one_for_every_degrees(tiny({**FAMILIES[name], "model.num_layers": 4}), comm.size):
        (batch,) = compare.batches(config, 1)
        reference = compare.Reference(config.model, config.train.seed)
        engine = Engine(config, comm)
        for count in (9, 4):
            part = batch.part(0, count)
            loss, scores = engine.loss(part.part, count)
            tensors = [None if each is None else torch.as_tensor(each) for each in part]
            wanted = reference.loss(*tensors).item() * counted(part.targets)
            assert_all(abs(loss - wanted) < 1e-11 * abs(wanted), f"{describe(config.layout)}: {loss} {wanted}", comm)
            inputs, targets, *who = tensors
            logits = reference.logits(inputs, *who).detach().numpy()
            found = {} if scores is None else figures(config.model.head, scores)
            right = found == pytest.approx(BY_HAND[name](logits, targets.numpy()))
            assert_all(right, f"{describe(config.layout)}: {found}", comm)
        engine.free()


def choices_by_hand(logits, targets):
    """Accuracy and macro F1 as textbooks have them."""
    pairs = [(int(row.argmax()), int(target)) for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.ravel())
             if target >= 0]
    scores = []
    for label in sorted({label for pair in pairs for label in pair}):
        right = sum(pair == (label, label) for pair in pairs)
        chosen, wanted = (sum(pair[side] == label for pair in pairs) for side in (0, 1))
        precision, recall = right / chosen if chosen else 0, right / wanted if wanted else 0
        scores.append(2 * precision * recall / (precision + recall) if right else 0)
    return {"accuracy": np.mean([chosen == wanted for chosen, wanted in pairs]), "macro_f1": np.mean(scores)}


def values_by_hand(logits, targets):
    """Errors of the means, every other number, where there is a target."""
    errors = (logits[..., ::2] - targets)[~np.isnan(targets)]
    return {"mse": np.mean(errors ** 2), "mae": np.mean(np.abs(errors))}


BY_HAND = {"llama3": lambda *_: {}, "classes": choices_by_hand, "tags": choices_by_hand, "values": values_by_hand}


def test_a_difference_just_above_the_tolerance_is_seen(comm):
    """And one just below is not: in one element of one gradient, on whichever rank holds it."""
    config = one_for_every_degrees(tiny({"model.num_layers": 4}), comm.size)[-1]
    for size, first in ((3e-10, "step 1: gradient of layers.2.ffn.up.weight"), (1e-11, None)):
        batches, expected = reference_steps(config, 1, comm)
        if comm.rank == 0:
            gradient = expected[0][2]["layers.2.ffn.up.weight"]
            gradient.view(-1)[77] += size * gradient.abs().max()
        found = compare_layout(config, comm, batches, expected)
        assert_all(found.first == first and (first is None or 1e-10 < found.worst < 1e-9), str(found), comm)


def test_weights_that_nobody_holds_are_a_difference(comm, monkeypatch):
    config = tiny({"model.num_layers": 4}, comm.size)
    batches, expected = reference_steps(config, 1, comm)
    ranges = Engine.weight_ranges
    monkeypatch.setattr(Engine, "weight_ranges", lambda engine: {
        name: [(start, values[:-1]) for start, values in found] if name.startswith("layers.1.ffn.up") else found
        for name, found in ranges(engine).items()})
    found = compare_layout(config, comm, batches, expected)
    assert found.first == "step 1: weight of layers.1.ffn.up.weight" and found.worst == np.inf


def test_one_rank_needs_no_mpi():
    config = tiny(ranks=1)
    batches, expected = reference_steps(config, 2, SingleComm())
    assert compare_layout(config, SingleComm(), batches, expected).first is None


def test_the_reference_learns():
    """A comparison of runs in which nothing moves would show nothing."""
    config = tiny({"train.lr_schedule": "constant"}, 1)
    batch = compare.batches(config, 1)[0]
    trainer = compare.ReferenceTrainer(config)
    losses = [trainer.step(*batch)[0] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5 and learning_rate(config.train, 6) == config.train.lr

"""``verify``: a layout against the serial reference, tensor by tensor, in float64."""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from mpillm.comm import collectives
from mpillm.errors import ConfigError
from mpillm.schedules.pipeline import SCHEDULES
from mpillm.train.engine import Engine
from mpillm.train.optimizers import decays, learning_rate, make_optimizer
from mpillm.train.reference import Reference

TOLERANCE = 1e-10  # of max|a - b| / max|b|, per tensor


@dataclass(frozen=True)
class Difference:
    """The largest deviation found in a comparison, and the first tensor beyond the tolerance, if any."""

    worst: float
    tensors: int
    first: str | None = None

    def __str__(self):
        return f"{self.tensors} tensors, largest difference {self.worst:.1e}" + (
            f"; first beyond {TOLERANCE:.0e}: {self.first}" if self.first else "")


class ReferenceTrainer:
    """The serial training run to compare with: plain PyTorch on one process."""

    def __init__(self, config):
        self.train = config.train
        self.reference = Reference(config.model, config.train.seed)
        weights = self.reference.parameters.values()
        self.optimizer = make_optimizer(config.train, [
            {"params": [w for w in weights if decays(w.shape)], "weight_decay": config.train.weight_decay},
            {"params": [w for w in weights if not decays(w.shape)], "weight_decay": 0.0},
        ])
        self.steps = 0

    def step(self, inputs, targets, documents):
        """Train one step; return the loss, the unclipped norm, and gradients and weights by name."""
        self.steps += 1
        tensors = [None if part is None else torch.as_tensor(part) for part in (inputs, targets, documents)]
        weights = self.reference.parameters
        loss = self.reference.loss(*tensors)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), self.train.grad_clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.steps)
        gradients = {name: weight.grad.clone() for name, weight in weights.items()}
        self.optimizer.step()
        return loss.item(), norm.item(), gradients, {name: weight.detach().clone() for name, weight in weights.items()}


def random_batches(config, count):
    """Return ``count`` global batches of random tokens, for comparisons that need no text: ``(inputs, targets, documents)``."""
    train, generator = config.train, np.random.default_rng(config.train.seed)
    shape = (train.global_batch, train.seq_len + 1)
    batches = []
    for _ in range(count):
        tokens = generator.integers(0, config.model.vocab_size, shape)
        documents = np.sort(generator.integers(0, 3, (shape[0], train.seq_len))) if config.data.mask_documents else None
        batches.append((tokens[:, :-1], tokens[:, 1:], documents))
    return batches


def compare_layout(config, comm, batches, expected):
    """Train a layout on ``batches`` and hold loss, gradients and weights of every step against the reference.

    Collective over ``comm``. ``expected`` is what :class:`ReferenceTrainer` returned for each batch, on rank 0 (other
    ranks may pass ``None`` entries). Returns a :class:`Difference`, equal on all ranks.
    """
    engine = Engine(config, comm)
    found = []
    for step, (batch, wanted) in enumerate(zip(batches, expected), 1):
        loss, norm = engine.train_step(lambda low, high: [part if part is None else part[low:high] for part in batch],
                                       learning_rate(config.train, step))
        want = comm.bcast(wanted[:2] if wanted else None)
        found += [(f"step {step}: loss", _relative(loss, want[0])),
                  (f"step {step}: gradient norm", _relative(norm, want[1]))]
        gradients, weights = wanted[2:] if wanted else ({}, {})
        names = [*reversed(comm.bcast(list(weights)))]
        for kind, tensors, own in (("gradient", gradients, engine.gradient_ranges()), ("weight", weights, engine.weight_ranges())):
            for name in names:
                found.append((f"step {step}: {kind} of {name}", _compare(tensors.get(name), own.get(name, []), comm)))
    engine.free()
    beyond = [name for name, error in found if not error <= TOLERANCE]
    return Difference(max(error for _, error in found), len(found), beyond[0] if beyond else None)


def all_layouts(config, ranks):
    """Yield every layout of a rank count that can run the configuration: degrees, schedules, sharding, recompute."""
    degrees = [(d, p, ranks // d // p) for d in range(1, ranks + 1) for p in range(1, ranks + 1)
               if ranks % (d * p) == 0]
    for d, p, t in degrees:
        schedules = [(name, 2 if name == "interleaved" else 1) for name in SCHEDULES] if p > 1 else [("1f1b", 1)]
        choices = product(schedules, (0, 1) if d > 1 else (0,), (False, True) if t > 1 else (False,),
                          ("none", "selective", "full"))
        for (schedule, chunks), zero, sequence_parallel, recompute in choices:
            layout = replace(config.layout, data=d, pipeline=p, tensor=t, schedule=schedule, chunks=chunks, zero=zero,
                             sequence_parallel=sequence_parallel, recompute=recompute, stage_cuts="auto")
            try:
                yield replace(config, layout=layout).resolve(ranks)
            except ConfigError:
                continue


def describe(layout):
    """Name a layout in one line."""
    text = f"data={layout.data} pipeline={layout.pipeline} tensor={layout.tensor}"
    if layout.pipeline > 1:
        text += f" {layout.schedule}" + (f" chunks={layout.chunks}" if layout.chunks > 1 else "")
    if layout.data > 1:
        text += f" zero={layout.zero}"
    if layout.sequence_parallel:
        text += " sequence_parallel"
    return text + (f" recompute={layout.recompute}" if layout.recompute != "none" else "")


def _relative(value, wanted):
    return abs(value - wanted) / max(abs(wanted), 1e-300)


def _compare(wanted, own, comm):
    """Return max|a - b| / max|b| of a whole tensor against the ranges that all ranks hold of it."""
    shape = comm.bcast(None if wanted is None else tuple(wanted.shape))
    flat = torch.zeros(shape, dtype=torch.float64) if wanted is None else wanted
    flat = collectives.bcast(flat, comm).reshape(-1)
    covered = np.zeros(flat.numel(), bool)
    error = 0.0
    for start, values in own:
        error = max(error, float((values - flat[start:start + len(values)]).abs().max()))
        error = float("inf") if error != error else error
        covered[start:start + len(values)] = True
    seen = np.logical_or.reduce(comm.allgather(covered))
    scale = float(flat.abs().max())
    worst = max(comm.allgather(error)) / scale if scale else max(comm.allgather(error))
    return worst if seen.all() else float("inf")

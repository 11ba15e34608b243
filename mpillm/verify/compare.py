"""``verify``: a layout against the serial reference, tensor by tensor, in float64."""

import fnmatch
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from mpillm.comm import collectives
from mpillm.comm.group import as_group
from mpillm.data.labelled import counted
from mpillm.data.samples import training_order
from mpillm.data.sources import open_source, random_batches
from mpillm.errors import ConfigError
from mpillm.schedules.pipeline import SCHEDULES
from mpillm.train.engine import Engine
from mpillm.train.initial_weights import head_left_out, load_initial_weights, open_weights
from mpillm.train.learning_rate import learning_rate
from mpillm.train.optimizers import decays
from mpillm.verify.reference import Reference, make_optimizer

TOLERANCE = 1e-10  # of max|a - b| / max|b|, per tensor
# Of the largest number of a kind: a tensor of smaller ones is compared as if it had that one. Where no position turns keys, the
# gradient of their bias is zero but for rounding, and Adam makes steps of that.
LEAST = {"gradient": 1e-5, "weight": 1e-3}


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
        if config.train.init_from:
            source, model = open_weights(config.train.init_from)
            with torch.no_grad():
                for name in self.reference.parameters.keys() - head_left_out(model, config.model):
                    weight = self.reference.parameters[name]
                    weight.copy_(torch.as_tensor(source.read(name)).view(weight.shape))
        train, groups = config.train, {}
        for name, weight in self.reference.parameters.items():
            weight.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in train.freeze))
            factors = [factor for pattern, factor in train.lr_factors.items() if fnmatch.fnmatchcase(name, pattern)]
            if weight.requires_grad:
                decay = train.weight_decay if decays(weight.shape) else 0.0
                groups.setdefault((decay, [*factors, 1.0][0]), []).append(weight)
        self.optimizer = make_optimizer(train, [{"params": own, "weight_decay": decay, "factor": factor}
                                                for (decay, factor), own in groups.items()])
        self.steps = 0

    def step(self, *samples):
        """Train one step on :class:`mpillm.data.sources.Samples`; return the loss, the gradient norm, the unclipped gradients
        (of what is not frozen) and the weights by name."""
        self.steps += 1
        tensors = [None if part is None else torch.as_tensor(part) for part in samples]
        weights = self.reference.parameters
        loss = self.reference.loss(*tensors)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), self.train.grad_clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.train, self.steps)
        self.optimizer.step()
        return loss.item(), norm.item(), gradients, {name: weight.detach().clone() for name, weight in weights.items()}


def batches(config, count):
    """Return the first ``count`` global batches, each :class:`mpillm.data.sources.Samples`; random ones without a data file."""
    train = config.train
    if not Path(config.data.path).exists():
        return random_batches(config, count)
    source, size, found = open_source(config, "train"), train.global_batch, []
    for first in range(0, count * size, size):
        order = training_order(source.num_samples, train.seed, first, size)
        found.append(source.read(order, range(first, first + size)))
    return found


def compare_layout(config, comm, batches, expected):
    """Train a layout on ``batches`` and hold loss, gradients and weights of every step against the reference.

    Collective over ``comm``. ``expected`` is what :class:`ReferenceTrainer` returned for each batch, on rank 0 (other
    ranks may pass ``None`` entries). Returns a :class:`Difference`, equal on all ranks.
    """
    engine = Engine(config, comm)
    if config.train.init_from:
        load_initial_weights(engine, config.train.init_from, comm)
        engine.distribute_weights()
    group, names, errors, ranges = as_group(comm), [], [], {}
    for step, (batch, wanted) in enumerate(zip(batches, expected), 1):
        loss, norm = engine.train_step(batch.part, learning_rate(config.train, step), counted=counted(batch.targets))
        loss_wanted, norm_wanted, *shapes = comm.bcast(wanted and (*wanted[:2], *map(_shapes, wanted[2:])))
        names.append(f"step {step}: loss")
        errors.append(_relative(loss, loss_wanted))
        gradients = _unclipped(engine.gradient_ranges(), norm, config.train.grad_clip)
        for place, kind, own in ((2, "gradient", gradients), (3, "weight", engine.weight_ranges())):
            least = LEAST[kind] * comm.bcast(wanted and max(float(tensor.abs().max()) for tensor in wanted[place].values()))
            for name, shape in reversed(shapes[place - 2].items()):  # backward computes the last layer's first
                tensor = wanted[place][name] if wanted else torch.empty(shape, dtype=torch.float64)
                flat = collectives.bcast(tensor, group).reshape(-1)
                names.append(f"step {step}: {kind} of {name}")
                errors.append(_largest(flat, own.get(name, []), least))
                ranges[names[-1]] = [(start, start + len(values)) for start, values in own.get(name, [])], len(flat)
            if kind == "gradient":
                names.append(f"step {step}: gradient norm")
                errors.append(_relative(norm, norm_wanted))
    engine.free()
    worst = np.max(comm.allgather(errors), axis=0)
    for missing in _uncovered(comm.allgather(ranges)):
        worst[names.index(missing)] = np.inf
    beyond = [name for name, error in zip(names, worst) if not error <= TOLERANCE]
    return Difference(float(worst.max()), len(names), beyond[0] if beyond else None)


def all_layouts(config, ranks):
    """Yield every layout of a rank count that can run the configuration: degrees, schedules, sharding, recompute.

    Where none can, the last one's :class:`ConfigError` is raised.
    """
    degrees = [(d, p, ranks // d // p) for d in range(1, ranks + 1) for p in range(1, ranks + 1)
               if ranks % (d * p) == 0]
    found, refusal = False, None
    for d, p, t in degrees:
        schedules = [(name, 2 if name == "interleaved" else 1) for name in SCHEDULES] if p > 1 else [("1f1b", 1)]
        choices = product(schedules, (0, 1) if d > 1 else (0,), (False, True) if t > 1 else (False,),
                          ("none", "selective", "full"))
        for (schedule, chunks), zero, sequence_parallel, recompute in choices:
            layout = replace(config.layout, data=d, pipeline=p, tensor=t, schedule=schedule, chunks=chunks, zero=zero,
                             sequence_parallel=sequence_parallel, recompute=recompute, stage_cuts="auto")
            try:
                resolved = replace(config, layout=layout).resolve(ranks)
            except ConfigError as error:
                refusal = error
                continue
            found = True
            yield resolved
    if not found:
        raise refusal


def _unclipped(gradients, norm, limit):
    """Undo the clipping: one wrong gradient makes the norm wrong, and through it all clipped gradients."""
    scale = (norm + 1e-6) / limit if limit and norm > limit else 1.0
    return {name: [(start, values * scale) for start, values in own] for name, own in gradients.items()}


def _relative(value, wanted):
    return abs(value - wanted) / max(abs(wanted), 1e-300)


def _largest(wanted, own, least):
    """Return max|a - b| / max|b| over the ranges ``(start, values)`` that this rank holds, with max|b| ``least`` at least; NaN
    counts as infinite."""
    scale = max(float(wanted.abs().max()), least) or 1.0
    differences = [float((values - wanted[start:start + len(values)]).abs().max())
                   for start, values in own if len(values)]
    return max([error if error == error else np.inf for error in differences], default=0.0) / scale


def _uncovered(ranges):
    """Yield the tensors that the ranges of all ranks together do not cover."""
    for name, (_, size) in ranges[0].items():
        end = 0
        for start, stop in sorted(piece for part in ranges for piece in part[name][0]):
            if start > end:
                break
            end = max(end, stop)
        if end < size:
            yield name


def _shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}

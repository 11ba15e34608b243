"""bfloat16 models update float32 masters: held against Adam in float64 numpy, and what checkpoints hold of them."""

import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, configure, tiny

from mpillm.checkpoint.reading import Checkpoint
from mpillm.model.parameters import initial_values, parameters
from mpillm.train.engine import Engine
from mpillm.train.run import Run
from mpillm.verify import compare

pytestmark = [pytest.mark.mpi, pytest.mark.parts]

LR = 6e-4  # by which a norm weight, 1 at first, comes less than half way to the next bfloat16, also in three steps
BFLOAT16 = {"train.dtype": "bfloat16", "train.lr": LR, "train.lr_schedule": "constant", "train.warmup_steps": 0,
            "train.seq_len": 6, "train.global_batch": 8, "model.num_layers": 3, "model.vocab_size": 31}


class Adam:
    """AdamW in float64, of one piece of a parameter."""

    def __init__(self, config, piece):
        initial = initial_values(parameters(config.model)[piece.name], config.train.seed, piece.start, piece.stop)
        self.weights = torch.from_numpy(initial).bfloat16().double().numpy()
        self.train, self.decay = config.train, config.train.weight_decay * (len(piece.shape) > 1)
        self.mean = self.square = np.zeros_like(self.weights)
        self.steps = 0

    def step(self, gradient):
        self.steps += 1
        one, two = self.train.betas
        self.mean = one * self.mean + (1 - one) * gradient
        self.square = two * self.square + (1 - two) * gradient**2
        size = np.sqrt(self.square / (1 - two**self.steps)) + self.train.eps
        self.weights = self.weights * (1 - LR * self.decay) - LR * self.mean / (1 - one**self.steps) / size


def test_updates_too_small_for_bfloat16_add_up(comm):
    config = tiny({**BFLOAT16, **LAYOUTS[comm.size]}).resolve(comm.size)
    engine, (batch,) = Engine(config, comm), compare.batches(config, 1)
    state = list(engine.optimizer.state())
    wanted, moved, errors = [Adam(config, piece) for piece, _ in state], {}, []
    for step in range(1, 11):
        engine.train_step(batch.part, LR)
        gradients = engine.gradient_ranges()
        for (piece, tensors), adam in zip(state, wanted):
            gradient, = (values for start, values in gradients[piece.name] if start == piece.start)
            adam.step(gradient.double().numpy())
            master = tensors["weight"]
            errors.append(np.abs(master.double().numpy() - adam.weights).max())
            assert master.dtype == torch.float32
        norms = torch.cat([torch.empty(0), *(values.float() for name, ranges in engine.weight_ranges().items()
                                             if "norm" in name for _, values in ranges)])
        moved[step] = float((norms != 1).double().mean()) if len(norms) else None
    engine.free()
    assert_all(max(errors, default=0) < 1e-6, f"masters are off by {max(errors, default=0):.1e}", comm)
    assert_all(not moved[1] and not moved[3] and (moved[10] is None or moved[10] > 0.5), moved, comm)


def test_checkpoints_hold_the_masters(comm, data_path):
    run = Run(tiny(configure(data_path, "run", **{**BFLOAT16, **LAYOUTS[comm.size], "model.vocab_size": 257,
                                                  "model.num_layers": 4})), comm)
    for _ in range(3):
        run.step()
    source, differing, total, is_rounded = Checkpoint(run.save()), 0, 0, True
    for name, ranges in run.engine.weight_ranges().items():
        for start, values in ranges:
            saved = torch.from_numpy(source.read(name, "weight", start, start + len(values)))
            assert saved.dtype == torch.float32 and values.dtype == torch.bfloat16
            is_rounded &= torch.equal(saved.bfloat16(), values)
            differing, total = differing + int((saved != values).sum()), total + len(values)
    run.free()
    assert_all(is_rounded and differing > 0.5 * total, f"{is_rounded}, {differing} of {total} differ", comm)

"""A peer to measure against: the same model and work in plain PyTorch, between processes over gloo.

    python -m mpillm.bench.peer MODE RANKS SPEC.json

MODE is ``single`` (one process, all cores as threads), ``ddp`` (DistributedDataParallel), ``tp`` (DTensor tensor
parallel) or ``pp`` (torch.distributed.pipelining, 1F1B). SPEC.json holds the fields of :class:`PeerWork`. Prints one line
of JSON: ``mode ranks step_s tokens_per_s loss``, the step time being the median over all steps but the first.

Legend: B sequences, S positions, D model, H heads, N head width.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpillm.comm.limits import usable_cores

MODES = ("single", "ddp", "tp", "pp")


@dataclass(frozen=True)
class PeerWork:
    """What is trained: sizes of the model, sequences of a batch and of a microbatch, and the AdamW update."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    seq: int
    batch: int
    micro: int
    steps: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    lr: float = 3e-4
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


class Layer(nn.Module):
    """Attention and SwiGLU, each behind a norm and around a residual connection."""

    def __init__(self, work):
        super().__init__()
        self.head_dim = work.head_dim or work.hidden // work.heads
        kv_heads = work.kv_heads or work.heads
        self.group_size = work.heads // kv_heads
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(work.hidden, work.norm_eps) for _ in range(2))
        self.query = nn.Linear(work.hidden, work.heads * self.head_dim, bias=False)
        self.key, self.value = (nn.Linear(work.hidden, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.output = nn.Linear(work.heads * self.head_dim, work.hidden, bias=False)
        self.gate, self.up = (nn.Linear(work.hidden, work.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(work.ffn, work.hidden, bias=False)

    def forward(self, x_BSD, cos_SN, sin_SN):
        """Map activations to activations."""
        y = self.attention_norm(x_BSD)
        q, k, v = (linear(y).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
                   for linear in (self.query, self.key, self.value))
        q, k = rotate(q, cos_SN, sin_SN), rotate(k, cos_SN, sin_SN)
        if self.group_size > 1:
            k, v = (t.repeat_interleave(self.group_size, dim=1) for t in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.output(heads.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x_BSD)
        return x_BSD + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """The layers ``[start, stop)``, with the embedding before the first and norm and head after the last."""

    def __init__(self, work, start=0, stop=None):
        super().__init__()
        stop = work.layers if stop is None else stop
        self.work, is_last = work, stop == work.layers
        # Seeded part by part, so that a stage starts from the weights that the whole model has there.
        self.embedding = seeded(work.layers, nn.Embedding, work.vocab, work.hidden) if start == 0 else None
        self.layers = nn.ModuleList(seeded(index, Layer, work) for index in range(start, stop))
        self.norm = nn.RMSNorm(work.hidden, work.norm_eps) if is_last else None
        self.head = seeded(work.layers + 1, nn.Linear, work.hidden, work.vocab, False) if is_last else None

    def forward(self, x):
        """Map tokens ``[B, S]``, or activations, to logits, or activations, ``[B, S, ...]``."""
        width = self.work.head_dim or self.work.hidden // self.work.heads
        rates = self.work.rope_theta ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(x.shape[1])[:, None] * rates
        cos_SN, sin_SN = angles.cos(), angles.sin()
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, cos_SN, sin_SN)
        return x if self.head is None else self.head(self.norm(x))


def seeded(seed, kind, *arguments):
    """Make a module whose initial weights depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return kind(*arguments)


def rotate(x_BHSN, cos_SN, sin_SN):
    """Turn the pairs ``(i, i + N/2)`` of every head by their position's angles."""
    a, b = x_BHSN.chunk(2, dim=-1)
    return torch.cat((a * cos_SN - b * sin_SN, b * cos_SN + a * sin_SN), dim=-1)


def cross_entropy(logits, targets):
    """Return the mean loss over all targets."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Accumulated:
    """Modes that hold all layers: forward and backward of one microbatch after the other."""

    def __init__(self, mode, rank, ranks, work):
        self.model, self.micro = Decoder(work), work.micro
        self.rank, self.parts = (rank, ranks) if mode == "ddp" else (0, 1)
        if mode == "tp":
            _split_layers(self.model, ranks)
        if mode == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def backward(self, tokens):
        """Leave the gradient of a batch ``[B, S + 1]`` in the parameters; return the loss's part of this rank."""
        own = tokens.chunk(self.parts)[self.rank]
        microbatches = own.split(self.micro)
        total = 0.0
        for index, part in enumerate(microbatches, 1):
            waits = self.parts > 1 and index < len(microbatches)
            with self.model.no_sync() if waits else contextlib.nullcontext():
                loss = cross_entropy(self.model(part[:, :-1]), part[:, 1:]) * (len(part) / len(own))
                loss.backward()
            total += loss.item()
        return total / self.parts


class Pipelined:
    """A pipeline of as many layers a rank, driven by PyTorch's 1F1B."""

    def __init__(self, mode, rank, ranks, work):
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        self.model = Decoder(work, rank * work.layers // ranks, (rank + 1) * work.layers // ranks)
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        stage = PipelineStage(self.model, rank, ranks, torch.device("cpu"))
        self.schedule = Schedule1F1B(stage, work.batch // work.micro, loss_fn=cross_entropy)

    def backward(self, tokens):
        """Leave the gradient of a batch ``[B, S + 1]`` in the parameters; return the loss's part of this rank."""
        losses = []
        inputs = [tokens[:, :-1]] if self.is_first else []
        self.schedule.step(*inputs, **({"target": tokens[:, 1:], "losses": losses} if self.is_last else {}))
        return sum(loss.item() for loss in losses) / max(1, len(losses))


def _split_layers(model, ranks):
    """Split the matrices of every layer over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (ranks,))
    columns, rows = ("query", "key", "value", "gate", "up"), ("output", "down")
    for layer in model.layers:
        parallelize_module(layer, mesh, {name: ColwiseParallel() for name in columns}
                           | {name: RowwiseParallel() for name in rows})


def make_optimizer(mode, model, work):
    """Return AdamW that decays matrices and leaves the weights of norms alone."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": work.weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    # The fused update refuses plain tensors and DTensors together.
    return torch.optim.AdamW(groups, lr=work.lr, betas=work.betas, eps=work.eps, fused=mode != "tp")


def clip(mode, model, limit):
    """Scale the gradient down to the norm ``limit`` over the whole model, unless that is 0; return its norm.

    Collective over the ranks.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if mode in ("single", "ddp"):
        split, whole = [], gradients
    elif mode == "pp":
        split, whole = gradients, []
    else:
        split = [g.to_local() for g in gradients if hasattr(g, "to_local")]
        whole = [g for g in gradients if not hasattr(g, "to_local")]
    square = nn.utils.get_total_norm(split) ** 2
    if split:
        dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(whole) ** 2).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in split + whole if limit else ():
        gradient.mul_(scale)
    return norm.item()


def train(mode, rank, ranks, work):
    """Train ``work.steps`` steps on random tokens; return the line to print. Collective over the ranks."""
    torch.set_num_threads(max(1, usable_cores() // ranks))
    trainer = (Pipelined if mode == "pp" else Accumulated)(mode, rank, ranks, work)
    optimizer = make_optimizer(mode, trainer.model, work)
    generator = torch.Generator().manual_seed(0)
    barrier = dist.barrier if ranks > 1 else lambda: None
    times_s = []
    for _ in range(work.steps):
        tokens = torch.randint(work.vocab, (work.batch, work.seq + 1), generator=generator)
        barrier()
        begin = time.perf_counter()
        loss = trainer.backward(tokens)
        clip(mode, trainer.model, work.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        barrier()
        times_s.append(time.perf_counter() - begin)
    loss = torch.tensor(loss)
    if mode in ("ddp", "pp"):
        dist.all_reduce(loss)
    step_s = statistics.median(times_s[1:])
    return {"mode": mode, "ranks": ranks, "step_s": step_s, "tokens_per_s": work.batch * work.seq / step_s,
            "loss": loss.item()}


def main():
    """Be rank 0 and start the others, which are told their rank and the port of the store."""
    mode, ranks, path, *place = sys.argv[1:]
    ranks, work = int(ranks), PeerWork(**json.loads(Path(path).read_text(encoding="utf-8")))
    if mode not in MODES or (mode == "single") != (ranks == 1):
        sys.exit(f"peer {mode} on {ranks} ranks: MODE is one of {', '.join(MODES)}; single has 1 rank, the others more")
    rank, port = map(int, place) if place else (0, 0)
    others = []
    if ranks > 1:
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, wait_for_workers=False)
        if rank == 0:
            command = [sys.executable, "-m", "mpillm.bench.peer", mode, str(ranks), path]
            others = [subprocess.Popen([*command, str(other), str(store.port)]) for other in range(1, ranks)]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        line = train(mode, rank, ranks, work)
    except BaseException:
        for other in others:
            other.kill()
        raise
    if rank == 0:
        print(json.dumps(line), flush=True)
    code = max((other.wait() for other in others), default=0)
    sys.stdout.flush()
    os._exit(code)  # without taking gloo down: its threads now and then end the process by std::terminate


if __name__ == "__main__":
    main()

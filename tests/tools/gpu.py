"""A training step on one GPU beside the same model in plain PyTorch, one after the other in this process.

    python tests/tools/gpu.py

The peer has float32 weights, bfloat16 by autocast and PyTorch's fused AdamW.
"""

import statistics
import time

import torch

from mpillm.bench.peer import Decoder, Work, cross_entropy
from mpillm.comm.single import SingleComm
from mpillm.config import Config
from mpillm.planner.counts import step_flops
from mpillm.train.engine import Engine

MODEL = {"vocab_size": 32768, "hidden_size": 2048, "ffn_size": 5632, "num_layers": 16, "num_heads": 16}
TRAIN = {"seq_len": 2048, "global_batch": 8, "microbatch": 4, "dtype": "bfloat16", "device": "cuda"}
WARM_UP, STEPS = 3, 8


def measure(name, step, flops):
    """Print the median seconds of a step with its rate and memory."""
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step_s = statistics.median(times[WARM_UP:])
    print(f"{name:14} {step_s * 1e3:7.1f} ms a step {flops / step_s / 1e12:7.0f} TFLOP/s "
          f"{torch.cuda.max_memory_allocated() / 2**30:7.1f} GiB", flush=True)


def own_step(config, tokens):
    """Return a function that trains a step of mpillm, and one that frees it."""
    engine = Engine(config, SingleComm())
    return lambda: engine.train_step(lambda low, high: (tokens[low:high, :-1], tokens[low:high, 1:], None),
                                     config.train.lr), engine.free


def plain_step(config, tokens):
    """Return a function that trains a step of the peer."""
    model, train = config.model, config.train
    torch.set_default_device("cuda")
    peer = Decoder(Work(model.vocab_size, model.hidden_size, model.num_layers, model.num_heads, model.ffn_size,
                        train.seq_len, train.global_batch, train.microbatch, 1))
    optimizer, batch = torch.optim.AdamW(peer.parameters(), lr=train.lr, fused=True), torch.as_tensor(tokens).cuda()

    def step():
        for part in batch.split(train.microbatch):
            with torch.autocast("cuda", torch.bfloat16):
                loss = cross_entropy(peer(part[:, :-1]), part[:, 1:]) * (len(part) / len(batch))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main():
    """Measure both."""
    config = Config.from_dict({"model": MODEL, "train": TRAIN}).resolve(1)
    train = config.train
    tokens = torch.randint(config.model.vocab_size, (train.global_batch, train.seq_len + 1)).numpy()
    flops = step_flops(config.model, train.seq_len, train.global_batch * train.seq_len)
    step, free = own_step(config, tokens)
    measure("mpillm", step, flops)
    free()
    del step
    torch.cuda.empty_cache()
    measure("plain PyTorch", plain_step(config, tokens), flops)


if __name__ == "__main__":
    main()

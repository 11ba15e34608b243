"""A classifier on real text: from which module of Python's standard library is this piece of source?

    mpirun -n 2 python which_module.py DIR              writes DIR/samples.h5, trains on it, prints what it scores
    mpirun -n 2 python which_module.py DIR MASKED       starts from the body of a run of masked.toml

A sample is a piece of 96 bytes; its label is the module. Held out is the last tenth of every module.
"""

import sys
import sysconfig
from pathlib import Path

import numpy as np

import mpillm
from mpillm.comm.world import comm_world
from mpillm.errors import on_rank_0

MODULES = ("argparse", "decimal", "difflib", "doctest", "inspect", "mailbox", "pickletools", "statistics", "tarfile", "turtle")
LENGTH = 96
SOURCES = {"decimal": "_pydecimal.py"}


def write(path):
    """Write the samples of both splits. Local."""
    root, parts = Path(sysconfig.get_path("stdlib")), {"train": [], "validation": []}
    for label, module in enumerate(MODULES):
        text = np.frombuffer((root / SOURCES.get(module, f"{module}.py")).read_bytes(), np.uint8)
        pieces = text[:len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
        cut = len(pieces) * 9 // 10
        for split, own in (("train", pieces[:cut]), ("validation", pieces[cut:])):
            parts[split].append((own, np.full(len(own), label)))
    for split, found in parts.items():
        inputs, labels = (np.concatenate(each) for each in zip(*found))
        mpillm.write_samples(path, split, inputs, labels)


def main():
    """Write, train, print."""
    folder, start, comm = Path(sys.argv[1]), "".join(sys.argv[2:]), comm_world()
    path = folder / "samples.h5"
    on_rank_0(comm, f"write {path}", lambda: (folder.mkdir(parents=True, exist_ok=True), write(path)))
    config = mpillm.Config.from_dict({
        "model": {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "ffn_size": 344, "vocab_size": 258,
                  "max_seq_len": LENGTH, "attention": "bidirectional", "head": "classes", "num_labels": len(MODULES),
                  "pooling": "mean"},
        "data": {"path": str(path)},
        "train": {"run_dir": str(folder / "run"), "seq_len": LENGTH, "global_batch": 64, "microbatch": 16, "steps": 300,
                  "lr": 1e-3, "warmup_steps": 30, "eval_every": 100, "eval_batches": 0, "checkpoint_every": 0,
                  "init_from": start},
    })
    for metrics in mpillm.Run(config, comm, resume="never"):
        if "accuracy" in metrics and comm.rank == 0:
            print(f"step {metrics['step']:4d}: validation loss {metrics['validation_loss']:.3f}, accuracy "
                  f"{metrics['accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f}", flush=True)


if __name__ == "__main__":
    mpillm.launch(main)

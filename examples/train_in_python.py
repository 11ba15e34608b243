"""Train a small model from Python, on any number of ranks up to eight.

    python -m mpillm data mpillm/*/*.py -o tokens.h5 --tokenizer bytes --validation-fraction 0.1
    mpiexec -n 2 python examples/train_in_python.py tokens.h5
"""

import sys

import mpillm


def main():
    config = mpillm.Config.from_dict({
        "model": {"hidden_size": 64, "ffn_size": 172, "num_layers": 4, "num_heads": 4},
        "data": {"path": sys.argv[1]},
        "train": {"run_dir": "run-python", "steps": 50, "seq_len": 128, "global_batch": 8, "lr": 3e-3},
    })
    run = mpillm.Run(config, resume="never")
    for metrics in run:
        if run.comm.rank == 0 and metrics["step"] % 10 == 0:
            print(f"step {metrics['step']} loss {metrics['loss']:.4f}")
    if run.comm.rank == 0:
        print(f"{run.comm.size} ranks, {metrics['bits_per_byte']:.3f} bits per byte; {run.folder}")
    run.free()


mpillm.launch(main)

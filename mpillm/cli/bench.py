"""``mpillm bench``: measure, beside PyTorch when asked."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mpillm.bench.training import make_cases, make_rows, measure, mpillm_program, peer_program, prepare
from mpillm.cli.options import CONTEXT, with_config
from mpillm.comm.world import launched_size
from mpillm.errors import DataError, LaunchError

# Asked in a process of its own: MPI that has started here would disturb the jobs.
_MPI_VERSION = """
from mpi4py import rc
rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())
"""


def _cores():
    return len(os.sched_getaffinity(0))


@click.group("bench")
def command():
    """Measure, beside PyTorch when asked."""


@command.command("train", context_settings=CONTEXT)
@with_config
@click.option("--peers", is_flag=True, help="measure each layout beside the same work in plain PyTorch over gloo")
@click.option("--json", "output", type=click.Path(), metavar="FILE", help="write all figures there")
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(min=1), help="timed jobs of each program")
@click.option("--steps", default=6, show_default=True, type=click.IntRange(min=2),
              help="steps of a job; the first is not counted")
@click.option("--ranks", default=_cores, show_default="one a core", type=click.IntRange(min=1),
              help="of layouts that do not say theirs")
@click.option("--layouts", metavar="NAME[=RANKS],...", help="of single, data, tensor, pipeline; all if not given")
def bench_train(config, peers, output, pairs, steps, ranks, layouts):
    """Time training steps of the model of CONFIG, every program a job of its own.

    Start it without mpirun, on a machine with nothing else to do. Each job has all cores: single as threads of one
    rank, the others as ranks. Rounds alternate the programs; one more round before them measures memory, the summed
    proportional set size of all processes of a job. Where CONFIG names no file of tokens, they are random.
    """
    _check_launch(output)
    names = layouts.split(",") if layouts else ["single"] + (["data", "tensor", "pipeline"] if ranks > 1 else [])
    with tempfile.TemporaryDirectory(prefix="mpillm-bench-") as name:
        folder = Path(name)
        own_path, config = config.data.path, prepare(config, steps, folder)
        if config.data.path != own_path:
            click.echo(f"data.path = {own_path}: no such file: measuring on random tokens", err=True)
        if peers and config.train.device == "auto":
            config = config.with_values({"train.device": "cpu"})
        programs = [(mpillm_program(case, folder), *([peer_program(case, folder)] if peers else []))
                    for case in make_cases(config, names, ranks)]
        rows = make_rows(programs, *measure(programs, pairs, lambda *done: _show(pairs, *done)))
    click.echo(table(rows))
    if output:
        report = {"machine": machine(), "rows": rows}
        Path(output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def table(rows):
    """Return the rows as text, a line each."""
    lines = [f"{'layout':12} {'program':8} {'ranks':>5} {'step s':>9} {'tokens/s':>10} {'peak MiB':>9}  "
             "speed over peer, over single [interval]"]
    for row in rows:
        peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        speeds = [f"{name} {speed['median']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]"
                  for name in ("peer", "single") if (speed := row.get(f"speed_over_{name}"))]
        lines.append(f"{row['layout']:12} {row['impl']:8} {row['ranks']:5} {row['step_s']:9.4f} "
                     f"{row['tokens_per_s']:10.1f} {peak:>9}  {'  '.join(speeds)}".rstrip())
    found = [speed["coverage"] for row in rows for key, speed in row.items() if key.startswith("speed_over_")]
    if found:
        lines.append(f"speed: median over {rows[0]['pairs']} pairs; the interval holds the true median with "
                     f"probability {min(found):.1%} (95 % needs at least 6 pairs)")
    return "\n".join(lines)


def machine():
    """Return what the figures depend on: cores, processor, PyTorch and MPI library."""
    model = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    mpi = subprocess.run([sys.executable, "-c", _MPI_VERSION], capture_output=True, text=True)
    return {
        "cores": _cores(), "cpu": model[0] if model else platform.processor() or platform.machine(),
        "torch": importlib.metadata.version("torch"),
        "mpi": mpi.stdout.strip("\n\0").split("\n")[0] or "none",
    }


def _check_launch(output):
    """Refuse what would only fail after hours of measuring."""
    variable, announced = launched_size()
    if announced > 1:
        raise LaunchError(
            f"mpillm bench train: started on {announced} ranks ({variable}), but it starts its jobs itself: start it "
            "without mpirun"
        )
    if output and not os.access(Path(output).absolute().parent, os.W_OK):
        raise DataError(f"--json {output}: {Path(output).absolute().parent} is no directory one can write to")


def _show(pairs, program, number, step_s):
    """Say which job is done."""
    stage = f"round {number}/{pairs}" if number else "memory"
    click.echo(f"{stage} {program.case.layout} {program.impl}: {step_s:.4f} s a step", err=True)


def _lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []

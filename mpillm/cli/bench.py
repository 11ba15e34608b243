"""``mpillm bench``: measure, beside PyTorch when asked."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

from mpillm.bench import generation, training
from mpillm.bench.collectives import CLEARLY, OPERATIONS, SIZES_BYTES, choices, far_from_best
from mpillm.bench.collectives import measure as measure_collectives
from mpillm.cli.options import CONTEXT, parse_overrides, with_config
from mpillm.comm.group import as_group
from mpillm.comm.limits import usable_cores
from mpillm.comm.world import launched_size
from mpillm.errors import ConfigError, DataError, LaunchError
from mpillm.files import write_json
from mpillm.machine import Machine
from mpillm.plan import DecisionTable

# Asked in a process of its own: MPI that has started here would disturb the jobs.
_MPI_VERSION = """
from mpi4py import rc
rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())
"""


@click.group("bench")
def command():
    """Measure, beside PyTorch when asked."""


@command.command("train", context_settings=CONTEXT)
@with_config
@click.option("--peers", is_flag=True, help="measure each layout beside the same work in plain PyTorch over gloo")
@click.option("--transformers", is_flag=True,
              help="measure beside the class of transformers that computes the model, with eager attention and with sdpa")
@click.option("--json", "output", type=click.Path(), metavar="FILE", help="write all figures there")
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(min=1), help="timed jobs of each program")
@click.option("--steps", default=6, show_default=True, type=click.IntRange(min=2),
              help="steps of a job; the first is not counted")
@click.option("--ranks", default=usable_cores, show_default="one a core", type=click.IntRange(min=1),
              help="of layouts that do not say theirs")
@click.option("--layouts", metavar="NAME[=RANKS],...", help="of single, data, tensor, pipeline; all if not given")
def bench_train(config, peers, transformers, output, pairs, steps, ranks, layouts):
    """Time training steps of the model of CONFIG, every program a job of its own.

    Start it without mpirun, on a machine with nothing else to do. Each job has all cores: single as threads of one
    rank, the others as ranks. Rounds alternate the programs; one more round before them measures memory, the summed
    proportional set size of all processes of a job. Where CONFIG names no file of tokens, they are random.
    """
    _check_launch("train", output)
    names = layouts.split(",") if layouts else ["single"] + (["data", "tensor", "pipeline"] if ranks > 1 else [])
    with tempfile.TemporaryDirectory(prefix="mpillm-bench-") as name:
        folder = Path(name)
        own_path, config = config.data.path, training.prepare(config, steps, folder)
        if config.data.path != own_path:
            click.echo(f"data.path = {own_path}: no such file: measuring on random tokens", err=True)
        if (peers or transformers) and config.train.device == "auto":
            config = config.with_values({"train.device": "cpu"})
        programs = [(training.mpillm_program(case, folder), *([training.peer_program(case, folder)] if peers else []))
                    for case in training.make_cases(config, names, ranks)]
        beside = training.transformers_programs(training.make_cases(config, ["single"], 1)[0], folder) if transformers else ()
        flat = [program for case in programs for program in case] + [*beside]
        rows = training.make_rows(programs, beside, *training.measure(flat, pairs, lambda *done: _show(pairs, *done)))
    click.echo(table(rows))
    if output:
        _write_report(output, rows)


@command.command("collectives", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--peers", is_flag=True, help="measure PyTorch over gloo too")
@click.option("--json", "output", type=click.Path(), metavar="FILE", help="write all figures there")
@click.option("--figure", type=click.Path(), metavar="FILE", help="draw latency and bandwidth against size there")
@click.option("--ops", default=",".join(OPERATIONS), show_default=True, metavar="OP,...")
@click.option("--sizes", default=",".join(map(str, SIZES_BYTES)), show_default=True, metavar="BYTES,...")
@click.option("--dtype", default="float32", show_default=True,
              type=click.Choice(["float64", "float32", "bfloat16", "float16", "int64", "int32"]))
@click.option("--machine", metavar="FILE", help="choose by the table that mpillm probe wrote there, of as many ranks")
@click.option("--all", "with_candidates", is_flag=True,
              help="measure every algorithm that a table could name, and say where the choice is not near the best")
def bench_collectives(peers, output, figure, ops, sizes, dtype, machine, with_candidates):
    """Time collectives on this launch's ranks (under mpirun or srun), every implementation in turn.

    mpillm is on tensors in a shared window, mpillm-copy on tensors outside one, by the algorithm that a short
    measurement before found best; mpillm-bound-window and mpillm-bound do the same by bound requests; mpi is the library's
    own, in place where the operation allows; gloo is PyTorch's.
    """
    from mpillm.comm.world import comm_world

    comm = comm_world()
    operations, sizes_bytes = _words(ops, OPERATIONS), _sizes(sizes)
    for option, path in (("--json", output), ("--figure", figure)):
        _check_writable(option, path)
    if comm.size < 2:
        raise LaunchError("mpillm bench collectives: one rank has nobody to talk to: start it as mpirun -n 2 or more")
    if figure and not importlib.util.find_spec("matplotlib"):
        raise ConfigError("--figure: needs matplotlib, not found here: pip install mpillm[plot]")
    table = _table(machine, comm.size) if machine else None
    torch.set_num_threads(1)
    rows = measure_collectives(as_group(comm), operations, sizes_bytes, getattr(torch, dtype), peers, table,
                               with_candidates,
                               show=lambda *what: comm.rank or click.echo("{} {} bytes".format(*what), err=True))
    if comm.rank == 0:
        click.echo(collectives_table(rows))
        if with_candidates:
            click.echo(behind_best(rows))
        if output:
            _write_report(output, rows)
        if figure:
            from mpillm.bench.pictures import draw_collectives
            from mpillm.report.figures import save_figure

            save_figure(draw_collectives(rows), figure)


@command.command("serve", context_settings=CONTEXT)
@click.argument("run", type=click.Path(exists=True))
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")
@click.option("--json", "output", type=click.Path(), metavar="FILE", help="write all figures there")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(min=1), help="of the service")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(min=1), help="at a time, in closed loop")
@click.option("--requests", default=128, show_default=True, type=click.IntRange(min=2), help="of each load")
@click.option("--prompt-tokens", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(min=2))
@click.option("--shares", default="0.3,0.5,0.7,0.9", show_default=True, metavar="SHARE,...",
              help="of the capacity, that requests arrive at")
def bench_serve(run, rest, output, ranks, clients, requests, prompt_tokens, new_tokens, shares):
    """Put loads on a service of the model of RUN: one client, --clients at a time with and without streams, and requests that
    arrive at random at shares of what these reach.

    Start it without mpirun. The clients are threads beside the service and take time of the same cores.
    """
    from mpillm.bench import serving
    from mpillm.inference.opening import open_model

    _check_launch("serve", output)
    parse_overrides(rest)  # refused before anything is started
    shares = _shares(shares)
    model, rows = open_model(run, {}, 1)[1].model, []
    generator = np.random.default_rng(0)
    prompts = generator.integers(3, model.vocab_size, (2 * requests, prompt_tokens)).tolist()
    with serving.serving(run, ranks, rest) as port:
        def measure(*load, **more):
            rows.append(serving.run(port, serving.Load(*load, **more), prompts, new_tokens))
            click.echo(load[0], err=True)

        measure("warm-up", clients, clients)
        rows.clear()
        measure("one client", max(2, requests // 8), 1)
        measure(f"{clients} clients, no streams", requests, clients, streams=False)
        measure(f"{clients} clients", requests, clients)
        capacity = rows[-1]["requests_per_s"]
        for share in shares:
            measure(f"{share:g} of capacity", requests, rate=share * capacity)
    click.echo(serving_table(rows))
    if output:
        _write_report(output, rows)


@command.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(exists=True))
@click.option("--peers", is_flag=True, help=f"measure those of {', '.join(generation.PEERS)} too that are installed")
@click.option("--json", "output", type=click.Path(), metavar="FILE", help="write all figures there")
@click.option("--pairs", default=3, show_default=True, type=click.IntRange(min=1), help="jobs of each program")
@click.option("--ranks", default=usable_cores, show_default="one a core", type=click.IntRange(min=1),
              help="data ranks of the second job of mpillm")
@click.option("--prompts", default=256, show_default=True, type=click.IntRange(min=1),
              help="of the workload whose lengths differ")
@click.option("--workloads", metavar="NAME,...", help="those to run; all if not given")
def bench_generate(run, peers, output, pairs, ranks, prompts, workloads):
    """Time generation by the model of RUN, a run directory or a folder of Hugging Face weights.

    Start it without mpirun, on a machine with nothing else to do. Each job has all cores: as threads of one rank, and as data
    ranks. Rounds alternate the programs. Every row gets the likeliest tokens, in float32; programs whose first tokens differ
    are not compared.
    """
    _check_launch("generate", output)
    with tempfile.TemporaryDirectory(prefix="mpillm-bench-") as name:
        model, names = generation.prepare(run, Path(name), generation.installed() if peers else [])
        if peers:
            click.echo(f"peers: {', '.join(names) or 'none'}", err=True)
        chosen = generation.make_workloads(model.vocab_size, model.max_seq_len, prompts, workloads)
        programs = generation.make_programs(Path(name), names, ranks, chosen, usable_cores())
        rows = generation.make_rows(chosen, generation.measure(programs, pairs, lambda *done: _show_generation(pairs, *done)))
    click.echo(generation_table(rows))
    if output:
        _write_report(output, rows)


def collectives_table(rows):
    """Return the rows as text, a line each."""
    head = (f"{'op':15} {'bytes':>10} {'impl':19} {'memory':6} {'algorithm':18} {'median us':>11} {'p99 us':>11} "
            f"{'GB/s':>7} {'of copy':>8}")
    return "\n".join([head, *(
        f"{row['op']:15} {row['bytes']:10} {row['impl']:19} {'window' if row['in_window'] else 'own':6} "
        f"{row['algorithm']:18} {row['median_s'] * 1e6:11.1f} {row['p99_s'] * 1e6:11.1f} "
        f"{row['bandwidth_bytes_per_s'] / 1e9:7.2f} {row['copy_fraction']:8.1%}"
        for row in rows
    )])


def behind_best(rows):
    """Return as text how often the choice was as good as the best, and a line for each where it was not."""
    far, total = far_from_best(rows), len(choices(rows))
    return "\n".join([f"choice at least {CLEARLY} x as fast as the best candidate: {total - len(far)} of {total}", *(
        f"{choice['op']} of {choice['bytes']} bytes{' in a window' * choice['in_window']}: {choice['algorithm']} "
        f"{choice['median_s'] * 1e6:.1f} us, {best['algorithm']} {best['median_s'] * 1e6:.1f} us" for choice, best in far)])


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


def generation_table(rows):
    """Return the rows as text, a line each."""
    lines = [f"{'workload':10} {'program':14} {'ranks':>5} {'rows':>5} {'tokens/s':>9}  speed of mpillm over it [interval]"]
    for row in rows:
        speed = row.get("speed_of_mpillm")
        found = f"{speed['median']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]" if speed else ""
        makespan = f"  makespan {row['makespan_over_mean']:.3f} x mean" if row["ranks"] > 1 else ""
        lines.append(f"{row['workload']:10} {row['impl']:14} {row['ranks']:5} {row['batch'] or '':>5} "
                     f"{row['tokens_per_s']:9.1f}  {found}{makespan}".rstrip())
    return "\n".join(lines)


def serving_table(rows):
    """Return the rows as text, a line each."""
    lines = [f"{'load':24} {'requests/s':>10} {'tokens/s':>9}  first token, between tokens: median, p99 (ms)"]
    for row in rows:
        names = ("first_token", "between_tokens") if "first_token_p99_s" in row else ()
        times = "  ".join(f"{row[f'{name}_median_s'] * 1e3:8.1f} {row[f'{name}_p99_s'] * 1e3:8.1f}" for name in names)
        lines.append(f"{row['load']:24} {row['requests_per_s']:10.2f} {row['tokens_per_s']:9.1f}  {times}".rstrip())
    return "\n".join(lines)


def machine():
    """Return what the figures depend on: cores, processor, PyTorch and MPI library."""
    model = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    mpi = subprocess.run([sys.executable, "-c", _MPI_VERSION], capture_output=True, text=True)
    return {
        "cores": usable_cores(), "cpu": model[0] if model else platform.processor() or platform.machine(),
        "torch": importlib.metadata.version("torch"),
        "mpi": mpi.stdout.strip("\n\0").split("\n")[0] or "none",
    }


def _table(name, num_ranks):
    """Return the table of a machine that was measured with so many ranks."""
    machine = Machine.load(name)
    if not machine.table or machine.num_ranks != num_ranks:
        raise ConfigError(f"--machine {name}: has a table for {machine.num_ranks or 'no'} ranks, this launch has "
                          f"{num_ranks}: give what mpillm probe wrote under a launch like this")
    return DecisionTable(machine.table)


def _check_launch(command, output):
    """Refuse what would only fail after hours of measuring."""
    variable, announced = launched_size()
    if announced > 1:
        raise LaunchError(
            f"mpillm bench {command}: started on {announced} ranks ({variable}), but it starts its jobs itself: start it "
            "without mpirun"
        )
    _check_writable("--json", output)


def _check_writable(option, path):
    if path and not os.access(Path(path).absolute().parent, os.W_OK):
        raise DataError(f"{option} {path}: {Path(path).absolute().parent} is no directory one can write to")


def _write_report(output, rows):
    write_json(output, {"machine": machine(), "rows": rows})


def _words(text, allowed):
    """Read names between commas."""
    words = [word for word in text.split(",") if word]
    for word in words:
        if word not in allowed:
            raise ConfigError(f"--ops {text}: {word} is none of {', '.join(allowed)}")
    return words


def _shares(text):
    """Read shares between commas."""
    try:
        shares = [float(word) for word in text.split(",") if word]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < float("inf") for share in shares):
        raise ConfigError(f"--shares {text}: give positive numbers between commas, as in 0.5,0.9")
    return shares


def _sizes(text):
    """Read numbers of bytes between commas."""
    words = [word for word in text.split(",") if word]
    if not all(word.isdigit() and int(word) >= 8 for word in words) or not words:
        raise ConfigError(f"--sizes {text}: give numbers of bytes of at least 8 between commas, as in 4096,1048576")
    return [int(word) for word in words]


def _show(pairs, program, number, step_s):
    """Say which job is done."""
    stage = f"round {number}/{pairs}" if number else "memory"
    click.echo(f"{stage} {program.case.layout} {program.impl}: {step_s:.4f} s a step", err=True)


def _show_generation(pairs, program, number, found):
    """Say which job is done."""
    times = ", ".join(f"{name} {result['seconds']:.2f} s" for name, result in found.items())
    click.echo(f"round {number}/{pairs} {program.label}: {times}", err=True)


def _lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []

"""``mpillm verify``: loss, gradients and weights of a layout against the serial reference, in float64."""

from dataclasses import replace
from pathlib import Path

import click
import torch

from mpillm.cli.options import CONTEXT, with_config
from mpillm.errors import OK, VALIDATION, agreed

RANDOM_SIZES = {"vocab_size": 257, "num_labels": 5}  # where neither the configuration nor data say them


@click.command("verify", context_settings=CONTEXT)
@with_config
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="training steps to compare")
@click.option("--all-layouts", is_flag=True, help="every layout of this rank count, in this launch")
def command(config, steps, all_layouts):
    """Hold layouts of this launch's ranks against the serial reference; exit 17 if any differs beyond 1e-10."""
    from mpillm.comm.world import comm_world
    from mpillm.planner.keys import describe
    from mpillm.verify import compare

    comm = comm_world()
    torch.set_num_threads(1)
    with agreed(comm, "data"):
        config = _with_sizes(config)
    config = replace(config, train=replace(config.train, dtype="float64", device="cpu"))
    layouts = list(compare.all_layouts(config, comm.size)) if all_layouts else [config.resolve(comm.size)]
    with agreed(comm, "data"):
        batches = compare.batches(layouts[0], steps)
    reference = compare.ReferenceTrainer(layouts[0]) if comm.rank == 0 else None
    expected = [reference.step(*batch) if reference else None for batch in batches]
    differing = 0
    for layout in layouts:
        found = compare.compare_layout(layout, comm, batches, expected)
        differing += found.first is not None
        if comm.rank == 0:
            click.echo(f"{'DIFFERS' if found.first else 'agrees '} {describe(layout.layout)}: {found}")
    if comm.rank == 0:
        click.echo(f"{len(layouts)} layouts of {comm.size} ranks, {steps} steps: {differing} differ")
    return VALIDATION if differing else OK


def _with_sizes(config):
    """Return the configuration with the sizes of its data, or where they are missing, of the random ones."""
    from mpillm.data.sources import with_sizes

    if Path(config.data.path).exists():
        return with_sizes(config)
    while missing := config.model.missing:
        config = config.with_values({f"model.{missing}": RANDOM_SIZES[missing]})
    return config

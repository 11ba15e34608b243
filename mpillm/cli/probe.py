"""``mpillm probe``: measure this launch."""

import click

from mpillm.planner.counts import ITEM_BYTES


@click.command("probe")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="write the machine there")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]),
              help="as train.device")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(ITEM_BYTES)),
              help="as train.dtype: what weights and activations have")
def command(output, device, dtype):
    """Measure this launch under mpirun or srun, all ranks at once as in a run.

    Matrix products, memory, links, and which algorithm is fastest for each collective and size. mpillm plan --machine
    FILE plans with it.
    """
    import torch

    from mpillm.comm.devices import pick_device
    from mpillm.comm.group import as_group
    from mpillm.comm.probe import measure_machine
    from mpillm.comm.world import comm_world, set_threads
    from mpillm.errors import on_rank_0
    from mpillm.nn.products import fast_product

    comm, dtype = comm_world(), getattr(torch, dtype)
    set_threads(comm)
    device = pick_device(device, comm)
    machine = measure_machine(as_group(comm), device=device, dtype=dtype, multiply=fast_product(comm, device, dtype))
    on_rank_0(comm, f"-o {output}", machine.save, output)
    if comm.rank == 0:
        for width, rate in machine.matmul:
            click.echo(f"products of width {width:5}: {rate / 1e9:8.1f} GFLOP/s a rank")
        click.echo(f"memory a rank: {machine.memory_bytes / 1e9:.3g} GB, {machine.memory_bytes_per_s / 1e9:.3g} GB/s")
        for level in machine.levels:
            rate = f"{1e-9 / level.beta_s_per_byte:.2f} GB/s" if level.beta_s_per_byte else "no limit found"
            click.echo(f"{level.name}: {level.alpha_s * 1e6:.1f} us a message, {rate}")
        for op, _, _, limit, algorithm, *where in machine.table:
            size = "any size" if limit is None else f"{limit} bytes"
            click.echo(f"{op:15} up to {size:>15}: {algorithm}{', for tensors in a window' if where else ''}")

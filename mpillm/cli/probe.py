"""``mpillm probe``: measure this launch."""

import click


@click.command("probe")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="write the machine there")
def command(output):
    """Measure this launch under mpirun or srun, all ranks at once as in a run.

    Matrix products, memory, links, and which algorithm is fastest for each collective and size. mpillm plan --machine
    FILE plans with it.
    """
    from mpillm.comm.group import as_group
    from mpillm.comm.probe import measure_machine, measure_table
    from mpillm.comm.world import comm_world, set_threads
    from mpillm.errors import on_rank_0
    from mpillm.plan import DEFAULT_TABLE

    comm = comm_world()
    set_threads(comm)
    group = as_group(comm)
    table = measure_table(group) if comm.size > 1 else DEFAULT_TABLE
    machine = measure_machine(group, table)
    on_rank_0(comm, lambda: machine.save(output), f"-o {output}")
    if comm.rank == 0:
        for width, rate in machine.matmul:
            click.echo(f"products of width {width:5}: {rate / 1e9:8.1f} GFLOP/s a rank")
        click.echo(f"memory a rank: {machine.memory_bytes / 1e9:.3g} GB, {machine.memory_bytes_per_s / 1e9:.3g} GB/s")
        for level in machine.levels:
            rate = f"{1e-9 / level.beta_s_per_byte:.2f} GB/s" if level.beta_s_per_byte else "no limit found"
            click.echo(f"{level.name}: {level.alpha_s * 1e6:.1f} us a message, {rate}")
        for op, _, _, limit, algorithm in table.rows:
            click.echo(f"{op:15} up to {'any size' if limit is None else f'{limit} bytes':>15}: {algorithm}")

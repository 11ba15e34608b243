"""``mpillm probe``: measure this launch."""

import click


@click.command("probe")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="write the plan there")
def command(output):
    """Measure under mpirun or srun which algorithm is fastest for each collective and size.

    All ranks talk at once, as in a run. mpillm train --plan FILE obeys what was found.
    """
    import torch

    from mpillm.comm.group import as_group
    from mpillm.comm.probe import measure_table
    from mpillm.comm.world import comm_world
    from mpillm.errors import together
    from mpillm.plan import DEFAULT_TABLE, Plan

    comm = comm_world()
    torch.set_num_threads(1)
    group = as_group(comm)
    table = measure_table(group) if comm.size > 1 else DEFAULT_TABLE
    plan = Plan(comm.size, len(set(group.schedules.nodes)) if comm.size > 1 else 1, table)
    together(comm, lambda: plan.save(output) if comm.rank == 0 else None, f"-o {output}")
    if comm.rank == 0:
        for op, _, _, limit, algorithm in table.rows:
            click.echo(f"{op:15} up to {'any size' if limit is None else f'{limit} bytes':>15}: {algorithm}")

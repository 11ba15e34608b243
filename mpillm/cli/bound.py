"""``mpillm bound``: how fast a collective could be on a network, and which links decide it."""

import click

from mpillm.cli.options import write_json


@click.command("bound")
@click.argument("op")
@click.option("--topology", "path", required=True, type=click.Path(), metavar="FILE", help="nodes and links, as JSON")
@click.option("--trees", type=click.Path(), metavar="FILE", help="pack trees, and write their schedule there")
@click.option("--json", "output", metavar="FILE|-", help="write the bound there, - for standard output")
def command(op, path, trees, output):
    """Bound OP (allgather, reduce_scatter, allreduce, alltoall) on a network by a linear program."""
    from mpillm.planner import routes

    topology = routes.Topology.load(path)
    found = routes.bound(op, topology)
    packed = None
    if trees:
        from mpillm.planner.trees import pack_trees

        packed = pack_trees(op, topology)
        write_json(trees, packed.schedule.to_dict())
    prices = [{"from": a, "to": b, "price_s_per_byte_per_byte_per_s": price} for (a, b), price in found.prices.items()]
    if output:
        reached = {"trees_beta_s_per_byte": packed.beta_s_per_byte, "trees_fraction": packed.fraction,
                   "trees_limit_s_per_byte": packed.limit_s_per_byte} if packed else {}
        write_json(output, {"op": op, "ranks": len(topology.ranks), "beta_s_per_byte": found.beta_s_per_byte,
                            "bottleneck": [list(link) for link in found.bottleneck], "prices": prices, **reached})
    if output != "-":
        click.echo(f"{op} of {len(topology.ranks)} ranks: at least {found.beta_s_per_byte:.4g} s a byte of the whole "
                   f"buffer, {1 / found.beta_s_per_byte / 1e9:.4g} GB/s")
        click.echo(f"decided by {len(found.bottleneck)} links:")
        for source, to in found.bottleneck[:20]:
            click.echo(f"  {source} -> {to}: a byte a second more is worth {found.prices[source, to]:.3g} s a byte")
        if packed:
            click.echo(f"{packed.schedule.num_chunks} trees reach {packed.fraction:.1%} of that, and "
                       f"{packed.limit_s_per_byte / packed.beta_s_per_byte:.1%} of what messages can: {trees}")

"""``mpillm score``: how likely texts are to a model."""

import click

from mpillm.cli.batch import score_batch
from mpillm.cli.options import CONTEXT, parse_overrides


@click.command("score", context_settings=CONTEXT)
@click.argument("path", metavar="RUN", type=click.Path())
@click.argument("source", metavar="FILE", type=click.Path())
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")
@click.option("-o", "output", required=True, type=click.Path(), metavar="OUT", help="where results go, a line each")
@click.option("--data", type=click.IntRange(1), metavar="D", help="copies of the model; by default one a rank")
def command(path, source, rest, output, data):
    """Score the lines of FILE with the newest weights of RUN; under mpirun or srun on all ranks.

    A line has a context and a continuation, or a text, which is scored from its first token on.

    SIGUSR1 or SIGTERM to any rank ends it with exit code 85: the same command goes on from there, also on other ranks.
    """
    overrides = parse_overrides(rest) | ({} if data is None else {"layout.data": data})
    return score_batch(path, source, output, overrides)

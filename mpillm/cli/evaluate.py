"""``mpillm evaluate``: tasks of lm-eval with a run."""

import click

from mpillm.cli.options import CONTEXT, parse_overrides, write_json
from mpillm.errors import OK, ConfigError


@click.command("evaluate", context_settings=CONTEXT)
@click.argument("path", metavar="RUN", type=click.Path())
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")
@click.option("--tasks", required=True, metavar="T,...", help="names of tasks, groups or tags of lm-eval")
@click.option("--include-path", type=click.Path(), metavar="DIR", help="a folder with tasks of your own")
@click.option("--num-fewshot", type=click.IntRange(0), metavar="N", help="examples before each question")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="only the first N questions of each task")
@click.option("--json", "target", type=click.Path(), metavar="FILE", help="write the results to a file, - for standard output")
@click.option("--data", type=click.IntRange(1), metavar="D", help="copies of the model; by default one a rank")
def command(path, rest, tasks, include_path, num_fewshot, limit, target, data):
    """Evaluate the newest weights of RUN with lm-eval's tasks; under mpirun or srun on all ranks.

    The results are the same on any number of ranks. Data comes from files and from what the cache of Hugging Face holds; to
    load it from the net, set HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0.
    """
    from mpillm.comm.world import comm_world
    from mpillm.inference.crew import Crew

    overrides = parse_overrides(rest) | ({} if data is None else {"layout.data": data})
    names = [name for name in tasks.split(",") if name]
    crew = Crew(comm_world())
    crew.run(_harness)
    crew.open(path, overrides)
    if crew.engine.caveat and crew.comm.rank == 0:
        click.echo(f"mpillm evaluate: results may depend on what is computed beside: {crew.engine.caveat}", err=True)
    crew.run(lambda: _report(_harness().evaluate(crew, names, include_path, num_fewshot, limit), target))
    crew.engine.free()
    return OK


def _harness():
    """Import what needs lm-eval, which is optional."""
    try:
        from mpillm.inference import harness
    except ImportError as error:
        raise ConfigError(f"evaluate needs lm-eval ({error}): pip install 'mpillm[eval]'") from None
    return harness


def _report(found, target):
    """Show tables, as the harness does; write what was found."""
    from lm_eval.utils import make_table

    for column in ("results", "groups"):
        if found.get(column):
            click.echo(make_table(found, column))
    if target is not None:
        write_json(target, found)

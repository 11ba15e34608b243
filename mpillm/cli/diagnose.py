"""``mpillm diagnose``: why a run hung."""

from pathlib import Path

import click

from mpillm.errors import DataError


@click.command("diagnose")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
def command(run):
    """Name the rank and call of the run directory RUN that came to a stop first.

    Reads RUN/flight, which every rank writes when it makes no progress for longer than it ever did.
    """
    from mpillm.guard.diagnose import diagnose, read_flights

    found = read_flights(run / "flight")
    if not found:
        raise DataError(f"{run / 'flight'}: no rank wrote its last calls there: the run did not hang, or it was not "
                        "watched (train.hang_limit_s = 0)")
    click.echo(diagnose(found))

"""``mpillm simulate``: play a schedule on a clock."""

import click

from mpillm.cli.options import write_json, write_text
from mpillm.errors import ConfigError


@click.group("simulate")
def command():
    """Play a schedule on a clock, without running it."""


@command.command("pipeline")
@click.option("--schedule", required=True, metavar="NAME|auto|FILE", help="a named one, auto to make one, or a file")
@click.option("--pipeline", "ranks", required=True, type=click.IntRange(1), help="pipeline ranks")
@click.option("--microbatches", required=True, type=click.IntRange(1), help="microbatches of a step")
@click.option("--forward-ms", required=True, type=click.FloatRange(0), help="forward of a rank and microbatch")
@click.option("--backward-input-ms", required=True, type=click.FloatRange(0), help="its input half")
@click.option("--backward-weight-ms", required=True, type=click.FloatRange(0), help="its weight half")
@click.option("--p2p-ms", default=0.0, type=click.FloatRange(0), help="a message between neighbours")
@click.option("--chunks", default=1, type=click.IntRange(1), help="stages a rank, which share its times")
@click.option("--memory-limit", type=click.IntRange(1), help="microbatches a rank may hold")
@click.option("--weight-memory", default=1.0, type=click.FloatRange(0, 1), show_default=True,
              help="for auto: share of a microbatch's memory held from its input half to its weight half")
@click.option("-o", "saved", type=click.Path(), metavar="FILE", help="write the schedule there, for layout.schedule")
@click.option("--json", "output", metavar="FILE|-", help="write what came out there, - for standard output")
def pipeline(schedule, ranks, microbatches, forward_ms, backward_input_ms, backward_weight_ms, p2p_ms, chunks,
             memory_limit, weight_memory, saved, output):
    """Play a pipeline schedule: how long it takes, its bubble, and what its ranks hold."""
    from mpillm.planner.synthesis import synthesise
    from mpillm.planner.timeline import play
    from mpillm.schedules.check import check
    from mpillm.schedules.pipeline import named_or_read

    times_s = [ms / 1e3 / chunks for ms in (forward_ms, backward_input_ms, backward_weight_ms)]
    if schedule == "auto":
        if chunks > 1:
            raise ConfigError(f"--schedule auto with --chunks {chunks}: it makes schedules of one stage a rank; leave "
                              "out --chunks, or take interleaved")
        played = synthesise(ranks, microbatches, *times_s, p2p_ms / 1e3, memory_limit, weight_memory)
    else:
        made = named_or_read(schedule, ranks, microbatches, chunks)
        check(made, memory_limit)
        played = play(made, *times_s, p2p_ms / 1e3)
    if saved:
        write_text(saved, played.schedule.to_text())
    found = {"schedule": schedule, "makespan_ms": played.makespan_s * 1e3, "total_ms": played.total_s * 1e3,
             "bubble_fraction": played.bubble_fraction, "idle_ms": [s * 1e3 for s in played.idle_s.tolist()],
             "in_flight_max": list(played.in_flight_max)}
    if output:
        write_json(output, found)
    if output != "-":
        click.echo(f"{schedule}: {ranks} ranks, {microbatches} microbatches: {found['makespan_ms']:.3f} ms, bubble "
                   f"{100 * found['bubble_fraction']:.2f} %, held at most {max(found['in_flight_max'])} microbatches")
        for rank, (span, idle) in enumerate(zip(played.spans_s, played.idle_s)):
            click.echo(f"  rank {rank}: {span * 1e3:.3f} ms from first to last action, idle {idle * 1e3:.3f} ms of the "
                       f"whole, holds {played.in_flight_max[rank]}")

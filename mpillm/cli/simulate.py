"""``mpillm simulate``: play a schedule on a clock."""

from pathlib import Path

import click

from mpillm.cli.options import write_json
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
    """Play a pipeline schedule: how long it takes, its bubble, and what its ranks hold.

    A FILE whose name ends in .csv is in the form of PyTorch's torch.distributed.pipelining, any other in mpillm's text.

    The JSON has makespan_ms (the longest rank, from its first action to the end of its last), total_ms (of all ranks),
    bubble_fraction, idle_ms and in_flight_max with an entry a rank, and critical_path: the actions, first to last,
    that decide total_ms.
    """
    from mpillm.planner.synthesis import synthesise
    from mpillm.planner.timeline import play
    from mpillm.schedules.check import check
    from mpillm.schedules.formats import named_or_read, write_schedule

    times_s = [ms / 1e3 / chunks for ms in (forward_ms, backward_input_ms, backward_weight_ms)]
    if not sum(times_s):
        raise ConfigError("--forward-ms, --backward-input-ms, --backward-weight-ms: all are 0, so there is nothing to "
                          "play; give one of them a time")
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
        write_schedule(saved, played.schedule)
    found = {"schedule": schedule, "makespan_ms": played.makespan_s * 1e3, "total_ms": played.total_s * 1e3,
             "bubble_fraction": played.bubble_fraction, "idle_ms": [s * 1e3 for s in played.idle_s.tolist()],
             "in_flight_max": list(played.in_flight_max),
             "critical_path": [str(step.what) for step in played.critical_path()]}
    if output:
        write_json(output, found)
    if output != "-":
        click.echo(f"{schedule}: {ranks} ranks, {microbatches} microbatches: {found['makespan_ms']:.3f} ms, bubble "
                   f"{100 * found['bubble_fraction']:.2f} %, held at most {max(found['in_flight_max'])} microbatches")
        for rank, (span, idle) in enumerate(zip(played.spans_s, played.idle_s)):
            click.echo(f"  rank {rank}: {span * 1e3:.3f} ms from first to last action, idle {idle * 1e3:.3f} ms of the "
                       f"whole, holds {played.in_flight_max[rank]}")


@command.command("collective")
@click.option("--op", required=True, metavar="OP", help="allreduce, reduce_scatter, allgather, bcast, alltoall ...")
@click.option("--schedule", required=True, metavar="NAME|FILE", help="an algorithm, or a file with a schedule as JSON")
@click.option("--ranks", required=True, type=click.IntRange(1), help="ranks that take part")
@click.option("--bytes", "n_bytes", required=True, type=click.IntRange(0), help="of the whole vector")
@click.option("--machine", "name", required=True, metavar="FILE|PRESET", help="what mpillm probe wrote, or a preset")
@click.option("--json", "output", metavar="FILE|-", help="write what came out there, - for standard output")
def collective(op, schedule, ranks, n_bytes, name, output):
    """Play the schedule of a collective on a machine: how long it takes, and what every link carries."""
    from mpillm.machine import Machine
    from mpillm.planner.messages import play_collective

    machine = Machine.load(name)
    played = play_collective(read_collective(op, schedule, ranks, machine), machine, n_bytes)
    if output:
        links = {f"{source}>{target}": carried for (source, target), carried in sorted(played.bytes_per_link.items())}
        write_json(output, {"op": op, "schedule": schedule, "ranks": ranks, "bytes": n_bytes, "machine": machine.name,
                            "seconds": played.total_s, "bytes_per_link": links})
    if output != "-":
        most = max(played.bytes_per_link.values(), default=0)
        click.echo(f"{op} by {schedule}, {ranks} ranks, {n_bytes} bytes on {machine.name}: {played.total_s:.4g} s; "
                   f"{len(played.bytes_per_link)} links carry {sum(played.bytes_per_link.values())} bytes, at most "
                   f"{most} each")


def read_collective(op, schedule, ranks, machine):
    """Return the schedule of an algorithm, or that in a file; the file's must fit operation and ranks."""
    from mpillm.schedules.collective import CollectiveSchedule
    from mpillm.schedules.generators import ALGORITHMS, make_collective

    if schedule in ALGORITHMS.get(op, ()) or not Path(schedule).is_file():
        return make_collective(op, schedule, ranks, nodes=[machine.node_of(rank) for rank in range(ranks)])
    made = CollectiveSchedule.load(schedule)
    if (made.op, made.num_ranks) != (op, ranks):
        raise ConfigError(f"--schedule {schedule}: holds {made.op} of {made.num_ranks} ranks, not {op} of {ranks}")
    return made

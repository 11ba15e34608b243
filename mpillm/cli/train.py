"""``mpillm train``: train a model, showing progress on rank 0."""

import sys
import time

import click
from tqdm import tqdm

from mpillm.cli.options import CONTEXT, with_config
from mpillm.errors import OK, RESUME

LINE_EVERY_S = 5.0


@click.command("train", context_settings=CONTEXT)
@with_config
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH",
              help="go on from the newest checkpoint of the run directory, or start anew, or go on from PATH")
@click.option("--plan", type=click.Path(), metavar="FILE", help="obey this plan, made by mpillm plan")
@click.option("--probe-top", type=click.IntRange(1), metavar="K",
              help="plan what [layout] leaves open, try the best K for a few steps each, take the fastest")
def command(config, resume, plan, probe_top):
    """Train the model of CONFIG; under mpirun or srun on all ranks.

    Without data, pipeline and tensor in [layout] the launch is measured, once for its kind, and planned for.

    SIGUSR1 or SIGTERM to any rank ends the run at the next step with a checkpoint and exit code 85: the same command
    goes on from there.
    """
    from mpillm.comm.world import comm_world
    from mpillm.errors import ConfigError, agreed
    from mpillm.guard.stop import StopRequest
    from mpillm.plan import Plan
    from mpillm.train.choose import choose_plan, is_open
    from mpillm.train.run import Run

    comm, stop = comm_world(), StopRequest()
    with agreed(comm, "plan"):
        obeyed = Plan.load(plan, comm.size) if plan else None
    if plan and probe_top:
        raise ConfigError("--plan and --probe-top: a plan is obeyed, not searched for; give one of them")
    if probe_top or not plan and comm.size > 1 and is_open(config):
        obeyed, origin = choose_plan(config, comm, probe_top or 1)
        if comm.rank == 0:
            report_choice(obeyed, origin)
    run = Run(config, comm, resume, obeyed, stop)
    show = Progress(run) if run.comm.rank == 0 else None
    for metrics in run:
        if show:
            show.update(metrics)
    if show:
        show.close()
        if run.stopped_by:
            click.echo(f"mpillm train: stopped by {run.stopped_by} after step {run.step_number}; the same command goes "
                       "on from there", err=True)
    run.free()
    return RESUME if run.stopped_by else OK


def report_choice(plan, origin):
    """Say which plan will be obeyed and why."""
    from mpillm.planner.keys import describe

    for one in plan.tried:
        click.echo(f"mpillm train: tried {describe(one['layout'])}: {one['measured_s']:.4g} s a step, predicted "
                   f"{one['predicted_s']:.4g} s", err=True)
    click.echo(f"mpillm train: planned {describe(plan.layout)}, {plan.predicted['step_s']:.4g} s a step ({origin})",
               err=True)


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, run):
        from mpillm.planner.keys import describe

        self.train, self.is_terminal, self.last_line_s = run.config.train, sys.stderr.isatty(), 0.0
        exact = f"exact products {run.engine.way}, " if run.config.train.numerics == "exact" else ""
        start = f"going on from step {run.step_number}" if run.step_number else "starting"
        click.echo(f"mpillm train: {run.comm.size} ranks, {run.threads} threads each, {exact}{describe(run.config.layout)}; "
                   f"{start} in {run.folder}", err=True)
        self.bar = tqdm(total=self.train.steps, initial=run.step_number, unit="step", disable=not self.is_terminal,
                        dynamic_ncols=True)

    def update(self, metrics):
        """Show a step's metrics."""
        text = f"loss {metrics['loss']:.4f} {metrics['tokens_per_s']:,.0f} tokens/s"
        if "validation_loss" in metrics:
            text += f" validation {metrics['validation_loss']:.4f}"
        if "bits_per_byte" in metrics:
            text += f" ({metrics['bits_per_byte']:.4f} bits/byte)"
        self.bar.update(1)
        if metrics["step"] % self.train.log_every == 0:
            self.bar.set_postfix_str(text)
        is_due = time.monotonic() - self.last_line_s >= LINE_EVERY_S or metrics["step"] == self.train.steps
        if not self.is_terminal and (is_due or "validation_loss" in metrics):
            click.echo(f"step {metrics['step']}/{self.train.steps} {text}", err=True)
            self.last_line_s = time.monotonic()

    def close(self):
        """Leave the bar as it stands."""
        self.bar.close()

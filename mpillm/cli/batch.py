"""What ``mpillm generate --prompts`` and ``mpillm score`` share: a batch with its progress, and how it ends."""

import sys
import time

import click
from tqdm import tqdm

from mpillm.errors import OK, RESUME

LINE_EVERY_S = 5.0


def generate_batch(path, source, target, overrides, count, temperature, seed):
    """Continue the prompts of a file; return the exit code. Collective over the world."""
    from mpillm.inference.tasks import Generation

    return _run("generate", path, source, target, overrides,
                lambda engine: Generation(engine, count, temperature, seed))


def score_batch(path, source, target, overrides):
    """Score the texts of a file; return the exit code. Collective over the world."""
    from mpillm.inference.tasks import Scoring

    return _run("score", path, source, target, overrides, Scoring)


def _run(name, path, source, target, overrides, make_task):
    from mpillm.comm.world import comm_world
    from mpillm.guard.stop import StopRequest
    from mpillm.inference.batch import run_batch
    from mpillm.inference.engine import Engine

    comm, stop = comm_world(), StopRequest()
    engine = Engine(path, comm, overrides)
    show = Bar(name, engine) if comm.rank == 0 else None
    outcome = run_batch(engine, make_task(engine), source, target, stop, show)
    if show is not None:
        show.close(outcome, target)
    engine.free()
    return RESUME if outcome.stopped_by else OK


class Bar:
    """A bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, name, engine):
        self._name, self._is_terminal, self._started_s = name, sys.stderr.isatty(), time.monotonic()
        self._last_line_s, self._bar, self._seen = self._started_s, None, None
        layout = ", ".join(f"{axis} {engine.mesh.size(axis)}" for axis in ("data", "pipeline", "tensor"))
        self._say(f"{engine.mesh.world.size} ranks, {engine.threads} threads each, {layout}")
        if engine.caveat:
            self._say(f"results may depend on what is computed beside: {engine.caveat}")

    def __call__(self, progress):
        """Show how far it is."""
        passed_s = time.monotonic() - self._started_s
        if self._bar is None:
            if progress.before:
                self._say(f"going on: {progress.before} of {progress.all_lines} lines are done")
            self._bar = tqdm(
                total=progress.all_lines, initial=progress.lines, disable=not self._is_terminal, dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} lines{postfix}")
        text = f"{progress.tokens / passed_s:,.0f} tokens/s"
        if progress.share:
            text += f", {_clock(passed_s * (1 - progress.share) / progress.share)} left"
        self._seen = f"{progress.lines}/{progress.all_lines} lines, {text}"
        self._bar.update(progress.lines - self._bar.n)
        self._bar.set_postfix_str(text)
        if not self._is_terminal and time.monotonic() >= self._last_line_s + LINE_EVERY_S:
            click.echo(self._seen, err=True)
            self._last_line_s = time.monotonic()

    def close(self, outcome, target):
        """Leave the bar as it stands and say how it ended."""
        if self._bar is not None:
            self._bar.close()
        if outcome.refused:
            number, first = min(outcome.refused.items())
            self._say(f"{len(outcome.refused)} of {outcome.lines} lines in error, first line {number}: {first['error']}")
        if outcome.stopped_by:
            self._say(f"stopped by {outcome.stopped_by}; the same command goes on from there")
        else:
            self._say(f"{outcome.lines} lines in {target}" + ", all done before" * outcome.was_done)

    def _say(self, text):
        click.echo(f"mpillm {self._name}: {text}", err=True)


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"

"""All commands: their list, how one is found, how the process ends."""

import difflib
import importlib
import os
import sys
import warnings

import click

import mpillm
from mpillm.errors import FAILURE, USAGE, MpillmError

COMMANDS = {
    "doctor": "say what this launch is: MPI library, ranks, nodes, threads, binding, GPU, HDF5 (under mpirun or srun)",
    "data": "turn text or JSONL files into tokens",
    "probe": "measure this machine: rates, links, the fastest algorithms (under mpirun or srun)",
    "plan": "choose how to train a model on a machine",
    "simulate": "play a pipeline schedule or a collective on a clock",
    "bound": "how fast a collective could be on a network",
    "calibrate": "fit the cost model to measured iterations",
    "train": "train a model (under mpirun or srun)",
    "verify": "hold this launch's layout against the serial reference in float64 (under mpirun or srun)",
    "generate": "sample text from a run (under mpirun or srun)",
    "score": "how likely texts are to a run (under mpirun or srun)",
    "serve": "answer requests over HTTP in OpenAI's form (under mpirun or srun)",
    "evaluate": "tasks of lm-eval with a run (under mpirun or srun)",
    "bench": "measure, beside PyTorch when asked",
    "convert": "weights out of a run for transformers; Hugging Face or GGUF weights into a new run",
    "diagnose": "why a run hung: the rank and the call that stopped first",
    "report": "draw the pictures of a run",
}
UNDER_MPI = (  # doctor starts MPI itself, to tell why that fails
    "probe", "train", "verify", "generate", "score", "serve", "evaluate", "bench collectives")


class Commands(click.Group):
    """Loads a command's module only when that command is asked for."""

    def list_commands(self, context):
        return list(COMMANDS)

    def get_command(self, context, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"mpillm.cli.{name}").command

    def resolve_command(self, context, words):
        try:
            return super().resolve_command(context, words)
        except click.UsageError as error:
            close = difflib.get_close_matches(words[0], COMMANDS, 1)
            error.message += f" Did you mean {close[0]}?" if close else f" There are: {', '.join(COMMANDS)}."
            raise

    def format_commands(self, context, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mpillm.__version__)
def cli():
    """Train and run transformer language models as MPI programs."""


def run(words):
    """Run the command that ``words`` say, and leave; exit codes are those of :mod:`mpillm.errors`."""
    warnings.formatwarning = _in_a_line
    if hasattr(sys.stdout, "reconfigure"):  # what the encoding of the output lacks is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    named = [word for word in words if not word.startswith("-")]
    if {" ".join(named[:1]), " ".join(named[:2])} & set(UNDER_MPI) and not {"-h", "--help"} & set(words):
        from mpillm.comm.world import launch

        launch(_run)
    try:
        raise SystemExit(_run())
    except MpillmError as error:
        sys.stderr.write(f"mpillm: error: {error}\n")
        raise SystemExit(error.exit_code) from None


def _in_a_line(message, category, filename, lineno, line=None, whole=warnings.formatwarning):
    """Format a warning that this package gives as its errors are; others say where they come from."""
    if filename.startswith(os.path.dirname(mpillm.__file__)):
        return f"mpillm: warning: {message}\n"
    return whole(message, category, filename, lineno, line)


def _run():
    """Run click's command; usage errors become mpillm's, so that one rank reports them for all."""
    try:
        return cli.main(standalone_mode=False) or 0
    except click.exceptions.Abort:
        return FAILURE
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        usage = MpillmError(error.format_message())
        usage.exit_code = USAGE
        raise usage from None


"""``mpillm generate``: sample text from a run, written as it comes."""

import os

import click

from mpillm.cli.batch import generate_batch
from mpillm.cli.options import CONTEXT, parse_overrides
from mpillm.data.tokenizers import new_document
from mpillm.errors import OK, ConfigError


@click.command("generate", context_settings=CONTEXT)
@click.argument("path", metavar="RUN", type=click.Path())
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")
@click.option("--prompt", default="", metavar="TEXT", help="text to continue; without it, a new document")
@click.option("--prompts", type=click.Path(), metavar="FILE", help="a file of JSON lines, a prompt each, instead; needs -o")
@click.option("-o", "output", type=click.Path(), metavar="FILE", help="with --prompts: where results go, a line each")
@click.option("--data", type=click.IntRange(1), metavar="D", help="copies of the model; by default one a rank")
@click.option("--tokens", "count", default=200, show_default=True, type=click.IntRange(min=0),
              help="how many tokens to add at most")
@click.option("--temperature", default=1.0, show_default=True, help="0 always takes the likeliest token")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**64 - 1), help="of the random choices")
def command(path, rest, prompt, prompts, output, data, count, temperature, seed):
    """Continue a text with the newest weights of RUN; under mpirun or srun on all ranks.

    The ranks share the heads (--layout.tensor) or the layers (--layout.pipeline), whatever the layout of training.
    --train.dtype and --train.numerics override the run's.

    With --prompts many prompts are continued. SIGUSR1 or SIGTERM to any rank ends that with exit code 85: the same command goes
    on from there, also on other ranks.
    """
    overrides = parse_overrides(rest) | ({} if data is None else {"layout.data": data})
    if (prompts is None) != (output is None):
        raise ConfigError("--prompts FILE and -o FILE: give both, or a single --prompt")
    if prompts is not None:
        if prompt:
            raise ConfigError("--prompt and --prompts: give one of them")
        return generate_batch(path, prompts, output, overrides, count, temperature, seed)
    from mpillm.inference.engine import Engine
    from mpillm.inference.requests import Request, Sampling
    from mpillm.inference.text import Text

    sampling = Sampling(temperature=temperature, seed=seed)
    engine = Engine(path, overrides={"layout.data": 1, **overrides})
    request = Request("", _encode(engine.tokenizer, prompt), count, sampling)
    text = Text(engine.tokenizer) if engine.mesh.world.rank == 0 else None
    if text:
        _write(text.add(*request.prompt))
    result, = engine.generate([request], text and (lambda token: _write(text.add(token))))
    if text:
        _write(text.rest() + "\n")
        limit = engine.config.model.max_seq_len
        if len(result.tokens) < count and len(request.prompt) + len(result.tokens) == limit:
            click.echo(f"mpillm generate: stopped at model.max_seq_len = {limit} tokens", err=True)
        if engine.caveat:
            click.echo(f"mpillm generate: {engine.caveat}", err=True)
    engine.free()
    return OK


def _write(text):
    click.echo(text, nl=False)


def _encode(tokenizer, prompt):
    """Return the tokens of a prompt; the command line may bring bytes that are no UTF-8."""
    try:
        return [int(token) for token in tokenizer.encode(os.fsencode(prompt))] or new_document(tokenizer)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt: not UTF-8 ({error}), and the tokenizer of the run takes nothing else") from None

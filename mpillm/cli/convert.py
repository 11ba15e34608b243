"""``mpillm convert``: Hugging Face Llama weights out of a run, or into a new one."""

import click

from mpillm.errors import ConfigError


@click.command("convert")
@click.argument("run", type=click.Path())
@click.option("--to-hf", "target", metavar="DIR",
              help="write the newest weights of RUN for LlamaForCausalLM of transformers")
@click.option("--from-hf", "source", metavar="DIR",
              help="make RUN from a folder with config.json and safetensors files")
def command(run, target, source):
    """Take weights out of RUN, or make RUN of weights from elsewhere."""
    if (target is None) == (source is None):
        raise ConfigError(f"convert {run}: give either --to-hf DIR or --from-hf DIR")
    from mpillm import hf

    if target is not None:
        hf.to_hf(run, target)
        click.echo(f"{target}: the newest weights of {run}, for transformers.LlamaForCausalLM")
    else:
        hf.from_hf(run, source)
        click.echo(f"{run}: a run with the weights of {source}, for generate and train.init_from")

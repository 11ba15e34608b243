"""``mpillm convert``: Hugging Face weights out of a run, or into a new one."""

import click

from mpillm.errors import ConfigError


@click.command("convert")
@click.argument("run", type=click.Path())
@click.option("--to-hf", "target", metavar="DIR", help="write the newest weights of RUN for transformers")
@click.option("--family", metavar="NAME",
              help="with --to-hf, whose names to write: llama, gpt2, ...; left out, the first that computes the same")
@click.option("--from-hf", "folder", metavar="DIR",
              help="make RUN from a folder with config.json and safetensors files")
@click.option("--from-gguf", "file", metavar="FILE",
              help="make RUN from a GGUF file of llama.cpp, its weights dequantised")
def command(run, target, family, folder, file):
    """Take weights out of RUN, or make RUN of weights from elsewhere."""
    if sum(place is not None for place in (target, folder, file)) != 1:
        raise ConfigError(f"convert {run}: give either --to-hf DIR, --from-hf DIR or --from-gguf FILE")
    if family is not None and target is None:
        raise ConfigError(f"convert {run}: --family {family}: what comes in says its family itself: leave it out")
    from mpillm import hf

    if target is not None:
        used = hf.to_hf(run, target, family)
        click.echo(f"{target}: the newest weights of {run}, for transformers.{used.architectures[0]}")
    else:
        used = hf.from_hf(run, folder) if folder is not None else hf.from_gguf(run, file)
        click.echo(f"{run}: a run with the {used.model_type} weights of {folder or file}, for generate and train.init_from")

"""A peer to measure against: the class of ``transformers`` that computes the same model, trained in plain PyTorch.

    python -m mpillm.bench.transformers_peer ATTENTION CONFIG.toml

One process with all cores as threads does what mpillm does with the configuration: the same initial weights, samples and
learning rates. ATTENTION is ``eager`` or ``sdpa``. Prints one line of JSON: ``step_s``, the median over all steps but the
first, and ``loss`` and ``grad_norm`` of the first.
"""

import statistics
import sys
import time

import torch
from torch.nn import functional

from mpillm.bench.peer import clip, make_optimizer
from mpillm.comm.limits import usable_cores
from mpillm.config import Config
from mpillm.data.labelled import NOT_COUNTED
from mpillm.data.samples import training_order
from mpillm.data.sources import open_source
from mpillm.errors import ConfigError
from mpillm.files import to_json
from mpillm.hf.tensors import tensors_of
from mpillm.hf.writing import NO_TOKENS, family_of
from mpillm.model.parameters import initial_values
from mpillm.train.learning_rate import learning_rate

ATTENTIONS = ("eager", "sdpa")


def library():
    """Import ``transformers``, which is optional.

    Raises
    ------
    ConfigError
        If it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"--transformers needs the transformers package ({error}): pip install transformers") from error
    return transformers


def family_for(model):
    """Return the family of a model.

    Raises
    ------
    ConfigError
        If it belongs to none.
    """
    return family_of(model, asked="--transformers", remedy="leave out --transformers")


def make_model(model, seed, attention):
    """Return the class's model with mpillm's initial weights. Local.

    What mpillm adds to another parameter stays zero, and nothing is dropped out.
    """
    family = family_for(model)
    kind = getattr(library(), family.architectures[0])
    weights = {name: torch.zeros(2, model.hidden_size) for name in family.added.values()}
    for name, tensor in tensors_of(family, model).items():
        parts = [torch.from_numpy(initial_values(part, seed, 0, part.size)).view(part.shape) for part in tensor.parts]
        weights[name] = tensor.joined(parts).float()
    config = kind.config_class(**family.config(model), **NO_TOKENS, attn_implementation=attention)
    made = kind.from_pretrained(None, config=config, state_dict=weights).eval()
    for name in family.added.values():
        made.get_parameter(name).requires_grad_(False)
    return made


def backward(made, samples, microbatch, counted):
    """Leave the gradient of a batch in the parameters; return its mean loss over the targets that are ``counted``."""
    total = 0.0
    for inputs, targets in zip(*(torch.as_tensor(part).split(microbatch) for part in (samples.inputs, samples.targets))):
        logits = made(inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_COUNTED, reduction="sum")
        (loss / counted).backward()
        total += loss.item() / counted
    return total


def train(config, attention):
    """Train as the configuration says; return the line to print. Local."""
    torch.set_num_threads(usable_cores())
    settings, source = config.train, open_source(config, "train")
    made = make_model(config.model, settings.seed, attention)
    optimizer = make_optimizer("single", made, settings)
    lines = []
    for step in range(settings.steps):
        begin = time.perf_counter()
        numbers = range(step * settings.global_batch, (step + 1) * settings.global_batch)
        order = training_order(source.num_samples, settings.seed, numbers.start, len(numbers))
        loss = backward(made, source.read(order, numbers), settings.microbatch, source.counted(order))
        norm = clip("single", made, settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step + 1)
        optimizer.step()
        optimizer.zero_grad()
        lines.append((time.perf_counter() - begin, loss, norm))
    times_s, losses, norms = zip(*lines)
    return {"step_s": statistics.median(times_s[1:]), "loss": losses[0], "grad_norm": norms[0]}


if __name__ == "__main__":
    print(to_json(train(Config.load(sys.argv[2]), sys.argv[1])))

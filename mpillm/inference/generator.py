"""Sampling: tokens out of a run's weights, one at a time, at any layout of pipeline and tensor ranks.

Each rank reads its own ranges of the weights and keeps the keys and values of its own heads. Activations go down the
pipeline; one rank of the last stage chooses the token and tells all others.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mpillm.checkpoint.reading import Checkpoint
from mpillm.comm import collectives
from mpillm.comm.devices import pick_device
from mpillm.comm.group import as_group
from mpillm.comm.mesh import Mesh
from mpillm.comm.p2p import FORWARD, irecv, isend, tag_of
from mpillm.comm.world import comm_world, set_threads
from mpillm.config import Config, Layout
from mpillm.data.tokenizers import load_tokenizer, new_document
from mpillm.errors import CheckpointError, ConfigError, agreed, half_made
from mpillm.nn.attention import KeyValueCache
from mpillm.nn.positions import Batch, rotary_tables, visible
from mpillm.nn.products import WAYS, fast_product, plain
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import TransformerStage
from mpillm.train.selftest import choose_way

OVERRIDES = ("layout.data", "layout.order", "layout.pipeline", "layout.stage_cuts", "layout.tensor", "train.device",
             "train.dtype", "train.exact_blocks", "train.numerics")


class Generator:
    """The newest weights of a run, ready to continue rows of tokens.

    Collective over ``comm``, as are all methods.

    Parameters
    ----------
    path : str or Path
        A run directory.
    comm : Comm, optional
        Defaults to the world.
    overrides : dict, optional
        Values for keys of :data:`OVERRIDES`. The layout of the run plays no part: without overrides as many tensor
        ranks as there are heads to share, and pipeline ranks for what is left.

    Raises
    ------
    MpillmError
        On every rank, if the run has no checkpoint, configuration or tokenizer that can be read, or the layout does
        not fit.

    Examples
    --------
    >>> generator = Generator("run")
    >>> tokens = list(generator.tokens(generator.tokenizer.encode("def "), 20, temperature=0.8))
    >>> print(generator.tokenizer.decode(tokens).decode())
    """

    def __init__(self, path, comm=None, overrides=None):
        comm = as_group(comm_world() if comm is None else comm).comm
        with agreed(comm, f"open {path}"):
            source, self.config, self.tokenizer = _open(Path(path), overrides or {}, comm.size)
        model, train, layout = self.config.model, self.config.train, self.config.layout
        is_exact = train.numerics == "exact"
        torch.set_num_threads(1 if is_exact else set_threads(comm))
        self.mesh = Mesh(comm, **layout.sizes(), order=layout.order, sums="tree" if is_exact else "any")
        with half_made(comm) as made:
            made.callback(self.mesh.free)
            device = pick_device(train.device, comm)
            dtype = getattr(torch, train.dtype)
            multiply = (WAYS[choose_way(self.config, comm, rows=(1, train.seq_len))] if is_exact
                        else fast_product(comm, device, dtype))
            split = TensorSplit(self.mesh.group("tensor"), blocks=train.exact_blocks if is_exact else None, dtype=dtype,
                                device=device, multiply=multiply if device.type == "cpu" else plain)
            place, cuts = self.mesh.coord("pipeline"), [0, *layout.stage_cuts, model.num_layers]
            self.stage = TransformerStage(model, split, cuts[place], cuts[place + 1])
            if model.tie_embeddings and layout.pipeline == 1:
                self.stage.head.linear.weight = self.stage.embedding.words.weight
            with agreed(comm, f"read {source.path}"):
                load_weights(self.stage, source)
        chooses = self.stage.is_last and self.mesh.coord("tensor") == 0
        self._is_chooser, self._chooser = chooses, comm.allgather(chooses).index(True)

    def tokens(self, prompt, count, temperature=1.0, seed=0):
        """Yield up to ``count`` tokens that continue ``prompt``; the same on all ranks.

        Stops before a token of ``tokenizer.ends``, and when prompt and tokens together reach ``model.max_seq_len``.
        Equal logits give equal tokens on every layout: the token at position ``i`` is drawn with the random number
        ``(seed, i)``.

        Parameters
        ----------
        prompt : sequence of int
            Taken as it is; ``tokenizer.encode`` begins it as the tokenizer begins a text. If empty, a new document.
        count : int
        temperature : float
            Divides the logits; 0 always takes the likeliest token.
        seed : int

        Raises
        ------
        ConfigError
            On every rank, before any message, if the prompt is too long or no row of the model's tokens, or the
            temperature no number from 0 on.
        CheckpointError
            On every rank, if the weights give logits that are not finite.
        """
        fresh = [int(token) for token in prompt] or new_document(self.tokenizer)
        self._check(fresh, temperature)
        ends = {self.tokenizer.end, *self.tokenizer.ends}
        start, cache, known = 0, KeyValueCache(), self.tokenizer.vocab_size  # rows beyond are padding, and mean nothing
        for _ in range(min(count, self.config.model.max_seq_len - len(fresh))):
            logits = self.next_logits(fresh, start, cache)
            start += len(fresh)
            token = self._agreed(choose(logits[:known], temperature, seed, start) if self._is_chooser else 0)
            if token in ends:
                return
            yield token
            fresh = [token]

    @torch.no_grad()
    def next_logits(self, tokens, start, cache):
        """Return the logits ``[V]`` (numpy, float64) of what follows ``tokens``, which stand at position ``start`` on.

        ``tokens`` is a row of integers of any kind.
        ``cache`` holds the keys and values of all earlier positions and is extended. Ranks of the last stage get the
        logits, others ``None``.
        """
        stage, model, pipeline = self.stage, self.config.model, self.mesh.group("pipeline")
        weight, stop = next(stage.parameters()), start + len(tokens)
        tables = rotary_tables(model, range(start, stop), weight.dtype, weight.device)
        batch = Batch(1, len(tokens), *tables, visible(model, start, stop, weight.device), cache, start)
        if stage.is_first:
            x = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(weight.device)
        else:
            shape = (len(tokens), model.hidden_size)
            x = irecv(shape, weight, pipeline, pipeline.rank - 1, tag_of(FORWARD)).wait()
        x = stage(x, batch)
        if not stage.is_last:
            isend(x, pipeline, pipeline.rank + 1, tag_of(FORWARD)).wait()
            return None
        return stage.logits(x[-1:], replace(batch, positions=1))[0].double().cpu().numpy()

    def free(self):
        """Release the communicators. Once is enough."""
        self.mesh.free()

    def _agreed(self, token):
        """Return the chooser's token on every rank."""
        token = int(collectives.bcast(torch.tensor([token]), self.mesh.world, self._chooser))
        if token < 0:
            raise CheckpointError("generation: the weights give logits that are not finite: take an earlier checkpoint")
        return token

    def _check(self, prompt, temperature):
        model = self.config.model
        if len(prompt) > model.max_seq_len:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, the model takes model.max_seq_len = {model.max_seq_len}: "
                "give a shorter one"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ConfigError(
                f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{model.vocab_size - 1}: the tokenizer of the run is not the model's"
            )
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature {temperature}: must be at least 0 and finite")


def choose(logits, temperature, seed, position):
    """Return the token to stand at ``position``, or -1 if some of ``logits`` (numpy, float64) are not finite.

    Local, in one thread: equal logits give the same token everywhere. The random number comes from a counter-based
    generator (Philox, Salmon et al. 2011) keyed by ``seed`` and started at ``position``.
    """
    if not np.isfinite(logits).all():
        return -1
    if temperature == 0:
        return int(logits.argmax())
    sums = np.exp((logits - logits.max()) / temperature).cumsum()
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))


def load_weights(module, source):
    """Fill the sharded parameters of ``module`` with their ranges of a checkpoint. Local."""
    with torch.no_grad():
        for parameter in module.parameters():
            shard = parameter.shard
            values = source.read(shard.name, "weight", shard.start, shard.stop, shard.shape)
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def _open(path, overrides, ranks):
    """Return the newest checkpoint of a run, its configuration laid out for ``ranks`` ranks, and its tokenizer."""
    source = Checkpoint(path)
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise ConfigError(f"--{unknown[0]}: generation takes only --{', --'.join(OVERRIDES)}")
    model = source.model()
    if model.head != "words":
        raise ConfigError(f"{path}: model.head = {model.head}: generation needs head words, which says the next token: name "
                          "a run that has it")
    config = replace(Config.load(path / "config.toml"), model=model, layout=Layout(data=1))
    config = config.with_values({**overrides, "train.microbatch": 1})  # one row of tokens
    layout, train = config.layout, config.train
    if layout.data != 1:
        raise ConfigError(
            f"layout.data = {layout.data}: generation continues one row of tokens, which data ranks cannot share: "
            "use layout.tensor and layout.pipeline"
        )
    if layout.tensor == "auto":
        left = max(1, ranks // (1 if layout.pipeline == "auto" else layout.pipeline))
        fitting = [t for t in range(1, min(left, model.num_heads) + 1)
                   if left % t == 0 and (train.numerics == "fast" or train.exact_blocks % t == 0)]
        config = replace(config, layout=replace(layout, tensor=fitting[-1]))
    return source, config.resolve(ranks), load_tokenizer(path, model.vocab_size)

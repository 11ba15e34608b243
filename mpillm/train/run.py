"""A run: an engine with its data, metrics, checkpoints and folder."""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

from mpillm.comm.scheduled import nodes_of
from mpillm.comm.world import comm_world, set_threads
from mpillm.errors import CheckpointError, ConfigError, DataError, together
from mpillm.plan import Plan
from mpillm.train import checkpoint
from mpillm.train.data import TokenFile, file_digest, training_order
from mpillm.train.engine import Engine
from mpillm.train.optimizers import learning_rate
from mpillm.train.selftest import check_exact
from mpillm.train.text import copy_tokenizer


class Run:
    """Train a model as a configuration says, in a run directory that can be taken up again at any layout.

    Collective over ``comm``, as are all methods. Iterate to train to the last step, evaluating and saving on the way.

    Parameters
    ----------
    config : Config
    comm : Comm, optional
        Defaults to the world.
    resume : str
        ``"auto"`` goes on from the newest complete checkpoint of the run directory, if there is one; ``"never"``
        demands an unused one; else the path of a checkpoint or run.
    plan : Plan, optional
        What to obey; made for this number of ranks and nodes.
    stop : StopRequest, optional
        Asked before every step and between batches of an evaluation. Once a rank has been told to stop, all save a
        checkpoint and the iteration ends; :attr:`stopped_by` then names the signal.

    Raises
    ------
    MpillmError
        On every rank, when the configuration cannot run, the data do not fit, or a rank fails to read or write.

    Examples
    --------
    >>> run = mpillm.Run(mpillm.Config.load("tiny.toml"))
    >>> for metrics in run:
    ...     print(metrics["step"], metrics["loss"])
    """

    def __init__(self, config, comm=None, resume="auto", plan=None, stop=None):
        self.comm = comm_world() if comm is None else comm
        num_nodes = len(set(nodes_of(self.comm)))
        self.plan = Plan(self.comm.size, num_nodes) if plan is None else plan
        self.plan.check(self.comm.size, num_nodes)
        config = self.plan.applied_to(config).resolve(self.comm.size)
        self.config = together(self.comm, lambda: self._open_data(config), "data")
        self.plan.applied_to(self.config)  # once more: a vocabulary may have come from the data
        self.folder = Path(config.train.run_dir)
        start = together(self.comm, lambda: self._find_start(resume), "resume")
        self._on_rank_0(lambda: (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True))
        self.threads = set_threads(self.comm)
        if self.config.train.numerics == "exact":
            together(self.comm, lambda: check_exact(self.config), "self-test of train.numerics = exact")
        trace = self.folder / "trace" if self.config.train.trace else None
        self.engine = Engine(self.config, self.comm, trace, self.plan.table)
        self.step_number, self.samples_seen, self.saved_step = 0, 0, 0
        self.stop, self.stopped_by = stop, None
        self._restore(start)
        self._on_rank_0(self._describe)
        self._metrics_file = self._open_metrics() if self.comm.rank == 0 else None

    def __iter__(self):
        train = self.config.train
        while self.step_number < train.steps and not self._must_stop():
            metrics = self.step()
            is_last = self.step_number == train.steps
            if train.eval_every and (is_last or self.step_number % train.eval_every == 0):
                metrics.update(self.evaluate())
            if is_last or (train.checkpoint_every and self.step_number % train.checkpoint_every == 0):
                self.save()
            self._record(metrics)
            yield metrics
        if self.stopped_by and self.saved_step < self.step_number:
            self.save()

    def step(self):
        """Train one step; return its metrics as a dict, equal on all ranks but for times."""
        train, begin = self.config.train, time.perf_counter()
        self.engine.trace.step = self.step_number + 1
        order = training_order(self.train_tokens.num_samples, train.seed, self.samples_seen, train.global_batch)
        lr = learning_rate(train, self.step_number + 1)
        loss, norm = self.engine.train_step(self._reader(self.train_tokens, order), lr)
        self.step_number += 1
        self.samples_seen += train.global_batch
        step_s = time.perf_counter() - begin
        self.engine.trace.end_step()
        tokens = train.global_batch * train.seq_len
        return {"step": self.step_number, "loss": loss, "grad_norm": norm, "lr": lr,
                "tokens": self.step_number * tokens, "step_s": step_s, "tokens_per_s": tokens / step_s}

    def evaluate(self):
        """Return ``validation_loss`` (nats a token) and ``bits_per_byte`` over the configured validation samples.

        Returns nothing if told to stop before the end.
        """
        train, tokens = self.config.train, self.validation_tokens
        count = min(tokens.num_samples, train.eval_batches * train.global_batch or tokens.num_samples)
        total = 0.0
        with self.engine.trace.span("evaluate", "validation"):
            for first in range(0, count, train.global_batch):
                if self._must_stop():
                    return {}
                order = list(range(first, min(first + train.global_batch, count)))
                total += self.engine.loss(self._reader(tokens, order), len(order))
        loss = total / (count * train.seq_len)
        return {"validation_loss": loss, "bits_per_byte": loss / math.log(2) * len(tokens.tokens) / tokens.bytes}

    def _must_stop(self):
        """Return whether to stop; collective, and only asked until the answer is yes."""
        if self.stop and not self.stopped_by:
            self.stopped_by = self.stop.agreed(self.comm)
        return self.stopped_by is not None

    def save(self):
        """Write a checkpoint of this step; return its path."""
        with self.engine.trace.span("save", "checkpoint"):
            shards = [(piece.name, piece.shape, piece.start, tensors)
                      for piece, tensors in self.engine.optimizer.state() if piece.is_counted]
            manifest = {"model": asdict(self.config.model), "optimizer": self.config.train.optimizer,
                        "data": {"sha256": self.data_digest, "samples_seen": self.samples_seen},
                        "seed": self.config.train.seed}
            path = checkpoint.save(self.folder / "checkpoints", self.step_number, shards, manifest, self.comm,
                                   self.config.train.checkpoint_keep)
        self.saved_step = self.step_number
        return path

    def free(self):
        """Release communicators and files."""
        self.engine.free()
        if self._metrics_file:
            self._metrics_file.close()

    def _open_data(self, config):
        """Open both splits and set what the data decide; local, the same on every rank."""
        train, path = config.train, config.data.path
        self.train_tokens = TokenFile(path, "train", train.seq_len, config.model.vocab_size)
        self.validation_tokens = TokenFile(path, "validation", train.seq_len) if train.eval_every else None
        vocab_size = config.model.vocab_size or self.train_tokens.vocab_size
        return replace(config, model=replace(config.model, vocab_size=vocab_size))

    def _reader(self, tokens, order):
        """Return the function that gives the engine ranges of the samples ``order``."""

        def samples(start, stop):
            indices = order[start:stop]
            documents = tokens.documents_of(indices) if self.config.data.mask_documents else None
            return *tokens.samples(indices), documents

        return samples

    def _find_start(self, resume):
        """Return the checkpoint to go on from, or None."""
        folder = self.folder / "checkpoints"
        if resume not in ("auto", "never"):
            return checkpoint.Checkpoint(resume)
        if resume == "never" and (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"--resume never: {self.folder} holds a run already: choose another train.run_dir, or --resume auto"
            )
        found = checkpoint.complete_checkpoints(folder) if folder.is_dir() else []
        return checkpoint.Checkpoint(found[-1]) if found else None

    def _restore(self, start):
        """Load ``start``, or the weights of ``init_from``, into the engine."""
        self.data_digest = self.comm.bcast(file_digest(self.config.data.path) if self.comm.rank == 0 else None)
        if start is not None:
            together(self.comm, lambda: self._load(start), f"resume from {start.path}")
        elif self.config.train.init_from:
            together(self.comm, self._load_weights, f"train.init_from = {self.config.train.init_from}")
        else:
            return
        self.engine.publish()

    def _load(self, start):
        """Take up weights, optimiser state, step and data cursor of a checkpoint of the same model and data."""
        self._check_model(start)
        saved, train = start.manifest, self.config.train
        if saved["optimizer"] != train.optimizer:
            raise CheckpointError(
                f"checkpoint {start.path}: holds the state of {saved['optimizer']}, this run asks for "
                f"train.optimizer = {train.optimizer}: change it, or start anew with train.init_from"
            )
        if saved["data"]["sha256"] != self.data_digest:
            raise DataError(
                f"data.path = {self.config.data.path}: not the tokens that checkpoint {start.path} was trained on "
                "(their SHA-256 differ): give the same file, or start anew with train.init_from"
            )
        if saved["seed"] != train.seed:
            raise CheckpointError(
                f"checkpoint {start.path}: of train.seed = {saved['seed']}, this run has {train.seed}: set it back"
            )
        self.engine.optimizer.restore(
            lambda kind, piece: start.read(piece.name, kind, piece.start, piece.stop), start.step)
        self.step_number, self.samples_seen = start.step, saved["data"]["samples_seen"]
        self.saved_step = start.step

    def _load_weights(self):
        source = checkpoint.Checkpoint(self.config.train.init_from)
        self._check_model(source)
        self.engine.optimizer.restore_weights(
            lambda kind, piece: source.read(piece.name, kind, piece.start, piece.stop))

    def _check_model(self, source):
        saved, wanted = source.manifest["model"], asdict(self.config.model)
        differing = [f"{key} = {saved.get(key)} (this run: {value})" for key, value in wanted.items()
                     if saved.get(key) != value]
        if differing:
            raise CheckpointError(
                f"checkpoint {source.path}: of another model: {', '.join(differing)}: use the configuration "
                "of that run, or another train.run_dir"
            )

    def _describe(self):
        """Write what describes the run, once it is sure to start."""
        (self.folder / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
        self.plan.save(self.folder / "plan.json")
        copy_tokenizer(self.config.data.path, self.folder)

    def _on_rank_0(self, work):
        """Write to the run directory on rank 0; all ranks learn whether it failed."""
        together(self.comm, work if self.comm.rank == 0 else lambda: None, f"train.run_dir = {self.folder}")

    def _open_metrics(self):
        """Open the metrics for appending, without the lines of steps that will be done again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step_number]
        path.write_text("".join(kept), encoding="utf-8")
        return open(path, "a", encoding="utf-8")

    def _record(self, metrics):
        if self._metrics_file:
            self._metrics_file.write(json.dumps(metrics) + "\n")
            self._metrics_file.flush()

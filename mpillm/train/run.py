"""A run: an engine with its data, metrics, checkpoints and folder."""

import math
import shutil
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mpillm.checkpoint import saving
from mpillm.checkpoint.start import check_same, find_start, give_up_from, newest, order_of
from mpillm.comm.group import as_group
from mpillm.comm.scheduled import nodes_of
from mpillm.comm.world import comm_world, set_threads
from mpillm.config import AXES
from mpillm.data.samples import ORDER, training_order
from mpillm.data.sources import open_source, with_sizes
from mpillm.data.tokenizers import copy_tokenizer
from mpillm.data.tokens import fingerprint, has_rows
from mpillm.errors import CheckpointError, NumbersError, agreed, half_made, on_rank_0
from mpillm.files import write_text
from mpillm.guard.stragglers import Stragglers
from mpillm.guard.watchdog import Watchdog
from mpillm.nn.scores import figures
from mpillm.plan import Plan
from mpillm.train.engine import Engine
from mpillm.train.initial_weights import load_initial_weights
from mpillm.train.learning_rate import learning_rate
from mpillm.train.metrics_file import Metrics


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

    Attributes
    ----------
    config : Config
        Resolved: nothing is ``"auto"`` any more.
    plan : Plan
    comm : Comm
    folder : Path
        The run directory.
    threads : int
        Of this rank.
    engine : mpillm.train.engine.Engine
        Holds this rank's part of the model; its ``mesh`` has the groups of ranks.
    step_number, saved_step, samples_seen, skipped : int
        The last step trained and the last announced checkpoint; samples trained on; steps that changed nothing.
    stopped_by : str or None
        The signal on which iteration ended.

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
        self.comm = as_group(comm_world() if comm is None else comm).comm
        num_nodes = len(set(nodes_of(self.comm)))
        self.plan = Plan(self.comm.size, num_nodes) if plan is None else plan
        self.plan.check(self.comm.size, num_nodes)
        config = self.plan.applied_to(config).resolve(self.comm.size, num_nodes)
        with agreed(self.comm, "data"):
            self.config = with_sizes(config).resolve(self.comm.size, num_nodes)  # stages weigh the vocabulary
            self.train_source, self.validation_source = _open_splits(self.config, self.comm.rank)
        self.fingerprint = on_rank_0(self.comm, "data", fingerprint, config.data.path)
        self.plan.applied_to(self.config)  # once more: a vocabulary may have come from the data
        self.folder = Path(config.train.run_dir)
        start = on_rank_0(self.comm, "resume", find_start, self.folder, resume)  # not all may see the files
        writing = f"train.run_dir = {self.folder} cannot be written, choose another"
        on_rank_0(self.comm, writing, partial((self.folder / "checkpoints").mkdir, parents=True, exist_ok=True))
        self.threads = set_threads(self.comm)
        self.step_number, self.samples_seen, self.sample_order, self.saved_step = 0, 0, ORDER, 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.stop, self.stopped_by = stop, None
        self.watchdog = self._saving = self._metrics = None  # metrics are kept by rank 0
        trace = self.folder / "trace" if self.config.train.trace else None
        with half_made(self.comm) as made:
            self.engine = Engine(self.config, self.comm, trace, self.plan.table)
            made.callback(self.free)
            self.watchdog, self.stragglers = self._watch(), Stragglers(self.engine)
            self._restore(start, resume)
            on_rank_0(self.comm, writing, self._open_metrics)
            on_rank_0(self.comm, writing, self._describe)

    def __iter__(self):
        train = self.config.train
        self._finish_evaluation()
        while self.step_number < train.steps and not self._must_stop():
            metrics = self.step()
            if self._saving and self._saving.is_written():
                self.finish_save()
            is_last = self.step_number == train.steps
            if self._evaluates_now():
                metrics.update(self.evaluate())
            if self._metrics:
                self._metrics.add(metrics)  # before a checkpoint says that the step is done
            if is_last or (train.checkpoint_every and self.step_number % train.checkpoint_every == 0):
                self.save()
            yield metrics
        self.finish_save()
        if self.stopped_by and self.saved_step < self.step_number:
            self.save()
            self.finish_save()

    def step(self):
        """Train one step; return its metrics as a dict, equal on all ranks but for times.

        A step whose loss or gradient is not finite changes nothing but the place in the data.

        Raises
        ------
        NumbersError
            On every rank, after ``train.skip_limit`` such steps in a row.
        """
        try:
            return self._step()
        except BaseException:
            self.engine.mesh.recorder.end_step()  # who catches it is at work of its own, which the watchdog leaves alone
            raise

    def _step(self):
        train, begin = self.config.train, time.perf_counter()
        self.engine.trace.begin_step(self.step_number + 1)
        source, numbers = self.train_source, range(self.samples_seen, self.samples_seen + train.global_batch)
        order = training_order(source.num_samples, train.seed, self.samples_seen, train.global_batch, self.sample_order)
        lr = learning_rate(train, self.step_number + 1)
        before_update = self._saving.wait_copied if self._saving else None
        loss, norm = self.engine.train_step(self._reader(source, order, numbers), lr, before_update, source.counted(order))
        self.step_number += 1
        self.samples_seen += train.global_batch
        step_s = time.perf_counter() - begin
        self.stragglers.end_step()  # within the step, where the watchdog sees that a rank does not come
        self.engine.trace.end_step()
        self._count_skips(loss, norm)
        tokens = train.global_batch * train.seq_len
        return {"step": self.step_number, "loss": loss, "grad_norm": norm, "lr": lr,
                "tokens": self.samples_seen * train.seq_len, "step_s": step_s, "tokens_per_s": tokens / step_s}

    def _count_skips(self, loss, norm):
        """Count steps that changed nothing; all ranks come to the same decision."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        found = f"step {self.step_number}: loss {loss}, gradient norm {norm}"
        if self.skipped_in_a_row >= self.config.train.skip_limit:
            self._give_up(found)
        if self.comm.rank == 0:
            warnings.warn(f"{found}: not finite, the update is left out", stacklevel=3)

    def _give_up(self, found):
        """End, with the checkpoints set aside whose weights give no finite numbers."""
        self.finish_save()
        updated = self.step_number - self.skipped_in_a_row  # since then the weights are the same
        what_next = on_rank_0(self.comm, found, give_up_from, self.folder / "checkpoints", updated)
        raise NumbersError(
            f"{found}: not finite for {self.skipped_in_a_row} steps in a row (train.skip_limit); none of them changed "
            f"the weights, which are those of step {updated}; {what_next}"
        )

    def evaluate(self):
        """Return ``validation_loss`` (nats a target) over the configured validation samples, and what the head's field reports:
        ``bits_per_byte`` of a text, or :func:`mpillm.nn.scores.figures`.

        Returns nothing if told to stop before the end.
        """
        if self.validation_source is None:  # a run that never evaluates by itself needs none
            with agreed(self.comm, "data"):
                self.validation_source = open_source(self.config, "validation")
        train, source = self.config.train, self.validation_source
        count = min(source.num_samples, train.eval_batches * train.global_batch or source.num_samples)
        total, counted, scores = 0.0, 0, None
        with self.engine.trace.span("evaluate", "validation"):
            for first in range(0, count, train.global_batch):
                if self._must_stop():
                    return {}
                order = list(range(first, min(first + train.global_batch, count)))
                loss, found = self.engine.loss(self._reader(source, order, order), len(order))
                total, counted = total + loss, counted + source.counted(order)
                scores = found if scores is None else scores + found
        loss, head = total / counted, self.config.model.head
        if head == "words" and source.tokens.bytes:
            return {"validation_loss": loss,
                    "bits_per_byte": loss / math.log(2) * len(source.tokens.tokens) / source.tokens.bytes}
        return {"validation_loss": loss} | ({} if scores is None else figures(head, scores))

    def _evaluates_now(self):
        every = self.config.train.eval_every
        return every and self.validation_source and (
            self.step_number == self.config.train.steps or self.step_number % every == 0)

    def _finish_evaluation(self):
        """Make up for the evaluation that the run was stopped in, before it goes on; collective."""
        if self.step_number and self._evaluates_now():
            last = self.comm.bcast(self._metrics and self._metrics.last)
            is_lacking = last.get("step") == self.step_number and "validation_loss" not in last
            found = self.evaluate() if is_lacking else {}
            if found and self._metrics:
                self._metrics.add({**last, **found}, instead_of_last=True)

    def _must_stop(self):
        """Return whether to stop; collective, and only asked until the answer is yes."""
        if self.stop and not self.stopped_by:
            recorder = self.engine.mesh.recorder
            recorder.begin("agree", "to go on")
            try:
                self.stopped_by = self.stop.agreed(self.comm)
            finally:
                recorder.end("agree")
        return self.stopped_by is not None

    def save(self):
        """Write a checkpoint of this step; return its path.

        With ``train.checkpoint_background`` what is held is copied beside the next step, up to its update, and written
        while training goes on; the checkpoint is there once :meth:`finish_save` has been called, as the iteration does.
        """
        self.finish_save()
        self.engine.digests.check()
        with self.engine.trace.span("save", "checkpoint"):
            shards = [(piece.name, piece.shape, piece.start, tensors)
                      for piece, tensors in self.engine.optimizer.state() if piece.is_counted]
            manifest = {"model": asdict(self.config.model), "optimizer": self.config.train.optimizer,
                        "data": {"fingerprint": self.fingerprint, "order": self.sample_order,
                                 "samples_seen": self.samples_seen,
                                 "seq_len": self.config.train.seq_len},
                        "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
                        "seed": self.config.train.seed, "freeze": list(self.config.train.freeze)}
            # The one before is known to train, this one is not; and where numbers are not finite, none is to go.
            keep = None if self.skipped_in_a_row else max(2, self.config.train.checkpoint_keep)
            self._saving = saving.Saving(self.folder / "checkpoints", self.step_number, shards, manifest, self.comm,
                                         keep, self.config.train.checkpoint_background)
        if not self.config.train.checkpoint_background:
            self.finish_save()
        return self.folder / "checkpoints" / f"step-{self.step_number:08d}"

    def finish_save(self):
        """Wait for what is being written, and announce it. Where that fails it is given up."""
        under_way, self._saving = self._saving, None
        if under_way:
            with self.engine.trace.span("save", "announce"):
                under_way.finish()
            self.saved_step = under_way.step

    def free(self):
        """Finish what is being saved; release communicators and files. Once is enough."""
        self.finish_save()
        if self.watchdog:
            self.watchdog.stop()
        self.engine.free()
        if self._metrics:
            self._metrics.close()

    def _reader(self, source, order, numbers):
        """Return the function that gives the engine ranges of the samples ``order``, of these numbers."""
        return lambda start, stop: source.read(order[start:stop], numbers[start:stop], self.engine.reads_tokens)

    def _restore(self, start, resume):
        """Load ``start``, or the weights of ``init_from``, into the engine."""
        if start is not None:
            with self.engine.trace.span("load", "checkpoint"):
                self._load_or_older(start, resume)
            if resume == "auto":  # what is newer was refused, and is not to count as one that is kept
                on_rank_0(self.comm, "resume", saving.set_aside, self.folder / "checkpoints", self.step_number + 1)
        elif self.config.train.init_from:
            load_initial_weights(self.engine, self.config.train.init_from, self.comm)
        else:
            return
        self.engine.distribute_weights()

    def _load_or_older(self, start, resume):
        """Load ``start``; where it is damaged and nobody asked for it by name, the newest that is not."""
        action, damage = f"resume from {start.path}", None
        on_rank_0(self.comm, action, check_same, start, self.config, self.fingerprint)
        with agreed(self.comm, action):
            try:
                self._load(start)
            except CheckpointError as error:  # any other error says nothing of the checkpoint, and ends the start
                damage = error
        damages = [found for found in self.comm.allgather(damage and str(damage)) if found]
        if not damages:
            return
        older = on_rank_0(self.comm, action, newest, self.folder, start.step) if resume == "auto" else None
        if older is None:
            with agreed(self.comm, action):
                if damage:
                    raise damage
        if self.comm.rank == 0:
            warnings.warn(f"{damages[0]}: going on from {older.path} instead", stacklevel=2)
        self._load_or_older(older, resume)

    def _load(self, start):
        """Take up weights, optimiser state, step and data cursor of a checkpoint."""
        saved = start.manifest
        self.skipped, self.skipped_in_a_row = saved.get("skipped", 0), saved.get("skipped_in_a_row", 0)
        self.engine.optimizer.restore(
            lambda kind, piece: start.read(piece.name, kind, piece.start, piece.stop, piece.shape),
            start.step - self.skipped)
        self.step_number, self.samples_seen = start.step, saved["data"]["samples_seen"]
        self.sample_order = order_of(saved)
        self.saved_step = start.step

    def _watch(self):
        """Return what ends the job if it hangs, or None. Records of an earlier hang are put away first."""
        folder = self.folder / "flight"
        on_rank_0(self.comm, f"remove {folder}", partial(shutil.rmtree, folder, ignore_errors=True))
        if not self.config.train.hang_limit_s or self.comm.size == 1:
            return None
        mesh = self.engine.mesh
        coords = {axis: mesh.coord(axis) for axis in AXES}
        return Watchdog(mesh.recorder, folder, self.comm.rank, self.comm.size, coords, self.config.train.hang_limit_s)

    def _describe(self):
        """Write what describes the run, once it is sure to start."""
        write_text(self.folder / "config.toml", self.config.to_toml())
        self.plan.save(self.folder / "plan.json")
        copy_tokenizer(self.config.data.path, self.folder)

    def _open_metrics(self):
        self._metrics = Metrics(self.folder / "metrics.jsonl", self.step_number)


def _open_splits(config, rank):
    """Return the samples to train on, and those to validate on, or None where there are none or none are asked for.

    Local; rank 0 warns.
    """
    path, to_train = config.data.path, open_source(config, "train")
    if not config.train.eval_every:
        return to_train, None
    if has_rows(path, "validation"):
        return to_train, open_source(config, "validation")
    if rank == 0:
        warnings.warn(f"data.path = {path}: nothing was held out for validation (of texts mpillm data "
                      "--validation-fraction 0.1 does), so nothing is evaluated", stacklevel=3)
    return to_train, None

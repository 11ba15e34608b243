"""The engine: a model, its optimiser and its schedule on this launch's ranks; a batch goes in, an update comes out."""

import math
from dataclasses import replace
from functools import partial

import torch

from mpillm.comm import collectives
from mpillm.comm.devices import pick_device
from mpillm.comm.mesh import Mesh
from mpillm.errors import ConfigError, half_made
from mpillm.guard.digests import Digests
from mpillm.nn.attention import Batch, rotary_tables
from mpillm.nn.init import initialise
from mpillm.nn.products import WAYS
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import TransformerStage
from mpillm.pipeline import Microbatch, PipelineRunner, Stage
from mpillm.plan import DEFAULT_TABLE
from mpillm.report.trace import Trace
from mpillm.schedules.blocks import bounds
from mpillm.schedules.check import check
from mpillm.schedules.pipeline import make_schedule, named_or_read
from mpillm.train.gradients import GradientSync
from mpillm.train.optimizers import ShardedOptimizer
from mpillm.train.selftest import check_exact
from mpillm.train.storage import Bucket, MicrobatchTree, bucket_parts


class Engine:
    """Computes training steps and losses of one configuration on one communicator.

    Collective over ``comm``, as are all methods unless they say that they are local. Reads and writes no files but the
    trace.

    Parameters
    ----------
    config : Config
        Resolved for ``comm.size``, with ``model.vocab_size`` set.
    comm : Comm
    trace_folder : Path, optional
    table : DecisionTable, optional
        Which algorithm each collective takes.

    Raises
    ------
    ConfigError
        On every rank, if the model can only be planned for, ``train.device = "cuda"`` and some rank sees no GPU, or
        ``numerics = "exact"`` and some rank has one, or the kernels of some rank do not keep its promise.
    ScheduleError
        If the pipeline schedule does not pass the checker.
    """

    def __init__(self, config, comm, trace_folder=None, table=DEFAULT_TABLE):
        layout, train = config.layout, config.train
        if config.model.kind != "llama":
            raise ConfigError(f'model.kind = "{config.model.kind}": it can be planned for, not trained; set "llama"')
        self.config, self.is_exact = config, train.numerics == "exact"
        sums = "tree" if self.is_exact else "any"
        self.mesh = Mesh(comm, **layout.sizes(), order=layout.order, sums=sums, table=table, is_checked=train.checked)
        with half_made(self.mesh.world.comm) as made:
            made.callback(self.mesh.free)
            self._make(trace_folder, made)

    def _make(self, trace_folder, made):
        config, train = self.config, self.config.train
        self.device, self.dtype = pick_device(train.device, self.mesh.world.comm), getattr(torch, train.dtype)
        if self.is_exact and any(self.mesh.world.comm.allgather(self.device.type == "cuda")):
            raise ConfigError("train.numerics = exact: kernels of GPUs add in an order that changes from run to run: set "
                              "train.device = cpu, or train.numerics = fast")
        self.way = check_exact(config, self.mesh.world.comm) if self.is_exact else "plain"
        self.trace = Trace(trace_folder, self.mesh)
        made.callback(self.trace.close)
        self.stages = self._make_stages()
        self._make_storage()
        made.callback(self.free)
        self.runner = PipelineRunner(self.stages, self.mesh.group("pipeline"), self.trace, self._microbatch_done,
                                     self.gradients.progress)
        own = config.microbatch_bounds()
        self.microbatches = own[self.mesh.coord("data")]
        self.first_microbatch = sum(map(len, own[:self.mesh.coord("data")]))
        self.num_microbatches = sum(map(len, own))
        self.schedule = self._schedule(len(self.microbatches))
        self._open_handover()

    def train_step(self, samples, lr, before_update=None):
        """Update the weights from one global batch.

        Parameters
        ----------
        samples : callable
            ``samples(start, stop)`` returns inputs, targets (int64 ``[n, seq_len]``) and documents (or None) of
            positions of the batch.
        lr : float
        before_update : callable, optional
            Called before weights and state change.

        Returns
        -------
        (float, float)
            Mean loss over the batch's tokens before the update, and the gradient norm before clipping; on all ranks.
            Where either is not finite, weights and state are as before.

        Raises
        ------
        NumbersError
            On every rank, with ``train.digests``, if weights or state are not what the last update left.
        """
        train = self.config.train
        for bucket in self.all_buckets:
            bucket.grad.zero_()
        self.gradients.begin(len(self.microbatches))
        with self.trace.span("data", "batch"):
            scale = 1.0 / (train.global_batch * train.seq_len)
            work = [self._microbatch(samples(*cut), scale) for cut in self.microbatches]
        if self.is_exact:
            self._trees = {index: MicrobatchTree(buckets, self.num_microbatches, self.first_microbatch,
                                                 self.first_microbatch + len(work))
                           for index, buckets in self.stage_buckets.items()}
        losses = self.runner.run(self.schedule, work)
        with self.trace.span("reduce", "gradients"):
            if self.is_exact:
                for tree in self._trees.values():
                    tree.finish()
            reduced = self.gradients.reduce()
            norm = self.gradients.clip(reduced, train.grad_clip)
            self.reduced = self.gradients.ranges(reduced)
        loss = self._sum_losses(losses, self.first_microbatch, self.num_microbatches)
        self.digests.check()  # first, since a flipped bit may be why they are not finite
        if before_update:
            before_update()
        if math.isfinite(loss) and math.isfinite(norm):  # the same on all ranks
            with self.trace.span("update", "weights"):
                self.optimizer.step(self.reduced, lr)
                self.publish()
        return loss, norm

    def loss(self, samples, count):
        """Compute the loss of some samples, without gradients.

        Parameters
        ----------
        samples : callable
            As in :meth:`train_step`.
        count : int
            How many there are.

        Returns
        -------
        float
            The sum over all their tokens, in nats; on all ranks.
        """
        size, data = self.config.train.microbatch, self.mesh.group("data")
        total = -(-count // size)
        first, last = bounds(total, data.size, data.rank)
        cuts = [(i * size, min((i + 1) * size, count)) for i in range(first, last)]
        losses = {}
        if cuts:
            with torch.no_grad():
                work = [self._microbatch(samples(*cut), 1.0) for cut in cuts]
                losses = self.runner.run(self._forwards(len(cuts)), work)
        return self._sum_losses(losses, first, total)

    def publish(self):
        """Give every data rank the updated weights."""
        for bucket in self.buckets:
            bucket.publish()
        self.digests.take()

    def gradient_ranges(self):
        """Return ``{name: [(start, flat values)]}``: what this rank holds of the last step's clipped gradients.

        Local. Values are views, and begin at element ``start`` of the row-major order of the whole tensor.
        """
        return _by_name((piece, self.reduced[bucket][piece.low:]) for bucket, piece in self.optimizer.entries)

    def weight_ranges(self):
        """Return ``{name: [(start, flat values)]}``: what this rank holds of the weights, in ``train.dtype``.

        Local; as :meth:`gradient_ranges`.
        """
        parameters = [p for stage in self.stages for p in stage.module.parameters()]
        return _by_name((p.shard, p.detach().reshape(-1)) for p in parameters)

    def free(self):
        """Release the memory of the model, the communicators and the trace's file. Once is enough."""
        self.trace.close()
        self.optimizer = self.reduced = None
        for bucket in self.all_buckets:
            bucket.free()
        self.mesh.free()

    def _make_stages(self):
        config, mesh = self.config, self.mesh
        model, layout = config.model, config.layout
        self.num_stages = layout.pipeline * layout.chunks
        cuts = [0, *layout.stage_cuts, model.num_layers]
        positions = range(config.train.seq_len)
        self.tables = rotary_tables(model.head_dim, positions, model.rope_theta, self.dtype, self.device)
        stages = []
        for index in range(mesh.coord("pipeline"), self.num_stages, layout.pipeline):
            split = TensorSplit(mesh.group("tensor"), layout.sequence_parallel,
                                config.train.exact_blocks if self.is_exact else None, self.dtype, self.device,
                                WAYS[self.way])
            module = TransformerStage(model, split, cuts[index], cuts[index + 1], layout.recompute)
            stages.append(Stage(index, self.num_stages, module))
        return stages

    def _make_storage(self):
        """Make flat storage for weights and gradients: the buckets of each stage, last to first as backward completes
        them, and one for a matrix that two stages share. Initial weights are drawn right into it."""
        mesh, zero = self.mesh, self.config.layout.zero == 1
        # Data ranks that share a node reduce in its memory, on the cores that backward runs on; exact sums trees of
        # microbatches.
        self.overlaps = not self.is_exact and mesh.size("data") > 1 and all(
            mesh.world.comm.allgather(mesh.group("data").memory is None))
        self.stage_buckets, tied, is_tied = {}, [None, None], self.config.model.tie_embeddings
        for stage in self.stages:
            module, own = stage.module, []
            for part in bucket_parts(module, self.config.layout.bucket_cuts, is_tied):
                own.insert(0, Bucket([p for layer in part for p in layer.parameters()], mesh, zero, first=part[0]))
            if is_tied and module.is_first:
                tied[0] = Bucket([module.embedding.weight], mesh, zero, first=module.embedding)
                own.append(tied[0])
            if is_tied and module.is_last:
                tied[1] = Bucket([module.head.weight], mesh, zero, is_counted=False, tied_to=tied[0], first=module.norm)
                own.insert(0, tied[1])
            self.stage_buckets[stage.index] = own
        self.all_buckets = [bucket for own in reversed(self.stage_buckets.values()) for bucket in own]
        self.buckets = [bucket for bucket in self.all_buckets if bucket.tied_to is None]
        for bucket in self.buckets:
            bucket.fill(lambda parameter: initialise(parameter, self.config.train.seed))
        self.gradients = GradientSync(mesh, self.config.model, self.all_buckets, tied, self.is_exact, self.trace)
        if self.overlaps:
            self._watch_gradients()
        self.optimizer = ShardedOptimizer(self.config.train, self.buckets)
        self.digests = Digests(self, is_on=self.config.train.digests)

    def _watch_gradients(self):
        """Let reductions start when backward completes a bucket, the last one of a stage at the end of an action, and
        progress after every layer."""
        for stage in self.stages:
            for bucket in self.stage_buckets[stage.index][:-1]:
                stage.when_gradients(bucket.first, partial(self.gradients.ready, bucket))
            for layer in stage.module.layers:
                stage.when_gradients(layer, self.gradients.progress)

    def _schedule(self, num_microbatches):
        """Build, or read, and check the pipeline schedule of this data rank."""
        layout = self.config.layout
        schedule = named_or_read(layout.schedule, layout.pipeline, num_microbatches, layout.chunks)
        check(schedule)
        return schedule

    def _open_handover(self):
        """Give neighbours on a node memory for the activations and gradients that this schedule has in flight."""
        pipeline, train = self.mesh.group("pipeline"), self.config.train
        if pipeline.size == 1 or self.device.type != "cpu":
            return
        tokens = max(stage.module.split.tokens(train.microbatch * train.seq_len) for stage in self.stages)
        in_flight = max(check(self.schedule).in_flight_max)
        pipeline.open_handover(tokens * self.config.model.hidden_size * self.dtype.itemsize, 2 * in_flight + 2)

    def _forwards(self, num_microbatches):
        """Return a schedule of forward actions alone."""
        layout = self.config.layout
        schedule = make_schedule("gpipe", layout.pipeline, num_microbatches, layout.chunks)
        forwards = tuple(tuple(a for a in row if a.kind == "F") for row in schedule.actions)
        return replace(schedule, name="forward", actions=forwards)

    def _microbatch(self, samples, scale):
        """Move samples to the device, with the mask of their documents."""
        inputs, targets, documents = (None if part is None else torch.as_tensor(part, device=self.device)
                                      for part in samples)
        sequences, positions = inputs.shape
        mask = None
        if documents is not None:
            causal = torch.ones(positions, positions, dtype=torch.bool, device=self.device).tril()
            mask = ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]
        batch = Batch(sequences, positions, *self.tables, mask)
        return Microbatch(inputs.reshape(-1), targets.reshape(-1), scale, batch)

    def _microbatch_done(self, stage, microbatch):
        if self.is_exact:
            self._trees[stage].done(self.first_microbatch + microbatch)
        elif self.overlaps:
            self.gradients.ready(self.stage_buckets[stage][-1])

    def _sum_losses(self, losses, first, total):
        """Add the microbatches' losses of all ranks in their global order."""
        values = torch.zeros(total, dtype=torch.float64)
        if self.mesh.coord("tensor") == 0:
            for microbatch, loss in losses.items():
                values[first + microbatch] = float(loss)
        return float(collectives.allreduce(values, self.mesh.world).sum())


def _by_name(ranges):
    """Gather flat values by the name of their parameter; a range is a shard or a piece."""
    found = {}
    for where, values in ranges:
        found.setdefault(where.name, []).append((where.start, values[:where.stop - where.start]))
    return found

"""The engine: a model, its optimiser and its schedule on this launch's ranks; a batch goes in, an update comes out."""

import math
from dataclasses import replace

import torch

from mpillm.comm import collectives
from mpillm.comm.devices import pick_device
from mpillm.comm.limits import keep_freed_memory
from mpillm.comm.mesh import Mesh
from mpillm.data.sources import Samples
from mpillm.errors import ConfigError, half_made
from mpillm.guard.digests import Digests
from mpillm.nn.positions import Batch, rotary_tables, visible
from mpillm.nn.products import WAYS, fast_product
from mpillm.nn.scores import SCORES
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import TransformerStage
from mpillm.pipeline import Microbatch, PipelineRunner, Stage
from mpillm.plan import DEFAULT_TABLE
from mpillm.report.trace import Trace
from mpillm.schedules.blocks import bounds
from mpillm.schedules.check import check
from mpillm.schedules.formats import named_or_read
from mpillm.schedules.pipeline import make_schedule
from mpillm.train.gradient_store import GradientStore
from mpillm.train.optimizers import ShardedOptimizer
from mpillm.train.selftest import check_exact


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
        On every rank, if ``train.device = "cuda"`` and some rank sees no GPU, or
        ``numerics = "exact"`` and some rank has one, or the kernels of some rank do not keep its promise.
    ScheduleError
        If the pipeline schedule does not pass the checker.
    """

    def __init__(self, config, comm, trace_folder=None, table=DEFAULT_TABLE):
        train, layout, is_exact = config.train, config.layout, config.train.numerics == "exact"
        self.config = config
        keep_freed_memory()
        with half_made(comm) as made:
            self.mesh = Mesh(comm, **layout.sizes(), order=layout.order, sums="tree" if is_exact else "any",
                             table=table, is_checked=train.checked)
            made.callback(self.mesh.free)
            dealt = config.microbatch_bounds()  # (start, stop) in the batch, by data rank
            self.microbatches = dealt[self.mesh.coord("data")]
            self.first_microbatch = sum(map(len, dealt[:self.mesh.coord("data")]))
            self.num_microbatches = sum(map(len, dealt))
            self.schedule = self._schedule(len(self.microbatches))
            self.device = pick_device(train.device, self.mesh.world.comm)
            if is_exact and any(self.mesh.world.comm.allgather(self.device.type == "cuda")):
                raise ConfigError("train.numerics = exact: kernels of GPUs add in an order that changes from run to run: "
                                  "set train.device = cpu, or train.numerics = fast")
            world, dtype = self.mesh.world.comm, getattr(torch, train.dtype)
            self.way = check_exact(config, world) if is_exact else None
            multiply = WAYS[self.way] if is_exact else fast_product(world, self.device, dtype)
            self.trace = Trace(trace_folder, self.mesh)
            made.callback(self.trace.close)
            self.stages = make_stages(config, self.mesh, self.device, multiply)
            self.reads_tokens = any(stage.is_first or stage.is_last for stage in self.stages)
            self.gradients = GradientStore(config, self.mesh, self.stages, self.trace)
            made.callback(self.gradients.free)
            self.optimizer = ShardedOptimizer(train, self.gradients.updated + self.gradients.frozen)
            self.digests = Digests(self, is_on=train.digests)
            self.runner = PipelineRunner(self.stages, self.mesh.group("pipeline"), self.trace, self.gradients)
            self._tables = rotary_tables(config.model, range(train.seq_len), getattr(torch, train.dtype), self.device)
            self._reduced = {}  # by bucket, this rank's range of the last step's gradient
            self._open_handover()

    def train_step(self, read, lr, before_update=None, counted=None):
        """Update the weights from one global batch.

        Parameters
        ----------
        read : callable
            ``read(start, stop)`` returns the :class:`mpillm.data.sources.Samples` at positions of the batch, or a tuple like
            it; inputs and targets are not used where no stage of this rank is first or last, :attr:`reads_tokens`.
        lr : float
        before_update : callable, optional
            Called before weights and state change.
        counted : int, optional
            Targets of the batch that count in the loss; all tokens unless given.

        Returns
        -------
        (float, float)
            Mean loss over the batch's targets before the update, and the gradient norm before clipping; on all ranks.
            Where either is not finite, weights and state are as before.

        Raises
        ------
        NumbersError
            On every rank, with ``train.digests``, if weights or state are not what the last update left.
        """
        train = self.config.train
        self.gradients.begin(range(self.first_microbatch, self.first_microbatch + len(self.microbatches)),
                             self.num_microbatches)
        with self.trace.span("data", "batch"):
            scale = 1.0 / (counted or train.global_batch * train.seq_len)
            microbatches = [self._microbatch(read, *cut, scale) for cut in self.microbatches]
        losses = self.runner.run(self.schedule, microbatches)
        with self.trace.span("reduce", "gradients"):
            reduced = self.gradients.reduce()
            norm = self.gradients.clip(reduced, train.grad_clip)
            self._reduced = self.gradients.ranges(reduced)
        loss = self._sum_losses(losses, self.first_microbatch, self.num_microbatches)
        self.digests.check()  # first, since a flipped bit may be why they are not finite
        if before_update:
            before_update()
        if math.isfinite(loss) and math.isfinite(norm):  # the same on all ranks, because both were summed over all
            with self.trace.span("update", "weights"):
                self.optimizer.step(self._reduced, lr)
                self._distribute(self.gradients.updated)
        return loss, norm

    def loss(self, read, count):
        """Compute the loss of some samples and what else their answers score, without gradients.

        Parameters
        ----------
        read : callable
            As in :meth:`train_step`.
        count : int
            How many there are.

        Returns
        -------
        loss : float
            The sum over all their targets, in nats; on all ranks.
        scores : Tensor or None
            The sums of :mod:`mpillm.nn.scores`, of heads that have some; on all ranks.
        """
        size, data = self.config.train.microbatch, self.mesh.group("data")
        total = -(-count // size)
        first, last = bounds(total, data.size, data.rank)
        cuts = [(i * size, min((i + 1) * size, count)) for i in range(first, last)]
        losses = {}
        if cuts:
            with torch.no_grad():
                microbatches = [self._microbatch(read, *cut, 1.0) for cut in cuts]
                losses = self.runner.run(self._forwards(len(cuts)), microbatches)
        return self._sum_losses(losses, first, total), self._take_scores()

    def distribute_weights(self):
        """Give every data rank the weights, the frozen ones too, as its pieces of them were set."""
        self._distribute(self.gradients.updated + self.gradients.frozen)

    def gradient_ranges(self):
        """Return ``{name: [(start, flat values)]}``: what this rank holds of the last step's clipped gradients.

        Local. Values are views, and begin at element ``start`` of the row-major order of the whole tensor.
        """
        return _by_name((piece, self._reduced[bucket][piece.low:]) for bucket, piece in self.optimizer.entries
                        if bucket in self._reduced)

    def weight_ranges(self):
        """Return ``{name: [(start, flat values)]}``: what this rank holds of the weights, in ``train.dtype``.

        Local; as :meth:`gradient_ranges`.
        """
        parameters = [p for stage in self.stages for p in stage.module.parameters()]
        return _by_name((p.shard, p.detach().reshape(-1)) for p in parameters)

    def free(self):
        """Release the model with its memory, the communicators and the trace's file. Once is enough."""
        self.trace.close()
        # What has views of the buffers, which go now: layers keep some from step to step.
        self.stages, self.runner, self.optimizer, self._reduced = [], None, None, {}
        self.gradients.free()
        self.mesh.free()

    def _distribute(self, buckets):
        for bucket in buckets:
            bucket.distribute()
        self.digests.take()

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
        pipeline.open_handover(tokens * self.config.model.hidden_size * getattr(torch, train.dtype).itemsize, 2 * in_flight + 2)

    def _forwards(self, num_microbatches):
        """Return a schedule of forward actions alone."""
        layout = self.config.layout
        schedule = make_schedule("gpipe", layout.pipeline, num_microbatches, layout.chunks)
        forwards = tuple(tuple(a for a in row if a.kind == "F") for row in schedule.actions)
        return replace(schedule, name="forward", actions=forwards)

    def _microbatch(self, read, start, stop, scale):
        """Move some samples to the device, documents and lengths as a mask."""
        inputs, targets, documents, lengths = (None if part is None else torch.as_tensor(part, device=self.device)
                                               for part in Samples(*read(start, stop)))
        model, sequences, positions = self.config.model, stop - start, self.config.train.seq_len
        if lengths is not None:  # what stands behind a sequence's end is a document of its own
            documents = torch.arange(positions, device=self.device) >= lengths[:, None]
        mask = visible(model, 0, positions, self.device, documents)
        batch = Batch(sequences, positions, *self._tables, mask, lengths_B=lengths)
        if not self.reads_tokens:
            return Microbatch(None, None, scale, batch)
        inputs = inputs.reshape(-1) if model.inputs == "tokens" else inputs.to(self._tables[0].dtype)
        return Microbatch(inputs, targets if model.pooling != "none" else targets.flatten(0, 1), scale, batch)

    def _take_scores(self):
        """Return the scores of all ranks since they were taken last; collective, as is the head that has some."""
        model = self.config.model
        if model.head not in SCORES:
            return None
        found = torch.zeros(1 if model.head == "values" else model.num_labels, 3, dtype=torch.float64)
        last = self.stages[-1].module
        if last.is_last and last.scores is not None and self.mesh.coord("tensor") == 0:
            found += last.scores.cpu()
        last.scores = None
        return collectives.allreduce(found, self.mesh.world)

    def _sum_losses(self, losses, first, total):
        """Add the microbatches' losses of all ranks in their global order."""
        values = torch.zeros(total, dtype=torch.float64)
        if self.mesh.coord("tensor") == 0:
            for microbatch, loss in losses.items():
                values[first + microbatch] = float(loss)
        return float(collectives.allreduce(values, self.mesh.world).sum())


def make_stages(config, mesh, device, multiply):
    """Return the stages of this rank, in order; their weights are not set yet.

    Local.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : Mesh
    device : torch.device
    multiply : callable
        Two matrices, in one of the ways of :mod:`mpillm.nn.products`.

    Returns
    -------
    list of Stage
    """
    model, layout, train = config.model, config.layout, config.train
    num_stages, cuts = layout.pipeline * layout.chunks, [0, *layout.stage_cuts, model.num_layers]
    blocks, stages = train.exact_blocks if train.numerics == "exact" else None, []
    for index in range(mesh.coord("pipeline"), num_stages, layout.pipeline):
        split = TensorSplit(mesh.group("tensor"), layout.sequence_parallel, blocks, getattr(torch, train.dtype), device,
                            multiply, train.freeze)
        module = TransformerStage(model, split, cuts[index], cuts[index + 1], layout.recompute)
        stages.append(Stage(index, num_stages, module))
    return stages


def _by_name(ranges):
    """Gather flat values by the name of their parameter; a range is a shard or a piece."""
    by_name = {}
    for where, values in ranges:
        by_name.setdefault(where.name, []).append((where.start, values[:where.stop - where.start]))
    return by_name

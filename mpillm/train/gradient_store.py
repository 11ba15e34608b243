"""The gradients of a step, from backward to what the optimiser uses: summed over microbatches and data ranks, tied, clipped.

When the sum over data ranks starts: backward tells stage by stage how far it has come (:meth:`Stage.when_gradients`,
set up in ``_follow_backward``), and at the end of an action the runner tells that a microbatch is through
(``microbatch_done``). Both come to ``_ready``, which counts the microbatches of a bucket and starts it with the last.
"""

import os
import time
from collections import deque
from functools import partial

import torch

from mpillm.comm import collectives
from mpillm.comm.p2p import TIED, irecv, isend, tag_of
from mpillm.model.parameters import is_frozen, parameters
from mpillm.nn.init import initialise
from mpillm.schedules.tree import TreeAccumulator
from mpillm.train.flat_buffers import make_buckets

PART = 1 << 16  # numbers whose squares are added up in their own type


class GradientStore:
    """The buckets of this rank's stages, with initial weights in them; reduces their gradients and clips them.

    Collective over the mesh to make.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : Mesh
    stages : list of Stage
    trace : Trace

    Attributes
    ----------
    buckets : list of Bucket
        All that have gradients, in the order in which backward completes them. Every data rank starts their collectives
        in this order, though with other numbers of microbatches they are complete at other times: on one communicator the
        order must be the same.
    updated : list of Bucket
        Those of them that have weights of their own: all but a head's that uses the embedding's.
    frozen : list of Bucket
        Those of weights that stay as they are, with weights of their own.
    """

    def __init__(self, config, mesh, stages, trace):
        self.mesh, self.model, self._trace = mesh, config.model, trace
        self.is_exact = config.train.numerics == "exact"
        # Data ranks that share a node reduce in its memory, on the cores that backward runs on; exact sums trees of
        # microbatches. Neither gains by starting early. Where weights are frozen backward may not come to a bucket's input.
        self._overlaps = not self.is_exact and not config.train.freeze and mesh.size("data") > 1 and all(
            mesh.world.comm.allgather(mesh.group("data").memory is None))
        is_tied = self.model.tie_embeddings and not is_frozen("embedding.weight", config.train.freeze)
        made = make_buckets(stages, mesh, config.layout, self.model.tie_embeddings)
        self._made = [bucket for own in reversed(made.values()) for bucket in own]
        self._of_stage = {index: [bucket for bucket in own if bucket.is_trained] for index, own in made.items()}
        self.buckets = [bucket for own in reversed(self._of_stage.values()) for bucket in own]
        self.updated = [bucket for bucket in self.buckets if bucket.tied_to is None]
        self.frozen = [bucket for bucket in self._made if not bucket.is_trained and bucket.tied_to is None]
        embedding, head = self._of_stage.get(0), self._of_stage.get(stages[0].num_stages - 1)
        self._tied = (embedding and embedding[-1], head and head[0]) if is_tied else (None, None)
        for bucket in self.updated + self.frozen:
            bucket.fill(lambda parameter: initialise(parameter, config.train.seed))
        self._numbers, self._trees = range(0), {}
        self._missing, self._waiting, self._under_way, self._at_end = {}, deque(), {}, {}
        if self._overlaps:
            self._follow_backward(stages)

    def begin(self, numbers, total):
        """Begin a step: gradients are zero, and those of microbatches to come.

        Local.

        Parameters
        ----------
        numbers : range
            The global numbers of this rank's microbatches.
        total : int
            How many all data ranks have.
        """
        self.zero()
        self._numbers = numbers
        self._missing, self._waiting = dict.fromkeys(self.buckets, len(numbers)), deque(self.buckets)
        if self.is_exact:
            self._trees = {stage: MicrobatchTree(own, total, numbers.start, numbers.stop)
                           for stage, own in self._of_stage.items()}

    def zero(self):
        """Set all gradients to zero. Local."""
        for bucket in self.buckets:
            bucket.grad.zero_()

    def microbatch_done(self, stage, microbatch):
        """Note that backward of a microbatch is through the stage of this index.

        Collective over the tensor axis; over the data axis each rank comes to it in its own time.
        """
        if self.is_exact:
            self._trees[stage].done(self._numbers[microbatch])
        elif self._overlaps:
            for bucket in self._at_end[stage]:
                self._ready(bucket)

    def progress(self):
        """Let MPI work on the reductions under way; tell whether there are any. Local."""
        for bucket in [bucket for bucket in self._under_way if bucket.is_reduced()]:
            self._trace.add("transfer", f"bucket {self.buckets.index(bucket)}", self._under_way.pop(bucket))
        return bool(self._under_way)

    def reduce(self):
        """Sum gradients over microbatches and data ranks; return ``{bucket: gradient of its range}``.

        Collective over the mesh. The gradients of a tied matrix accumulate apart and are added once, here.
        """
        for tree in self._trees.values():
            tree.finish()
        self._trees = {}  # which hold as much as the gradients
        while self.progress():
            os.sched_yield()
        for bucket in self._waiting:  # all of them, or none where reductions have started
            if not self.is_exact:  # exact has done this for each microbatch
                bucket.sum_partial()
        reduced = {bucket: bucket.reduce(is_whole=self.is_exact) for bucket in self.buckets}
        self._tie(reduced)
        return reduced

    def norm(self, reduced):
        """Return the global norm of the gradient, equal on all ranks. Collective over the mesh."""
        squares = self._row_squares(reduced) if self.is_exact else self._piece_squares(reduced)
        return float(collectives.allreduce(squares, self.mesh.world).sum()) ** 0.5

    def clip(self, reduced, limit):
        """Scale the gradient down to ``limit`` if its global norm exceeds it; return the norm. Collective."""
        norm = self.norm(reduced)
        if limit and norm > limit:
            for grad in reduced.values():
                grad.mul_(limit / (norm + 1e-6))
        return norm

    def ranges(self, reduced):
        """Cut whole gradients to the ranges that this rank updates."""
        return {bucket: reduced[bucket][slice(*bucket.range)] if len(reduced[bucket]) == bucket.size
                else reduced[bucket] for bucket in self.updated}

    def free(self):
        """Let go of weights and gradients. Local; once is enough."""
        for bucket in self._made:
            bucket.free()

    def _follow_backward(self, stages):
        """Let backward tell when it has completed a bucket, and let reductions progress after every layer.

        Into the input of the embedding goes no gradient: what begins with it is complete at the end of the action
        (:meth:`microbatch_done`), as a stage's last bucket is.
        """
        for stage in stages:
            own, embedding = self._of_stage[stage.index], stage.module.embedding
            self._at_end[stage.index] = [bucket for bucket in own if bucket is own[-1] or bucket.first_module is embedding]
            for bucket in own:
                if bucket not in self._at_end[stage.index]:
                    stage.when_gradients(bucket.first_module, partial(self._ready, bucket))
            for layer in stage.module.layers:
                stage.when_gradients(layer, self.progress)

    def _ready(self, bucket):
        """Note that a microbatch has left all its gradients in ``bucket``; start what is complete, in order.

        As :meth:`microbatch_done`.
        """
        self._missing[bucket] -= 1
        while self._waiting and self._missing[self._waiting[0]] == 0:
            self._start(self._waiting.popleft())

    def _start(self, bucket):
        with self._trace.span("reduce", f"start of bucket {self.buckets.index(bucket)}"):
            bucket.sum_partial()
            self._under_way[bucket] = time.perf_counter()
            bucket.start()

    def _tie(self, reduced):
        embedding, head = self._tied
        if embedding and head:
            reduced[embedding].add_(reduced[head])
        elif embedding or head:
            group = self.mesh.group("pipeline")
            other = group.size - 1 if embedding else 0
            own = reduced[embedding or head]
            send = isend(own.clone(), group, other, tag_of(TIED))
            own.add_(irecv(own.shape, own, group, other, tag_of(TIED)).wait())
            send.wait()

    def _piece_squares(self, reduced):
        """Sum the squares of what this rank counts."""
        counted = [grad[piece.low:piece.high] for bucket, grad in self.ranges(reduced).items()
                   for piece in bucket.pieces() if piece.is_counted]
        return sum_of_squares(counted).reshape(1).cpu()

    def _row_squares(self, reduced):
        """Sum the squares of every row of every parameter, each at its fixed place; zeros for rows of other ranks."""
        places, end = {}, 0
        for name, parameter in parameters(self.model).items():
            places[name], end = end, end + parameter.size // parameter.row_size
        squares = torch.zeros(end, dtype=torch.float64)
        for bucket in self.updated:
            if not bucket.is_counted or self.mesh.coord("data") > 0:
                continue
            for p, offset in zip(bucket.parameters, bucket.offsets):
                shard, width = p.shard, p.shard.whole.row_size
                if p.numel() and not (shard.is_replicated and self.mesh.coord("tensor") > 0):
                    rows = reduced[bucket][offset:offset + p.numel()].view(-1, width)
                    first = places[shard.name] + shard.start // width
                    squares[first:first + len(rows)] = rows.double().square().sum(1).cpu()
        return squares


class MicrobatchTree:
    """Sums the gradients of microbatches along the fixed tree, for ``numerics = "exact"``.

    Each microbatch of a stage leaves its gradient in the stage's buckets; ``done`` takes it away, ``finish`` puts the
    sum of all back.
    """

    def __init__(self, buckets, total, start, stop):
        self.buckets = buckets
        self.trees = [TreeAccumulator(total, start, stop, torch.Tensor.add_) for _ in buckets]

    def done(self, microbatch):
        """Take the gradient of global microbatch number ``microbatch``."""
        for bucket, tree in zip(self.buckets, self.trees):
            bucket.sum_partial()
            tree.push(microbatch, bucket.grad.clone())
            bucket.grad.zero_()

    def finish(self):
        """Put the sum over all microbatches into the gradient buffers."""
        for bucket, tree in zip(self.buckets, self.trees):
            bucket.grad.copy_(tree.value)


def sum_of_squares(tensors):
    """Return the sum of the squares of all numbers, in float64. Local.

    On processors PyTorch adds the squares of a tensor up one behind the other in its own type: in float32, over millions of
    them, 1e-4 goes astray. So they are added up in parts.
    """
    parts = [part for x in tensors for part in (x.split(PART) if x.device.type == "cpu" else (x,))]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()

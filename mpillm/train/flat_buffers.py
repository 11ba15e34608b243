"""Flat buffers: the parameters and gradients of a stage, each in one tensor that is cut evenly over the data axis.

Where data ranks share a node the buffers lie in shared memory: gradients are reduced where they lie, and of weights
whose optimiser is sharded there is one copy, which every rank reads and of which each updates its shard.

Frozen parameters lie in buffers of their own, without gradients.

Every parameter starts on a multiple of 16 elements, and so does every shard: fused optimisers then compute the same
bits on a shard as on the whole.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import groupby

import torch

from mpillm.comm import collectives
from mpillm.comm.shared import if_room
from mpillm.schedules.blocks import ALIGNMENT, align, bounds


@dataclass(frozen=True)
class Piece:
    """A range of one parameter that this rank updates: elements ``[start, stop)`` of the whole parameter's row-major
    order, at ``[low, high)`` of its bucket's shard (``high`` includes padding).

    ``is_counted``: of all ranks that hold this range, this one counts it in norms and writes it to checkpoints.
    """

    name: str
    shape: tuple
    start: int
    stop: int
    low: int
    high: int
    is_counted: bool


def bucket_parts(stage, cuts):
    """Return the modules of a stage in forward order, each with what it trains, as lists of those that share a bucket.

    ``cuts`` are layers at which another bucket begins: 0 parts the embedding, the number of layers what stands behind the
    last one. Matrices that embedding and head share are left out, and modules that have nothing else.
    """
    behind = [(stage.stop, part) for part in (stage.norm, stage.transform, stage.head)]
    places = [(-1, stage.embedding), *enumerate(stage.layers, stage.start), *behind]
    tied = set(stage.tied)
    found = [(place, module, [p for p in module.parameters() if p.requires_grad and p not in tied])
             for place, module in places if module]
    found = [each for each in found if each[2]]
    return [[each[1:] for each in part] for _, part in groupby(found, lambda at: bisect_right(cuts, at[0]))]


def make_buckets(stages, mesh, layout, is_tied):
    """Return ``{stage index: its buckets}``, last to first as backward completes them, and one for a matrix that two
    stages share: the head's is the first, the embedding's the last. Behind them those of frozen parameters.

    Collective over the mesh. Weights are zeros until :meth:`Bucket.fill`.
    """
    buckets, embedding, is_sharded = {}, None, layout.zero == 1
    for stage in stages:
        module = stage.module
        own = [Bucket([p for _, parameters in part for p in parameters], mesh, is_sharded, first_module=part[0][0])
               for part in bucket_parts(module, layout.bucket_cuts)]
        tied = set(module.tied)
        frozen = [p for p in module.parameters() if not p.requires_grad and p not in tied]
        if is_tied and module.is_first:
            embedding = Bucket([module.embedding.words.weight], mesh, is_sharded, first_module=module.embedding)
            own.insert(0, embedding)
        if is_tied and module.is_last:
            own.append(Bucket([module.head.weight], mesh, is_sharded, is_counted=False, tied_to=embedding,
                              first_module=module.norm or module.transform or module.head))
        own = own[::-1] + ([Bucket(frozen, mesh, is_sharded)] if frozen else [])
        buckets[stage.index] = sorted(own, key=lambda bucket: not bucket.is_trained)
    return buckets


class Bucket:
    """Parameters whose data and gradients lie in one flat buffer each; gradients are reduced over the data axis.

    Parameters
    ----------
    parameters : list of Parameter
        With ``.shard``. Their data become a view of the buffer, to be set by :meth:`fill`; ``main_grad`` one of the
        gradient buffer.
    mesh : Mesh
    is_sharded : bool
        Whether each data rank updates only its shard (``zero = 1``) or all (``zero = 0``).
    is_counted : bool
        Whether this rank is the one of its pipeline that answers for these parameters.
    tied_to : Bucket, optional
        A bucket of the same shape whose data these parameters use as well.
    first_module : Module, optional
        Of those that have the parameters, the first in forward: once backward has the gradient of its input, it has
        these gradients.

    Attributes
    ----------
    is_trained : bool
        Whether the parameters are. If not, there is no gradient, nor an optimiser's state or masters: :meth:`distribute`
        gives every rank what was loaded.
    """

    def __init__(self, parameters, mesh, is_sharded, is_counted=True, tied_to=None, first_module=None):
        # Matrices of one input lie together, and so do their biases: products and sums take them as one (Projection).
        self.parameters = sorted(parameters, key=lambda p: (not p.shard.is_partial_grad, p.dim() < 2))
        self.mesh, self.group = mesh, mesh.group("data")
        self.is_counted, self.tied_to, self.first_module = is_counted, tied_to, first_module
        self.offsets, end = [], 0
        for p in self.parameters:
            self.offsets.append(end)
            end = align(end + p.numel(), ALIGNMENT)
        self.num_partial = sum(align(p.numel(), ALIGNMENT) for p in self.parameters if p.shard.is_partial_grad)
        self.size = align(end, ALIGNMENT * self.group.size)
        dtype, device = self.parameters[0].dtype, self.parameters[0].device
        self.is_trained = self.parameters[0].requires_grad
        wide = torch.promote_types(dtype, torch.float32) if self.is_trained else dtype
        node = self.group.node if device.type == "cpu" else None
        if tied_to:
            self.data, self.is_one_copy = tied_to.data, tied_to.is_one_copy
        else:
            shared = if_room(lambda: node.one_copy(self.size, dtype)) if node and is_sharded else None
            self.is_one_copy = shared is not None
            self.data = torch.zeros(self.size, dtype=dtype, device=device) if shared is None else shared
        self.grad, self._wide, self._gathering = None, wide, self.group.bind("allgather", self.data)
        self._bound = [self._gathering]
        if self.is_trained:
            self._make_gradient(device)
        self._make_views()
        self.range = bounds(self.size, self.group.size, self.group.rank) if is_sharded else (0, self.size)
        self.is_sharded = is_sharded
        self.master = None  # what the optimiser updates: a view of the data, or float32 masters of it

    def fill(self, function):
        """Let ``function`` set every parameter; of one copy the data ranks set some each. Collective over the data axis."""
        first, step = (self.group.rank, self.group.size) if self.is_one_copy else (0, 1)
        for p in self.parameters[first::step]:
            function(p)
        if self.is_one_copy:
            self.group.node.barrier()
        self.load_master()

    def _make_gradient(self, device):
        """Make the gradient buffer, and what sums it."""
        memory = self.group.memory if device.type == "cpu" else None
        grad = if_room(lambda: memory.empty(self.size, self._wide)) if memory else None
        self.grad = torch.zeros(self.size, dtype=self._wide, device=device) if grad is None else grad.zero_()
        self._reduction = self.group.bind("reduce_scatter", self.grad)
        self._gathering_grad = self.group.bind("allgather", self.grad)
        self._bound += [self._reduction, self._gathering_grad]

    def _make_views(self):
        """Let the parameters and their gradients lie in the buffers."""
        for p, offset in zip(self.parameters, self.offsets):
            part = slice(offset, offset + p.numel())
            p.data = self.data[part].view(p.shape)
            if self.is_trained:
                p.main_grad = self.grad[part].view(p.shape)

    def free(self):
        """Let go of the buffers, whose memory may be shared and about to go: parameters become empty."""
        if self.data is None:
            return
        for bound in self._bound:
            bound.free()
        self.data = self.grad = self.master = self.first_module = None
        for p in self.parameters:
            p.data, p.main_grad = p.data.new_empty(0), None

    def load_master(self):
        """Take the data as they are for the optimiser to start from."""
        shard = self.data[slice(*self.range)]
        self.master = shard if shard.dtype == self._wide else shard.to(self._wide)

    def pieces(self):
        """Return the pieces of parameters in this rank's range."""
        low, high = self.range
        is_counted = self.is_counted and (self.is_sharded or self.group.rank == 0)
        pieces = []
        for p, offset in zip(self.parameters, self.offsets):
            start, stop = max(low, offset), min(high, offset + p.numel())
            if start < stop:
                shard = p.shard
                pieces.append(Piece(
                    shard.name, shard.shape, shard.start + start - offset, shard.start + stop - offset, start - low,
                    min(high, align(stop, ALIGNMENT)) - low,
                    is_counted and not (shard.is_replicated and self.mesh.coord("tensor") > 0),
                ))
        return pieces

    def sum_partial(self):
        """Add up gradients of which each tensor rank saw a part. Collective over the tensor axis."""
        if self.num_partial and self.mesh.size("tensor") > 1:
            part = self.grad[:self.num_partial]
            collectives.allreduce(part, self.mesh.group("tensor"), out=part)

    def start(self):
        """Start summing the gradient over the data axis, beside other work. Collective, as is :meth:`reduce`."""
        self._reduction.start()

    def is_reduced(self):
        """Let the sum that was started progress; tell whether it is there."""
        return self._reduction.test()

    def reduce(self, is_whole):
        """Sum the gradient over the data axis, or take the sum that was started; return this rank's range of it, or
        with ``is_whole`` all of it.

        Collective over the data axis. Sharded or not, the sum has the same bits.
        """
        if self.group.size == 1:
            return self.grad
        block = self._reduction.wait() if self._reduction.is_started() else self._reduction.run()
        if self.is_sharded and not is_whole:
            return block
        return self._gathering_grad.run()

    def distribute(self):
        """Give every rank the updated parameters. Collective over the data axis."""
        own = self.data[slice(*self.range)]
        if own.dtype != self._wide:
            own.copy_(self.master)
        if self.is_one_copy:
            self.group.node.barrier()
        elif self.is_sharded:
            self._gathering.run()

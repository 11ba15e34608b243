"""From the gradients of a step to what the optimiser uses: reduced over data, tied, clipped."""

import os
import time
from collections import deque

import torch

from mpillm.comm import collectives
from mpillm.comm.p2p import TIED, irecv, isend, tag_of
from mpillm.nn.init import parameter_table


class GradientSync:
    """Reduces the gradients of a rank's buckets and clips them by their global norm.

    Parameters
    ----------
    mesh : Mesh
    model : mpillm.config.Model
    buckets : list of Bucket
        All, in the order in which backward completes them, which is the order of their collectives on every data rank.
    tied : tuple of (Bucket or None, Bucket or None)
        Embedding and head where they are one matrix: the buckets of it on this rank.
    is_exact : bool
        Compute the norm from whole rows in a fixed order.
    trace : Trace
    """

    def __init__(self, mesh, model, buckets, tied, is_exact, trace):
        self.mesh, self.model, self.tied, self.is_exact = mesh, model, tied, is_exact
        self.order, self.buckets = buckets, [bucket for bucket in buckets if bucket.tied_to is None]
        self._trace, self._under_way = trace, {}

    def begin(self, microbatches):
        """Expect the gradients of so many microbatches."""
        self._missing, self._waiting = dict.fromkeys(self.order, microbatches), deque(self.order)

    def ready(self, bucket):
        """Note that a microbatch has left all its gradients in ``bucket``; start what is complete, in order.

        Collective over the tensor axis; over the data axis each rank comes to it in its own time.
        """
        self._missing[bucket] -= 1
        while self._waiting and self._missing[self._waiting[0]] == 0:
            self._start(self._waiting.popleft())

    def progress(self):
        """Let MPI work on the reductions under way; tell whether there are any. Local."""
        for bucket in [bucket for bucket in self._under_way if bucket.is_reduced()]:
            self._trace.add("transfer", f"bucket {self.order.index(bucket)}", self._under_way.pop(bucket))
        return bool(self._under_way)

    def reduce(self):
        """Sum gradients over microbatches' ranks; return ``{bucket: gradient of its range}``.

        Collective over the mesh. The gradients of a tied matrix accumulate apart and are added once, here.
        """
        while self.progress():
            os.sched_yield()
        for bucket in self._waiting:  # all of them, or none where ready() was told
            if not self.is_exact:  # exact has done this for each microbatch
                bucket.sum_partial()
        reduced = {bucket: bucket.reduce(is_whole=self.is_exact) for bucket in self.order}
        self._tie(reduced)
        return reduced

    def _start(self, bucket):
        with self._trace.span("reduce", f"start of bucket {self.order.index(bucket)}"):
            bucket.sum_partial()
            self._under_way[bucket] = time.perf_counter()
            bucket.start()

    def _tie(self, reduced):
        embedding, head = self.tied
        if embedding and head:
            reduced[embedding].add_(reduced[head])
        elif embedding or head:
            group = self.mesh.group("pipeline")
            other = group.size - 1 if embedding else 0
            own = reduced[embedding or head]
            send = isend(own.clone(), group, other, tag_of(TIED))
            own.add_(irecv(own.shape, own, group, other, tag_of(TIED)).wait())
            send.wait()

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
                else reduced[bucket] for bucket in self.buckets}

    def _piece_squares(self, reduced):
        """Sum the squares of what this rank counts."""
        counted = [grad[piece.low:piece.high] for bucket, grad in self.ranges(reduced).items()
                   for piece in bucket.pieces() if piece.is_counted]
        if not counted:
            return torch.zeros(1, dtype=torch.float64)
        return torch.stack(torch._foreach_norm(counted)).double().square().sum().reshape(1).cpu()

    def _row_squares(self, reduced):
        """Sum the squares of every row of every parameter, each at its fixed place; zeros for rows of other ranks."""
        places, end = {}, 0
        for name, (shape, _) in parameter_table(self.model).items():
            places[name], end = end, end + (shape[0] if len(shape) > 1 else 1)
        squares = torch.zeros(end, dtype=torch.float64)
        for bucket in self.buckets:
            if not bucket.is_counted or self.mesh.coord("data") > 0:
                continue
            for p, offset in zip(bucket.parameters, bucket.offsets):
                shard, width = p.shard, p.shard.shape[-1]
                if p.numel() and not (shard.is_replicated and self.mesh.coord("tensor") > 0):
                    rows = reduced[bucket][offset:offset + p.numel()].view(-1, width)
                    first = places[shard.name] + shard.start // width
                    squares[first:first + len(rows)] = rows.double().square().sum(1).cpu()
        return squares

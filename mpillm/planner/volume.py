"""What a training step sends: bytes by axis and operation, message for message as the run sends them."""

from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from itertools import groupby

from mpillm.planner.counts import FFN_MATRICES, ITEM_BYTES
from mpillm.schedules.blocks import ALIGNMENT, align, counts, loss_chunks


def step_volume(config, is_one_copy):
    """Return what all ranks together send in a step: a list of ``{"axis", "operation", "bytes"}``.

    Local. Counted as :class:`mpillm.comm.recorder.Recorder` counts: what an operation must send at least between ranks
    that share no memory. Activations and their gradients, gradients and weights, the loss and the norm are in it;
    agreements of a few bytes between steps are not.

    Parameters
    ----------
    config : Config
        Resolved, with ``model.vocab_size``.
    is_one_copy : bool
        Whether the data ranks share one copy of the weights, which is then not sent.
    """
    layout, total, cuts = config.layout, Counter(), config.microbatch_bounds()
    batches = Counter(tuple(Counter(high - low for low, high in bounds).items()) for bounds in cuts)
    for batch, ranks in batches.items():
        for pipeline in range(layout.pipeline):
            for tensor in range(layout.tensor):
                sent = Volume(config, is_one_copy, pipeline, tensor).sent(batch, sum(map(len, cuts)))
                total.update({key: ranks * n_bytes for key, n_bytes in sent.items()})
    return [{"axis": axis, "operation": operation, "bytes": n_bytes}
            for (axis, operation), n_bytes in sorted(total.items()) if n_bytes]


class Volume:
    """What one rank sends.

    Parameters
    ----------
    config, is_one_copy
        As of :func:`step_volume`.
    pipeline, tensor : int
        The rank's place on these axes.
    """

    def __init__(self, config, is_one_copy, pipeline, tensor):
        self.config, self.layout, self.model = config, config.layout, config.model
        self.is_one_copy, self.tensor = is_one_copy, tensor
        self.item = ITEM_BYTES[config.train.dtype]
        self.is_exact = config.train.numerics == "exact"
        self.is_sharded_by_tokens = self.layout.sequence_parallel and self.layout.tensor > 1
        self.last = self.layout.pipeline * self.layout.chunks - 1
        cuts = [0, *self.layout.stage_cuts, self.model.num_layers]
        self.stages = {index: range(cuts[index], cuts[index + 1])
                       for index in range(pipeline, self.last + 1, self.layout.pipeline)}

    def sent(self, batch, num_losses):
        """Return ``{(axis, operation): bytes}`` of a step.

        Parameters
        ----------
        batch : sequence of (int, int)
            Of this rank's microbatches: sequences, and how many of that size there are.
        num_losses : int
            Microbatches of all ranks.
        """
        sent = Counter()
        for sequences, times in batch:
            for index in self.stages:
                once = self._stage(index, sequences * self.config.train.seq_len)
                sent.update({key: times * n_bytes for key, n_bytes in once.items()})
        sent.update(self._gradients(sum(times for _, times in batch)))
        ranks = self.layout.data * self.layout.pipeline * self.layout.tensor
        squares = self._rows() if self.is_exact else 1
        sent["world", "allreduce"] = sum(_allreduce(8 * count, ranks) for count in (num_losses, squares))
        return Counter({key: n_bytes for key, n_bytes in sent.items() if n_bytes})

    def _mine(self, units):
        return _block(units, self.layout.tensor, self.tensor)

    def _stage(self, index, tokens):
        """Return what a microbatch of ``tokens`` sends on its way through a stage and back."""
        sent, layout = Counter(), self.layout
        held = self._mine(tokens) if self.is_sharded_by_tokens else tokens
        width = self.model.hidden_size * self.item
        if layout.pipeline > 1:
            sent["pipeline", "send"] = ((index > 0) + (index < self.last)) * held * width
        layers = self.stages[index]
        is_whole = isinstance(layout.recompute, str)
        again = sum((layout.recompute if is_whole else layout.recompute[layer]) == "full" for layer in layers)
        # Into the split regions and out of them, two of each a layer; also out of the embedding and into the head.
        # Recomputing a layer stops before its last sum, of which backward needs nothing.
        enter, leave = 2 * len(layers) + (index == self.last), 2 * len(layers) + (index == 0)
        if self.is_sharded_by_tokens:
            sent["tensor", "allgather"] = (enter + leave + 2 * again) * (layout.tensor - 1) * held * width
            sent["tensor", "reduce_scatter"] = (enter + leave + again) * (tokens - held) * width
        else:
            sent["tensor", "allreduce"] = (enter + leave + again) * _allreduce(tokens * width, layout.tensor)
        if index == self.last:
            sent["tensor", "allreduce"] += self._loss(tokens)
        return sent

    def _loss(self, tokens):
        """Return what the loss sends: the largest logit; the sum of exponentials and the target's logit. A GPU has fewer
        chunks, and the same bytes but for what is rounded."""
        chunks, item = loss_chunks(tokens, self.model.vocab_size), max(4, self.item)
        return sum(_allreduce(n * size * item, self.layout.tensor) for size in counts(tokens, chunks) for n in (1, 2))

    def _gradients(self, microbatches):
        """Return what reducing the gradients of all buckets sends, and giving the weights back."""
        sent, layout, wide = Counter(), self.layout, max(4, self.item)
        for sizes, partial, is_tied, is_copy in self._buckets():
            size = align(sum(align(n, ALIGNMENT) for n in sizes), ALIGNMENT * layout.data)
            sent["tensor", "allreduce"] += (microbatches if self.is_exact else 1) * _allreduce(
                sum(align(n, ALIGNMENT) for n in partial) * wide, layout.tensor)
            others = size - size // layout.data
            sent["data", "reduce_scatter"] += others * wide
            is_gathered = self.is_exact or layout.zero == 0
            sent["data", "allgather"] += others * wide * is_gathered
            if layout.zero == 1 and not is_copy and not self.is_one_copy:
                sent["data", "allgather"] += others * self.item
            if is_tied and layout.pipeline > 1:
                sent["pipeline", "send"] += (size if is_gathered else size // layout.data) * wide
        return sent

    def _buckets(self):
        """Yield for every bucket its sizes, those whose gradients are partial, and whether it is of the matrix that
        embedding and head share, and a copy of it that is not updated."""
        model, (whole, partial) = self.model, self._layer()
        table = [self._mine(model.vocab_size) * model.hidden_size]
        cuts = self.layout.bucket_cuts
        for index, layers in self.stages.items():
            is_first, is_last = index == 0, index == self.last
            untied = [] if model.tie_embeddings else table
            places = [(-1, untied, [])] * is_first + [(layer, whole, partial) for layer in layers]
            if is_last:
                norm = [model.hidden_size]
                places.append((model.num_layers, norm + untied, norm * self.is_sharded_by_tokens))
            for _, part in groupby(places, lambda place: bisect_right(cuts, place[0])):
                _, sizes, parts = zip(*part)
                yield sum(sizes, []), sum(parts, []), False, False
            if model.tie_embeddings and is_first:
                yield table, [], True, False
            if model.tie_embeddings and is_last:
                yield table, [], True, 0 in self.stages

    def _layer(self):
        """Return the sizes of a layer's weights on this rank, and of those of which it sees a part of the gradient."""
        model, width = self.model, self.model.hidden_size
        # Fewer key/value heads than tensor ranks: every rank keeps them all.
        is_whole = not self.is_exact and self.layout.tensor > model.num_kv_heads
        group = model.num_heads // model.num_kv_heads
        heads = self._mine(model.num_heads) if is_whole else self._mine(model.num_kv_heads) * group
        keys = [(model.num_kv_heads if is_whole else self._mine(model.num_kv_heads)) * model.head_dim * width] * 2
        sizes = [heads * model.head_dim * width] * 2 + [self._mine(model.ffn_size) * width] * FFN_MATRICES[model.kind] + keys
        norms = [width] * 2
        return sizes + norms, (keys if is_whole else []) + (norms if self.is_sharded_by_tokens else [])

    def _rows(self):
        """Return the rows of all parameters, whose squares exact numerics add one by one."""
        model = self.model
        heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
        return (model.num_layers * (heads + FFN_MATRICES[model.kind] * model.ffn_size + 2) + 1
                + model.vocab_size * (1 if model.tie_embeddings else 2))


def _allreduce(n_bytes, ranks):
    return 2 * (n_bytes - n_bytes // ranks)


@lru_cache(maxsize=1024)
def _block(units, ranks, rank):
    return (rank + 1) * units // ranks - rank * units // ranks

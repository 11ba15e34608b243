"""What a training step sends: bytes by axis and operation, message for message as the run sends them."""

from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from itertools import groupby

from mpillm.model.parameters import first_parameters, held, is_frozen, layer_parameters, parameters, trained_from
from mpillm.planner.counts import (
    ITEM_BYTES,
    crossings,
    crossings_back,
    divided_norms,
    ends,
    held_size,
    num_answers,
    passes_head,
    trained_layers,
)
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
        self.freeze, self.begin = config.train.freeze, trained_from(self.model, config.train.freeze)
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
        squares = sum(one.size // one.row_size for one in parameters(self.model).values()) if self.is_exact else 1
        sent["world", "allreduce"] = sum(_allreduce(8 * count, ranks) for count in (num_losses, squares))
        return Counter({key: n_bytes for key, n_bytes in sent.items() if n_bytes})

    def _mine(self, units):
        return _block(units, self.layout.tensor, self.tensor)

    def _stage(self, index, tokens):
        """Return what a microbatch of ``tokens`` sends on its way through a stage and back."""
        sent, layout = Counter(), self.layout
        here = self._mine(tokens) if self.is_sharded_by_tokens else tokens
        width = self.model.hidden_size * self.item
        if layout.pipeline > 1:
            passes_gradient = index > 0 and self.stages[index].start > self.begin
            sent["pipeline", "send"] = (passes_gradient + (index < self.last)) * here * width
        layers, layer, trained = self.stages[index], crossings(self.model), trained_layers(self.model, self.freeze)
        is_whole = isinstance(layout.recompute, str)
        again = sum((layout.recompute if is_whole else layout.recompute[place]) == "full" and trained[place].has_backward
                    for place in layers)
        # Into the split regions of layers and out of them; also out of the embedding and into the head. Where a sum is in
        # forward its backward hands out, and the other way.
        back = [crossings_back(self.model, self.freeze, place) for place in layers]
        enters, leaves, norms = (sum(places) for places in zip(*back))
        given = len(layers) * layer.enters + leaves + (index == self.last) + (index == 0 and self._trains_embedding())
        sums = len(layers) * layer.leaves + enters + (index == 0) + again * layer.leaves_again
        sums += index == self.last and passes_head(self.model, self.freeze)
        if self.is_sharded_by_tokens:
            sent["tensor", "allgather"] = (given + again * layer.enters) * (layout.tensor - 1) * here * width
            sent["tensor", "reduce_scatter"] = sums * (tokens - here) * width
        else:
            sent["tensor", "allreduce"] = sums * _allreduce(tokens * width, layout.tensor)
        squares = tokens * divided_norms(self.model, layout.tensor, self.is_exact) * max(4, self.item)
        sent["tensor", "allreduce"] += (len(layers) + norms + again) * _allreduce(squares, layout.tensor)
        if index == self.last:
            sent["tensor", "allreduce"] += self._loss(tokens)
        return sent

    def _trains_embedding(self):
        """Tell whether something is trained of what is summed before the first layer."""
        return any(not is_frozen(name, self.freeze) for name in first_parameters(self.model)
                   if name != "patches.bias" and not name.startswith("embedding_norm."))

    def _loss(self, tokens):
        """Return what the loss sends: the largest logit; the sum of exponentials and the target's logit. A GPU has fewer
        chunks, and the same bytes but for what is rounded. Of values it is the loss alone."""
        model, item, ranks = self.model, max(4, self.item), self.layout.tensor
        if model.head == "values":
            return _allreduce(item, ranks)
        rows = num_answers(model, self.config.train.seq_len, tokens)
        sizes = counts(rows, loss_chunks(rows, model.head_size))
        return sum(_allreduce(n * size * item, ranks) for size in sizes for n in (1, 2))

    def _gradients(self, microbatches):
        """Return what reducing the gradients of all buckets sends, and giving the weights back."""
        sent, layout, wide = Counter(), self.layout, max(4, self.item)
        for own, is_tied, is_copy in self._buckets():
            size = align(sum(size for size, _ in own), ALIGNMENT * layout.data)
            sent["tensor", "allreduce"] += (microbatches if self.is_exact else 1) * _allreduce(
                sum(size for size, is_partial in own if is_partial) * wide, layout.tensor)
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
        """Yield for every bucket what :meth:`_held` says of its parameters, whether it is of the matrix that embedding and
        head share, and whether of a copy of it that is not updated."""
        model, cuts, shared = self.model, self.layout.bucket_cuts, []
        first, last = ends(model)
        if model.tie_embeddings:
            shared, first, last = self._held(first[:1]), first[1:], last[:-1]
        first, last = self._held(first), self._held(last)
        layer = [self._held(layer_parameters(model, place).values())
                 for place in (range(model.num_layers) if self.freeze else [0])]
        layer = layer if self.freeze else layer * model.num_layers
        for index, layers in self.stages.items():
            is_first, is_last = index == 0, index == self.last
            places = [*[(-1, first)] * is_first, *((place, layer[place]) for place in layers),
                      *[(model.num_layers, last)] * is_last]
            for _, part in groupby(places, lambda place: bisect_right(cuts, place[0])):
                if own := sum((own for _, own in part), []):
                    yield own, False, False
            if shared and is_first:
                yield shared, True, False
            if shared and is_last:
                yield shared, True, 0 in self.stages

    def _held(self, table):
        """Return of every parameter that is trained how many numbers its place on this rank takes, and whether their gradients
        are partial."""
        found = []
        for one in table:
            if is_frozen(one.name, self.freeze):
                continue
            own = held(one, self.layout.tensor, self.tensor, self.is_exact, self.is_sharded_by_tokens)
            found.append((align(held_size(one, own), ALIGNMENT), own.is_partial_grad))
        return found


def _allreduce(n_bytes, ranks):
    return 2 * (n_bytes - n_bytes // ranks)


@lru_cache(maxsize=1024)
def _block(units, ranks, rank):
    return (rank + 1) * units // ranks - rank * units // ranks

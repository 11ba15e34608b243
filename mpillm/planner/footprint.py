"""What a rank holds at its fullest: weights and their state, activations in flight, and what an action takes beside."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mpillm.config import AXES
from mpillm.model.parameters import in_groups, is_frozen, layer_parameters, trained_from
from mpillm.planner.counts import (
    ALL_TRAINED,
    ITEM_BYTES,
    PRODUCTS,
    LayerTrained,
    ends,
    held_sizes,
    layer_rows,
    matrices,
    num_answers,
    num_states,
    passes_head,
    trained_sizes,
)
from mpillm.planner.workload import SCORES_KEPT
from mpillm.schedules.blocks import SUM_BYTES, loss_chunks
from mpillm.schedules.pipeline import groups, zero_bubble_kinds
from mpillm.schedules.tree import split

WINDOW_BYTES = 8 << 20  # through which ranks of a node that share memory pass tensors, for every axis
TOKEN_BYTES = 16  # it and its target; who sees whom takes a byte a pair of positions
AHEAD = 2  # receives that a pipeline posts before it needs them
MASTER_BYTES = 4  # of the least type in which gradients, optimiser state and norms are kept
CHANGE = {"F": (1, 0), "B": (-1, 0), "I": (-1, 1), "W": (0, -1)}  # in microbatches before and after their input half
PERIODS = 3  # of as many microbatches as ranks: after so many zb-h1 and zb-h2 repeat themselves
_CHANGES = np.zeros((2, 256), int)  # CHANGE by the number of a kind's letter
_CHANGES[:, [ord(kind) for kind in CHANGE]] = np.transpose(list(CHANGE.values()))
_BEGINNING = [ord(kind) for kind in "BI"]


class LayerBytes(NamedTuple):
    """Of a microbatch in a layer: kept from forward to backward; from input to weight half, where these are apart; and
    what backward, or an input half, needs beside: in the last layer, where it begins, and in the first, where it ends."""

    kept: float
    split: float
    backward: float
    input: float
    input_end: float


class Footprint:
    """Predicts the memory of the ranks of a layout. Local.

    It counts what a run asks of PyTorch and of shared memory; ``tests/tools/memory.py`` holds it against that. What the
    interpreter and MPI take is not in it.

    Parameters
    ----------
    config : Config
    machine : Machine
    keeps_one_copy : callable
        Tells of a layout whether its data ranks share one copy of the weights.
    """

    def __init__(self, config, machine, keeps_one_copy):
        self.config, self.machine, self._keeps_one_copy = config, machine, keeps_one_copy
        self.item = ITEM_BYTES[config.train.dtype]
        self.wide = max(MASTER_BYTES, self.item)
        self.is_exact = config.train.numerics == "exact"
        self._layer = lru_cache(None)(self._make_layer)

    def layer(self, layout, mode, trained=ALL_TRAINED):
        """Return the :class:`LayerBytes` of a layer with one way to recompute, of which so much is trained."""
        return self._layer(layout.microbatch, layout.tensor, layout.sequence_parallel, mode, trained)

    def fixed(self, layout, sizes):
        """Return what every pipeline rank holds but for activations of layers in flight; ``sizes`` are the layers of
        every stage."""
        parameters, gradients, updated = self._parameters(layout, sizes)
        train, shards = self.config.train, layout.data if layout.zero else 1
        copies = layout.data if self._keeps_one_copy(layout) else 1
        states = num_states(train)
        held = parameters * self.item / copies + updated * self.wide * (states + (self.item < self.wide)) / shards
        if train.checkpoint_background:  # a copy of what a rank saves
            held += ((parameters - updated) * self.item + updated * self.wide * (1 + states)) / layout.data
        return held + gradients * self.wide + self._windows(layout) + self._passing(layout)

    def beside(self, layout, sizes, modes, is_split):
        """Return what every pipeline rank needs beside what it keeps, at most, where layers recompute in these ways: behind
        backward or its halves, behind forward, and where backward or an input half begins; shape (ranks, 3)."""
        works = [self.layer(layout, mode) for mode in modes]
        begins, ends = np.max([(work.input, work.input_end) if is_split else (work.backward,) * 2 for work in works], 0)
        most = np.tile((ends, ends, begins), (layout.pipeline, 1))
        forward = self.layer(layout, "none", LayerTrained(has_backward=False))
        most[self._stages_with_backward(layout, sizes) == 0] = forward.backward
        most[-1, 2] -= sum(self._activation(layout)) + self._transform(layout)  # the last rank no longer has what the head kept
        most[-1, 1:] = np.maximum(most[-1, 1:], self._head_forward(layout))
        return most

    def ends(self, layout, sizes):
        """Return what a microbatch in flight on every pipeline rank keeps beside its layers, until its input half: what
        was sent on, the mask as it is added to scores, on the first and last rank what their norms keep, and on the last
        what the head does."""
        model, (whole, between) = self.config.model, self._activation(layout)
        mask = self._masked(self._tokens(layout)) * self.item
        kept = np.full(layout.pipeline, float(between + mask) * layout.chunks)
        statistics = self._statistics(layout.microbatch, layout.tensor, layout.sequence_parallel)
        begin, passes = trained_from(model, self.config.train.freeze), passes_head(model, self.config.train.freeze)
        kept *= self._stages_with_backward(layout, sizes) / layout.chunks
        kept[0] += (between + statistics) * model.embedding_norm * (begin < 0)
        kept[-1] += passes * (whole + model.has_final_norm * statistics + self._transform(layout)
                              + between * (begin == model.num_layers))
        return kept + self.waiting(layout)

    def _transform(self, layout):
        """Return what is kept before the head: into a transform goes what a norm made; its activation, and its norm if it has
        one, keep what goes into them."""
        model, between = self.config.model, self._activation(layout)[1]
        statistics = self._statistics(layout.microbatch, layout.tensor, layout.sequence_parallel)
        return model.pooler * 2 * between + (model.head == "masked") * (3 * between + statistics)

    def _stages_with_backward(self, layout, sizes):
        """Return how many of the stages of every pipeline rank have a backward: those that end behind the first that is
        trained."""
        begin = trained_from(self.config.model, self.config.train.freeze)
        return (np.cumsum(sizes) > begin).reshape(-1, layout.pipeline).sum(0)

    def waiting(self, layout):
        """Return what a microbatch in flight on every pipeline rank keeps beside its layers until its weight half: in
        exact, where microbatches are summed along a tree, the gradient of the head's weight. Local."""
        kept = np.zeros(layout.pipeline)
        if self.is_exact:
            head = matrices(ends(self.config.model)[1])[-1]
            kept[-1] = head.size / layout.tensor * self.wide * (not is_frozen(head.name, self.config.train.freeze))
        return kept

    def peaks(self, layout, sizes, kept, split, beside, held, microbatches):
        """Return the most that every pipeline rank holds at each of its points; shape (ranks, points).

        Parameters
        ----------
        layout : Candidate
        sizes : sequence of int
            Layers of every stage.
        kept, split : ndarray
            Bytes that a microbatch in flight keeps on every pipeline rank before its input half, and after it.
        beside : ndarray
            Of :meth:`beside`.
        held : ndarray
            Of :func:`in_flight`.
        microbatches : int
        """
        sums = self._parameters(layout, sizes)[1] * self.wide if self.is_exact else np.zeros(layout.pipeline)
        done = np.arange(microbatches if self.is_exact else 1)
        counts = np.array([_partial_sums(microbatches, int(k)) for k in done])
        before = np.minimum(held[:, :, :1] / layout.chunks, microbatches - done)  # ranks, points, microbatches done
        after = np.minimum(held[:, :, 1:2] / layout.chunks, microbatches - done - before)
        beside = np.take_along_axis(beside, held[:, :, 2], 1)[:, :, None]
        kept, split, sums = (each[:, None, None] for each in (kept, split, sums))
        activations = before * kept + after * split
        most = np.maximum(activations + counts * sums + beside, activations - kept + (counts + 1) * sums).max(2)
        tokens = self._tokens(layout)
        batch = microbatches * (tokens * TOKEN_BYTES + self._masked(tokens))
        always = np.broadcast_to(self.fixed(layout, sizes) + batch, layout.pipeline)
        return always[:, None] + np.maximum(most, self.update(layout, sizes)[:, None])

    def update(self, layout, sizes):
        """Return what the optimiser needs beside, on every pipeline rank."""
        model, train = self.config.model, self.config.train
        if self.is_exact:  # squares of the rows of one matrix in float64, twice
            largest = max(one.size for one in (*sum(ends(model), []), *layer_parameters(model).values()))
            return np.full(layout.pipeline, 16 * largest / layout.tensor)
        passes = 2 if train.optimizer == "rmsprop" else 0
        return passes * self.wide * self.updated(layout, sizes) / (layout.data if layout.zero else 1)

    def updated(self, layout, sizes):
        """Return how many parameters every pipeline rank trains. Local."""
        return self._parameters(layout, sizes)[2]

    def _parameters(self, layout, sizes):
        """Return the parameters of every pipeline rank; its gradients, of what is trained: those of a matrix that embedding
        and head share are apart until the end; and how many parameters it trains."""
        model, is_one = self.config.model, layout.pipeline == 1
        each = held_sizes(model, layout.tensor, self.is_exact)
        trained = trained_sizes(model, self.config.train.freeze, layout.tensor, self.is_exact)
        counts = []
        for layers, found in (((each.layer,) * model.num_layers, each), (trained.layers, trained)):
            stages = np.add.reduceat(layers, np.cumsum(sizes) - sizes)
            own = stages.reshape(-1, layout.pipeline).sum(0)
            own[0] += found.first
            own[-1] += found.last
            counts += [own, own - np.eye(1, len(own), dtype=int)[0] * found.shared * is_one]
        _, parameters, gradients, updated = counts
        return parameters, gradients, updated

    def _masked(self, tokens):
        """Return of how many pairs of positions the mask of a microbatch of so many tokens says whether they see each other:
        of documents every sequence has its own, of a window all have one."""
        seq_len = self.config.train.seq_len
        return seq_len * (tokens if self.config.data.mask_documents else seq_len * self.config.model.has_band(seq_len))

    def _statistics(self, microbatch, tensor, sequence_parallel):
        """Return the bytes of what a norm keeps of a microbatch beside its input: one over each token's size; and its mean."""
        tokens = microbatch * self.config.train.seq_len / (tensor if sequence_parallel else 1)
        return tokens * self.wide * (2 if self.config.model.norm == "layer" else 1)

    def _tokens(self, layout):
        return layout.microbatch * self.config.train.seq_len

    def _activation(self, layout):
        """Return the bytes of the activations of a microbatch, whole and as they lie between layers."""
        whole = self._tokens(layout) * self.config.model.hidden_size * self.item
        return whole, whole / (layout.tensor if layout.sequence_parallel else 1)

    def _windows(self, layout):
        """Return the bytes of windows for ranks of a node."""
        if not self.machine.shares_memory:
            return 0
        sizes = {axis: getattr(layout, axis) for axis in AXES}
        reaches = [size * layout.stride(axis) for axis, size in sizes.items() if size > 1]
        if self.is_exact:  # sums over all ranks go the same way
            reaches += [math.prod(sizes.values())]
        return WINDOW_BYTES * sum(1 < reach <= self.machine.ranks_per_node for reach in reaches)

    def _passing(self, layout):
        """Return what every pipeline rank receives ahead, and what it has sent that has not left."""
        if layout.pipeline == 1:
            return 0
        between = self._activation(layout)[1]
        return np.array([AHEAD * between] + [(AHEAD + 1) * between] * (layout.pipeline - 1))

    def _blocks(self, layout, n_bytes):
        """Return the bytes of partial results of so many bytes each while they are added: those of all blocks of a rank,
        and of the sums on the way down the tree."""
        blocks = max(1, self.config.train.exact_blocks // layout.tensor) if self.is_exact else 1
        return n_bytes * (blocks + (math.ceil(math.log2(blocks)) + 1 if blocks > 1 else 0))

    def _added(self, rows, tokens):
        """Return the bytes of what is there of a product while it is added to a weight's gradient of so many rows: in a half
        type all of it, in both types; in float32, where products are added in parts, one with its factor. A sum in one pass
        needs nothing."""
        width = self.config.model.hidden_size
        if self.item < self.wide:
            return width * rows * (self.item + self.wide)
        is_in_parts = self.machine.adds_in_parts and self.item == MASTER_BYTES and not self.is_exact
        return is_in_parts * min(SUM_BYTES, rows * (width + 2 * tokens) * self.item)

    def _head_forward(self, layout):
        """Return what the head's forward needs beside what it keeps: its input, and the logits of a chunk, which in a
        half type are there in both, and what is added to the weight's gradient. Logits that are capped are there twice,
        and their slope once."""
        model, size = self.config.model, self.config.model.head_size
        answers = num_answers(model, self.config.train.seq_len, self._tokens(layout))
        rows, columns = math.ceil(answers / loss_chunks(answers, size)), size / layout.tensor
        is_half, is_capped, logits = self.item < self.wide, model.logit_softcap > 0, rows * columns * self.wide
        slopes = self._blocks(layout, rows * model.hidden_size * self.item)
        last = is_half * rows * columns * self.item + max(slopes, self._added(columns, rows))
        return self._activation(layout)[0] + (1 + is_capped) * logits + max(is_capped * logits, last)

    def _make_layer(self, microbatch, tensor, sequence_parallel, mode, trained):
        """Return the :class:`LayerBytes` of a layer; without backward, what forward needs beside."""
        model, item = self.config.model, self.item
        tokens = microbatch * self.config.train.seq_len
        cut = tensor if sequence_parallel else 1
        whole = tokens * model.hidden_size * item
        rows, is_parallel = layer_rows(model, tensor, self.is_exact), model.residual == "parallel"
        queries, keys, inner = (tokens * rows[f"{part}.weight"] * item for part in (
            "attention.query", "attention.key", "ffn.up"))
        heads, kv_heads = (rows[f"attention.{part}.weight"] // model.head_dim for part in ("query", "key"))
        # What goes into a norm lies between the regions, what goes into a half of a layer is whole: first or last, a norm
        # has the layer's input, its half's output or their sum to itself; those of a parallel layer have the same input.
        between, entered = (1 if is_parallel else 2) * whole / cut, (trained.heads + trained.ups) * whole
        norms = 2 * self._statistics(microbatch, tensor, sequence_parallel)
        is_normed = model.qk_norm != "none"
        if is_normed:
            norms += queries + keys + tokens * self.wide * (heads + kv_heads if model.qk_norm == "head" else 2)
        ups_kept = ups = (1 + model.is_gated) * inner
        slope = whole / cut + (whole if tensor > 1 else 0)
        if not trained.has_backward:
            return LayerBytes(0.0, 0.0, *[slope + ups + inner] * 3)
        scores = tokens * heads * self.wide  # the sums of the exponentials of every row
        if self.machine.keeps_scores:  # and what the activation makes
            scores, ups_kept = SCORES_KEPT * tokens * self.config.train.seq_len * heads, 2 * inner
        apart = 0.0
        if model.num_heads > model.num_kv_heads:  # queries that share a key have it each for itself
            is_one = not self.is_exact and in_groups(model.num_kv_heads, tensor, False)  # product of queries, keys and values
            apart = 2 * queries - (keys * is_normed if is_one else 2 * keys)
        plain = between + entered + norms + 2 * queries + 2 * keys + ups_kept
        kept = {"none": plain + apart + scores, "selective": plain, "full": whole / cut}
        # Of every trained product what goes in and the gradient of what comes out; of a parallel layer both halves' is one.
        multiplied = sum(rows.get(f"{layer}.weight", 0) for key, layers in PRODUCTS.items() for layer in layers
                         if getattr(trained, key))
        left = trained.output or trained.down if is_parallel else trained.output + trained.down
        halves = tokens * item * multiplied + entered + left * whole
        again = kept["none"] - kept["full"] if mode == "full" else 0.0
        if self.is_exact:
            layout_blocks = max(1, self.config.train.exact_blocks // tensor)
            summed = whole * (layout_blocks + math.ceil(math.log2(layout_blocks)) + 1 if layout_blocks > 1 else 1)
            backward = slope + max((ups + inner) / layout_blocks, summed - ups_kept)
            inputs = slope + max(2 * ups / layout_blocks, summed)
        else:
            up_rows = (1 + model.is_gated) * rows["ffn.up.weight"]  # whose gradients are added while all else is there
            backward, inputs = slope + ups + max(inner, self._added(up_rows, tokens)), slope + 2 * ups
        # By the end of an input half all that it computed again has become what the weight half needs, but for this layer.
        ending = max(kept[mode] + again - halves + inputs, slope)
        return LayerBytes(kept[mode], halves, again + backward, again + inputs, ending)


@lru_cache(maxsize=4096)
def in_flight(name, ranks, microbatches, chunks):
    """Return how many pairs of stage and microbatch are in flight: of every rank the points that are the most it comes to,
    each (before, after their input half; 0 behind backward or its halves, 1 behind forward, 2 where backward or an input half
    begins), shape (ranks, points, 3). Local; ``name`` is a textbook's schedule."""
    if name in ("zb-h1", "zb-h2"):  # of whose actions, thousands on many ranks, only the kinds matter
        return _most(zero_bubble_kinds(ranks, min(microbatches, PERIODS * ranks), name == "zb-h2"))
    pairs = microbatches * chunks
    if name == "gpipe":
        return np.tile([pairs, 0, 2], (ranks, 1, 1))
    warmups = groups(ranks, microbatches, chunks)[1]
    return np.array([[[min(pairs, warmup + 1), 0, 2]] for warmup in warmups])


def points(schedule):
    """Return what :func:`in_flight` returns, of any schedule. Local."""
    return _most(["".join(action.kind for action in row) for row in schedule.actions])


def _most(rows):
    """Return the points of every rank from the kinds of its actions, a text each."""
    of_ranks = []
    for row in rows:
        kinds = np.frombuffer(row.encode(), np.uint8)
        before, after = _CHANGES[:, kinds].cumsum(1)
        most = np.full((3, after.max(initial=0) + 1), -1)
        begins = np.r_[np.isin(kinds[1:], _BEGINNING, kind="table"), False]
        np.maximum.at(most, (np.where(begins, 2, kinds == ord("F")), after), before)
        of_ranks.append([(n, held, place) for place in range(3) for held, n in enumerate(most[place].tolist()) if n >= 0])
    width = max(map(len, of_ranks))
    return np.array([points + points[:1] * (width - len(points)) for points in of_ranks])


@lru_cache(maxsize=4096)
def _partial_sums(total, done):
    """Return how many sums the tree over ``total`` items holds when ``done`` have come in order and one more is added."""
    low, high, count = 0, total, 0
    while high - low > 1 and done > low:
        middle = split(total, low, high)
        low, high, count = (middle, high, count + 1) if done >= middle else (low, middle, count)
    return count



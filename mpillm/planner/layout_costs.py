"""What a layout costs: its step in parts, and the memory of its fullest rank."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mpillm.config import AXES
from mpillm.model.parameters import is_frozen, trained_from
from mpillm.planner.balance import balance
from mpillm.planner.counts import (
    ALL_TRAINED,
    ITEM_BYTES,
    num_states,
    passes_head,
    step_flops,
    trained_layers,
    trained_sizes,
)
from mpillm.planner.footprint import Footprint, in_flight, points
from mpillm.planner.reduction import Reduction
from mpillm.planner.stages import balanced_cuts
from mpillm.planner.synthesis import synthesise
from mpillm.planner.timeline import play, unhindered_s
from mpillm.planner.workload import TensorRanks, embedding_work, head_work, layer_work
from mpillm.schedules.formats import named_or_read
from mpillm.schedules.pipeline import SCHEDULES

RECOMPUTE = ("none", "selective", "full")
DEEPEST = 3  # times the ranks: so many microbatches in flight hide messages; more brought nothing
CLEARLY = 0.98  # of the time with a textbook's schedule


@dataclass(frozen=True)
class Candidate:
    """One way to split the work; the names are those of the configuration."""

    data: int
    pipeline: int
    tensor: int
    chunks: int
    schedule: str
    microbatch: int
    zero: int
    sequence_parallel: bool
    recompute: str | tuple  # one way for all layers, or one a layer
    order: tuple = AXES

    def stride(self, axis):
        """Return how many ranks lie between neighbours on an axis. Local."""
        return math.prod(getattr(self, inner) for inner in self.order[self.order.index(axis) + 1:])


@dataclass(frozen=True)
class Price:
    """What a layout costs: the step and its parts in seconds, the memory of the fullest rank in bytes.

    ``gradients_s`` is what reducing and clipping gradients adds to the pipeline's time; ``update_s`` is the optimiser's,
    and the weights' way back to the data ranks; ``bucket_cuts`` are known once played.
    """

    layout: Candidate
    step_s: float
    pipeline_s: float
    gradients_s: float
    update_s: float
    bubble_fraction: float
    memory_bytes: float
    bucket_cuts: tuple | None = None


class Pricer:
    """Prices layouts of one configuration on one machine; keeps what many layouts share.

    Local. :meth:`price` takes microseconds: the pipeline by its closed form (Qi et al. 2024; Narayanan et al. 2021).
    :meth:`played` takes the schedule action by action, which is right also where microbatches are too few to fill it.
    """

    def __init__(self, config, machine, ranks):
        self.config, self.machine, self.ranks = config, machine, ranks
        self.item, self.is_exact = ITEM_BYTES[config.train.dtype], config.train.numerics == "exact"
        self.freeze = config.train.freeze
        self.price, self.played = lru_cache(None)(self._price), lru_cache(None)(self._played)
        self.synthesised, self.timeline = lru_cache(None)(self._synthesised), lru_cache(None)(self._timeline)
        self._schedule = lru_cache(32)(self._make_schedule)
        self._works = lru_cache(None)(self._make_works)
        self._ends = lru_cache(None)(self._make_ends)
        self._balance = lru_cache(None)(self._make_balance)
        self.reduction = Reduction(config, machine, self.work)
        self.footprint = Footprint(config, machine, self.reduction.keeps_one_copy)

    def _make_works(self, tokens, tensor, reach, recompute, sequence_parallel, trained=ALL_TRAINED):
        model, machine, seq_len = self.config.model, self.machine, self.config.train.seq_len
        ranks = TensorRanks(tensor, machine.level_for(reach), sequence_parallel, self.is_exact)
        is_masked = self.config.data.mask_documents or model.has_band(seq_len)
        weight = "embedding.weight" if model.tie_embeddings else "head.weight"
        gradients = not is_frozen(weight, self.freeze), passes_head(model, self.freeze)
        return (layer_work(model, machine, ranks, seq_len, tokens, self.item, recompute, is_masked, trained),
                head_work(model, machine, ranks, seq_len, tokens, self.item, gradients),
                embedding_work(model, machine, ranks, tokens, self.item, trained_from(model, self.freeze) < 0))

    def shares(self, layout):
        """Return the sequences of every data rank, ``None`` where all have as many. Local."""
        given = self.config.layout.shares
        if given != "auto":
            return given
        if not self.machine.speeds or layout.data == 1 or self.is_exact:
            return None
        return self._balance(tuple(self._speeds(layout)[0].tolist()))

    def _make_balance(self, speeds):
        """Deal out the batch over data ranks of these speeds: one sequence to each, the others where they are done
        first."""
        item_s = 1 / np.array(speeds)
        more = balance(self.config.train.global_batch - len(speeds), item_s, start_s=item_s).shares
        return tuple(1 + share for share in more)

    def _speeds(self, layout):
        """Return the speeds of data ranks and of pipeline ranks, each that of its slowest rank.

        Unequal ranks are made up for along one axis: along the pipeline by its cuts, else by shares of the batch.
        """
        d, p = layout.data, layout.pipeline
        if not self.machine.speeds:
            return np.ones(d), np.ones(p)
        speeds = np.reshape(self.machine.speeds, [getattr(layout, axis) for axis in layout.order])
        speeds = speeds.transpose([layout.order.index(axis) for axis in AXES])
        return (speeds.min((1, 2)), np.ones(1)) if p == 1 else (np.ones(d), speeds.min((0, 2)))

    def stage_sizes(self, layout):
        """Return the layers of every stage: as many each, but the last fewer by what the head weighs. Local.

        Where ranks are unequal, or something is frozen, the dynamic program of :mod:`mpillm.planner.stages` decides; given
        cuts are kept.
        """
        num_layers, stages = self.config.model.num_layers, layout.pipeline * layout.chunks
        given = self.config.layout.stage_cuts
        if given != "auto":
            return np.diff([0, *given, num_layers]).tolist()
        if stages == 1:
            return [num_layers]
        layer, head, _ = self.work(layout, layout.recompute if isinstance(layout.recompute, str) else "none")
        weight = sum(head) / sum(layer)
        if self.machine.speeds or self.freeze:
            speeds = np.tile(self._speeds(layout)[1], layout.chunks)
            costs = (self._layer_works(layout).sum(0) / sum(layer)).tolist()
            cuts = balanced_cuts([*costs[:-1], costs[-1] + weight], stages, self.num_microbatches(layout), speeds)
            return np.diff([0, *cuts, num_layers]).tolist()
        even, most, others = (num_layers - weight * (stages - 1)) / stages, num_layers - stages + 1, stages - 1
        last = min((min(most, max(1, size)) for size in (math.ceil(even), math.floor(even))),
                   key=lambda size: max(size + weight, math.ceil((num_layers - size) / others)))
        each, extra = divmod(num_layers - last, others)
        return [each + 1] * extra + [each] * (others - extra) + [last]

    def work(self, layout, mode, trained=ALL_TRAINED):
        """Return what a layer, of which so much is trained, with one way to recompute costs a microbatch; the head; and the
        embedding. Local."""
        return self._works(layout.microbatch * self.config.train.seq_len, layout.tensor,
                           layout.tensor * layout.stride("tensor"), mode, layout.sequence_parallel, trained)

    def _layers(self, layout):
        """Return of every layer how it recomputes, and what of it is trained."""
        model, modes = self.config.model, layout.recompute
        modes = (modes,) * model.num_layers if isinstance(modes, str) else modes
        return zip(modes, trained_layers(model, self.freeze))

    def _layer_works(self, layout):
        """Return forward, input and weight half of every layer: shape (3, layers)."""
        return np.array([self.work(layout, *layer)[0] for layer in self._layers(layout)]).T

    def _stage_works(self, layout):
        """Return forward, input and weight half of every stage: shape (3, stages)."""
        sizes, modes = np.array(self.stage_sizes(layout)), layout.recompute
        if isinstance(modes, str) and not self.freeze:
            works = np.outer(self.work(layout, modes)[0], sizes)
        else:
            works = np.add.reduceat(self._layer_works(layout), np.cumsum(sizes) - sizes, axis=1)
        _, head, embedding = self.work(layout, "none")
        works[:, 0] += embedding
        works[:, -1] += head
        return works

    def stage_times(self, layout):
        """Return seconds of forward, input and weight half of every stage, messages driven by it included; of a message,
        and those of them for which it keeps the link. Local."""
        times = self._stage_works(layout)
        message_s, link_s, busy_s = self._message_s(layout)
        neighbours = np.full(times.shape[1], 2)
        neighbours[[0, -1]] -= 1
        times[:2] += neighbours * busy_s
        return (times * self._pace(layout)).tolist(), message_s, link_s

    def _pace(self, layout):
        """Return how many times as long as on a rank of speed 1 every stage takes; of one stage on the data rank that ends
        last."""
        if layout.pipeline == 1:
            microbatches = self.num_microbatches(layout)
            return np.full(layout.chunks, self._fullest(layout, microbatches) / microbatches)
        return 1 / np.tile(self._speeds(layout)[1], layout.chunks)

    def _message_s(self, layout):
        """Return the seconds of a message, those of them for which it keeps the link, and what it takes of the ranks at
        its ends."""
        if layout.pipeline == 1:
            return 0.0, 0.0, 0.0
        level = self._message_level(layout)
        n_bytes = layout.microbatch * self.config.train.seq_len * self.config.model.hidden_size * self.item
        n_bytes /= layout.tensor if layout.sequence_parallel else 1
        message_s = float(level.message_s(n_bytes))
        return message_s, message_s - float(level.message_s(0.0)), n_bytes * level.busy_s_per_byte

    def _message_level(self, layout):
        """Return the level of the slowest message of a pipeline."""
        stride = layout.stride("pipeline")
        reach = stride * layout.pipeline
        return self.machine.level_for(reach if reach > self.machine.ranks_per_node else 2 * stride)

    def _make_ends(self, data, p, tensor, chunks, microbatch, sequence_parallel, recompute, order):
        """Return what the ranks but the last and the last have at most: layers, and times of a microbatch as (forward,
        input, weight)."""
        layout = Candidate(data, p, tensor, chunks, "1f1b", microbatch, 0, sequence_parallel, recompute, order)
        sizes = self.stage_sizes(layout)
        if isinstance(recompute, str) and not self.machine.speeds and not self.freeze:
            (layer, head, embedding), (most, own) = self.work(layout, recompute), _dealt(tuple(sizes), p)
            first, last = ([count * each for each in layer] for count in (most, own))
            first = [each + more for each, more in zip(first, embedding)]  # the first rank has most layers
            last = [each + more for each, more in zip(first if p == 1 else last, head)]
            return (most, own), first, last
        speeds, works = self._speeds(layout)[1], self._stage_works(layout).reshape(3, chunks, p).sum(1)
        fullest = int((works.sum(0) / speeds)[:max(1, p - 1)].argmax())
        return (_dealt(tuple(sizes), p), (works[:, fullest] / speeds[fullest]).tolist(),
                (works[:, -1] / speeds[-1]).tolist())

    def ends(self, layout):
        return self._ends(layout.data, layout.pipeline, layout.tensor, layout.chunks, layout.microbatch,
                          layout.sequence_parallel, layout.recompute, layout.order)

    def _price(self, layout):
        """Return the :class:`Price` of a layout; a schedule from a file is played. Local."""
        layers, first, last = self.ends(layout)
        p, v, m = layout.pipeline, layout.chunks, self.num_microbatches(layout)
        busy = self._fullest(layout, m) * max(sum(first), sum(last))
        if p == 1:
            pipeline_s = busy
        elif layout.schedule in SCHEDULES:
            f, i, w = first  # until the last rank has work, and after it
            ramp = {"zb-h1": f + i - w, "zb-h2": f + i - 2 * w}.get(layout.schedule, (f + i + w) / v)
            # A message holds up the ramp there and back, and the steady part once more each way for every round of
            # ranks; a rank has one or two neighbours to drive messages for, each both ways.
            message_s, _, busy_s = self._message_s(layout)
            waits = (2 * (p - 1) * v + 2 * m / p) * message_s + 2 * min(2, p - 1) * m * v * busy_s
            slowest = max(f + i, sum(last[:2]))
            pipeline_s = max(busy + (p - 1) * max(ramp, 0.0), m * slowest + (p - 1) * (f + i) / v) + waits
        else:
            pipeline_s = self.timeline(layout).total_s
        parameters = self.parameters(layout, layers)
        gradients_s = self.reduction.price_s(layout, parameters, max(layers), self.is_split(layout))
        gradients_s += self._clip_s(layout, parameters)
        update_s = self._update_s(layout, parameters)
        return Price(layout, pipeline_s + gradients_s + update_s, pipeline_s, gradients_s, update_s,
                     1 - busy / pipeline_s, float(self.memory_bytes(layout).max()))

    def _fullest(self, layout, microbatches):
        """Return the microbatches of the data rank that ends last, over its speed."""
        shares = self.shares(layout)
        if shares is None:
            return microbatches / (self._speeds(layout)[0].min() if self.machine.speeds else 1.0)
        return max(share / layout.microbatch / speed for share, speed in zip(shares, self._speeds(layout)[0]))

    def num_microbatches(self, layout):
        """Return the microbatches of the fullest data rank. Local."""
        shares = self.shares(layout)
        most = self.config.train.global_batch / layout.data if shares is None else max(shares)
        return math.ceil(most / layout.microbatch)

    def _make_schedule(self, layout):
        """Return the schedule of a layout's pipeline."""
        return named_or_read(layout.schedule, layout.pipeline, self.num_microbatches(layout), layout.chunks)

    def _timeline(self, layout, buckets=()):
        """Return the played step of a layout, its buckets of gradients beside it. Local."""
        times, *message = self.stage_times(layout)
        return play(self._schedule(layout), *times, *message, buckets, self.shares_link(layout))

    def shares_link(self, layout):
        """Tell whether gradients and messages of a pipeline leave a rank the same way. Local."""
        return layout.pipeline > 1 and self._message_level(layout) is self.reduction.level(layout)

    def is_split(self, layout):
        """Tell whether input and weight halves are actions of their own."""
        if layout.schedule in SCHEDULES:
            return layout.schedule.startswith("zb")
        return any(action.kind == "W" for row in self._schedule(layout).actions for action in row)

    def buckets(self, price):
        """Return the buckets of gradients of every stage of a played layout, ``()`` if there are none. Local."""
        layout = price.layout
        if layout.data == 1:
            return ()
        return self.reduction.buckets(layout, self.stage_sizes(layout), self._pace(layout), price.bucket_cuts or (),
                                      self.is_split(layout))

    def _synthesised(self, price, limit_bytes):
        """Return the price of a layout with a schedule made for its times and messages within a limit of memory, which
        the layout then holds as text; or the price as it is, if that is no faster. Local."""
        layout, p = price.layout, price.layout.pipeline
        kept, split, beside = self.kept(layout)
        left = limit_bytes - self.footprint.fixed(layout, self.stage_sizes(layout)) - beside.max(1)
        times, message_s, link_s = self.stage_times(layout)
        most = min(max(1, int((left / np.maximum(kept, split)).min() * layout.chunks)), DEEPEST * p)
        made = synthesise(p, self.num_microbatches(layout), *times, message_s, most, link_s=link_s)
        found = self.played(self.price(replace(layout, schedule=made.schedule.to_text())))
        return found if found.step_s < CLEARLY * price.step_s and found.memory_bytes <= limit_bytes else price

    def _played(self, price):
        """Return the price with times and bubble from the played step, and the buckets that go with it. Local."""
        layout, cuts = price.layout, self.config.layout.bucket_cuts
        overlaps = self.reduction.overlaps(layout)
        if cuts == "auto" and overlaps:
            completed_s = unhindered_s(self._schedule(layout), *self.stage_times(layout)[0])
            cuts = self.reduction.cuts(layout, self.stage_sizes(layout), self._pace(layout), completed_s,
                                       self.is_split(layout))
        elif cuts == "auto":
            cuts = ()
        if overlaps:
            timeline = self.timeline(layout, self.buckets(replace(price, bucket_cuts=cuts)))
            parameters = self.parameters(layout, self.ends(layout)[0])
            gradients_s = (timeline.reduced_s - timeline.total_s + self.reduction.gathered_s(layout, parameters)
                           + self._clip_s(layout, parameters))
        else:
            timeline, gradients_s = self.timeline(layout), price.gradients_s
        return replace(price, step_s=timeline.total_s + gradients_s + price.update_s, pipeline_s=timeline.total_s,
                       gradients_s=gradients_s, bubble_fraction=timeline.bubble_fraction, bucket_cuts=cuts)

    def parameters(self, layout, layers):
        """Return the parameters that the fullest rank trains. Local."""
        if self.freeze:  # of every layer others
            return int(self.footprint.updated(layout, self.stage_sizes(layout)).max())
        sizes, (first, last) = trained_sizes(self.config.model, (), layout.tensor, self.is_exact), layers
        layer = sizes.layers[0]
        if layout.pipeline == 1:
            return first * layer + sizes.first + sizes.last - sizes.shared
        return max(first * layer + sizes.first, last * layer + sizes.last)

    def _clip_s(self, layout, parameters):
        """Return the seconds of the norm of the gradient, which reads it, and of scaling it down."""
        own, passes = parameters / (layout.data if layout.zero else 1), 3 if self.config.train.grad_clip else 1
        return passes * own * max(4, self.item) / self.machine.memory_bytes_per_s

    def _update_s(self, layout, parameters):
        """Return the seconds of the optimiser with what it touches, of the weights' way back to the data ranks, and of
        setting gradients to zero: what is overwritten is read first."""
        states, wide = num_states(self.config.train), max(4, self.item)
        own = parameters / (layout.data if layout.zero else 1)
        touched = own * wide * (3 + 2 * states) + parameters * (2 * wide + (self.item if self.item < wide else 0))
        if self.config.train.digests:  # of weights and state, after this update and before the next
            touched += 2 * (parameters * self.item + own * wide * self._num_masters())
        return touched / self.machine.memory_bytes_per_s + self.reduction.weights_s(layout, parameters)

    def _num_masters(self):
        """Return the vectors that an optimiser keeps beside weights and gradients: its state, and of half types masters."""
        return num_states(self.config.train) + (self.item == 2)

    def memory_bytes(self, layout):
        """Return the most memory of every pipeline rank. Local."""
        kept, split, beside = self.kept(layout)
        return self.footprint.peaks(layout, self.stage_sizes(layout), kept, split, beside, self.held(layout),
                                    self.num_microbatches(layout)).max(1)

    def kept(self, layout):
        """Return the bytes that a microbatch in flight keeps on every pipeline rank before its input half, and after it;
        and what the rank needs beside. Local."""
        footprint, sizes, layers = self.footprint, self.stage_sizes(layout), list(self._layers(layout))
        each = {layer: footprint.layer(layout, *layer) for layer in set(layers)}
        kept, split = (np.add.reduceat(row, np.cumsum(sizes) - sizes).reshape(layout.chunks, -1).sum(0) for row in zip(
            *((each[layer].kept, each[layer].split) for layer in layers)))
        beside = footprint.beside(layout, sizes, {mode for mode, _ in layers}, self.is_split(layout))
        return kept + footprint.ends(layout, sizes), split + footprint.waiting(layout), beside

    def held(self, layout):
        """Return the microbatches in flight of every pipeline rank, as :func:`mpillm.planner.footprint.in_flight`. Local."""
        if layout.schedule not in SCHEDULES:
            return points(self._schedule(layout))
        return in_flight(layout.schedule, layout.pipeline, self.num_microbatches(layout), layout.chunks)

    def bound_s(self):
        """Return a time that no layout can beat: all products at the best rate, shared as ranks are fast. Local."""
        train = self.config.train
        flops = step_flops(self.config.model, train.seq_len, train.global_batch * train.seq_len, train.freeze)
        return flops / (sum(self.machine.speeds) or self.ranks) / max(rate for _, rate in self.machine.matmul)


@lru_cache(maxsize=4096)
def _dealt(sizes, p):
    """Return of the layers of stages, dealt to ``p`` ranks, the most of any rank but the last, and those of the last."""
    layers = [sum(sizes[rank::p]) for rank in range(p)]
    return max(layers[:-1], default=layers[0]), layers[-1]

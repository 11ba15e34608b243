"""Every layout, pruned, priced and ranked: the planner's one entry point, :func:`make_plan`."""

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

from mpillm.config import AXES
from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE, DecisionTable, Plan
from mpillm.planner.hierarchy import decide
from mpillm.planner.timeline import play
from mpillm.planner.workload import (
    ITEM_BYTES,
    STATES,
    head_work,
    layer_parameters,
    layer_work,
    ring_s,
    step_flops,
)
from mpillm.schedules.pipeline import make_schedule

PLAYED_ACTIONS = 50_000  # of the best layouts, those are played whose schedules together have no more actions


@dataclass(frozen=True)
class Layout:
    """One way to split the work; the names are those of the configuration."""

    data: int
    pipeline: int
    tensor: int
    chunks: int
    schedule: str
    microbatch: int
    zero: int
    sequence_parallel: bool
    recompute: str


@dataclass(frozen=True)
class Price:
    """What a layout costs: the step and its parts in seconds, the memory of the fullest rank in bytes."""

    layout: Layout
    step_s: float
    pipeline_s: float
    gradients_s: float
    update_s: float
    bubble_fraction: float
    memory_bytes: float


class Pricer:
    """Prices layouts of one configuration on one machine; keeps what many layouts share.

    Local. :meth:`price` takes microseconds: the pipeline by its closed form (Qi et al. 2024; Narayanan et al. 2021).
    :meth:`played` takes the schedule action by action, which is right also where microbatches are too few to fill it.
    """

    def __init__(self, config, machine, ranks):
        self.config, self.machine, self.ranks = config, machine, ranks
        self.item = ITEM_BYTES[config.train.dtype]
        self._works = lru_cache(None)(self._make_works)
        self._ends = lru_cache(None)(self._make_ends)

    def _make_works(self, tokens, tensor, recompute, sequence_parallel):
        model, machine, seq_len = self.config.model, self.machine, self.config.train.seq_len
        return (layer_work(model, machine, seq_len, tokens, tensor, self.item, recompute, sequence_parallel),
                head_work(model, machine, tokens, tensor, self.item))

    def stage_sizes(self, layout):
        """Return the layers of every stage: as many each, but the last fewer by what the head weighs. Local."""
        num_layers, stages = self.config.model.num_layers, layout.pipeline * layout.chunks
        if stages == 1:
            return [num_layers]
        layer, head = self._works(layout.microbatch * self.config.train.seq_len, layout.tensor, layout.recompute,
                                  layout.sequence_parallel)
        weight = (head.forward_s + head.input_s + head.weight_s) / (layer.forward_s + layer.input_s + layer.weight_s)
        even, most, others = (num_layers - weight * (stages - 1)) / stages, num_layers - stages + 1, stages - 1
        last = min((min(most, max(1, size)) for size in (math.ceil(even), math.floor(even))),
                   key=lambda size: max(size + weight, math.ceil((num_layers - size) / others)))
        each, extra = divmod(num_layers - last, others)
        return [each + 1] * extra + [each] * (others - extra) + [last]

    def stage_times(self, layout):
        """Return seconds of forward, input and weight half of every stage, and of a message. Local."""
        layer, head = self._works(layout.microbatch * self.config.train.seq_len, layout.tensor, layout.recompute,
                                  layout.sequence_parallel)
        sizes = self.stage_sizes(layout)
        times = [[size * each for size in sizes] for each in (layer.forward_s, layer.input_s, layer.weight_s)]
        for row, more in zip(times, (head.forward_s, head.input_s, head.weight_s)):
            row[-1] += more
        return times, self._message_s(layout)

    def _message_s(self, layout):
        if layout.pipeline == 1:
            return 0.0
        reach = layout.tensor * layout.pipeline
        level = self.machine.level_for(reach if reach > self.machine.ranks_per_node else 2 * layout.tensor)
        n_bytes = layout.microbatch * self.config.train.seq_len * self.config.model.hidden_size * self.item
        return level.alpha_s + n_bytes / (layout.tensor if layout.sequence_parallel else 1) * level.beta_s_per_byte

    def _make_ends(self, pipeline, chunks, microbatch, tensor, recompute, sequence_parallel):
        """Return what the first and the last rank hold, between which all others are: layers, and times of a
        microbatch as (forward, input, weight)."""
        layout = Layout(1, pipeline, tensor, chunks, "1f1b", microbatch, 0, sequence_parallel, recompute)
        layer, head = self._works(microbatch * self.config.train.seq_len, tensor, recompute, sequence_parallel)
        sizes = self.stage_sizes(layout)
        layers = sum(sizes[::pipeline]), sum(sizes[pipeline - 1::pipeline])
        first, last = ([count * each for each in (layer.forward_s, layer.input_s, layer.weight_s)] for count in layers)
        last = [own + more for own, more in zip(last, (head.forward_s, head.input_s, head.weight_s))]
        return layers, first, last, layer, head, self._message_s(layout)

    def _of(self, layout):
        return self._ends(layout.pipeline, layout.chunks, layout.microbatch, layout.tensor, layout.recompute,
                          layout.sequence_parallel)

    def price(self, layout):
        """Return the :class:`Price` of a layout. Local."""
        _, first, last, _, _, message = self._of(layout)
        p, v = layout.pipeline, layout.chunks
        m = self.num_microbatches(layout)
        f, i, w = map(max, first, last)
        busy = m * max(sum(first), sum(last))
        ramp = {"gpipe": f + i + w, "1f1b": f + i + w, "interleaved": (f + i + w) / v, "zb-h1": f + i - w,
                "zb-h2": f + i - 2 * w}[layout.schedule]
        # A message holds up the ramp there and back, and the steady part once more each way for every round of ranks.
        waits = (2 * (p - 1) * v + 2 * m / p) * message if p > 1 else 0.0
        pipeline_s = busy + (p - 1) * max(ramp, 0.0) + waits
        gradients_s, update_s = self._update(layout)
        return Price(layout, pipeline_s + gradients_s + update_s, pipeline_s, gradients_s, update_s,
                     1 - busy / pipeline_s, self._memory_bytes(layout, m))

    def num_microbatches(self, layout):
        """Return the microbatches of the fullest data rank. Local."""
        return math.ceil(self.config.train.global_batch / (layout.microbatch * layout.data))

    def timeline(self, layout):
        """Return the played schedule of a layout's pipeline. Local."""
        times, message = self.stage_times(layout)
        made = make_schedule(layout.schedule, layout.pipeline, self.num_microbatches(layout), layout.chunks)
        return play(made, *times, message)

    def played(self, price):
        """Return the price with the pipeline's time and bubble from the played schedule. Local."""
        timeline = self.timeline(price.layout)
        step_s = timeline.total_s + price.gradients_s + price.update_s
        return replace(price, step_s=step_s, pipeline_s=timeline.total_s, bubble_fraction=timeline.bubble_fraction)

    def _parameters(self, layout):
        """Return the parameters of the fullest rank."""
        model, (first, last) = self.config.model, self._of(layout)[0]
        table, each = model.vocab_size * model.hidden_size, layer_parameters(model)
        if layout.pipeline == 1:
            return (first * each + table * (1 if model.tie_embeddings else 2)) / layout.tensor
        return (max(first, last) * each + table) / layout.tensor

    def _update(self, layout):
        """Return the seconds of reducing gradients, and of the optimiser with what it touches."""
        d, inner = layout.data, layout.tensor * layout.pipeline
        parameters, machine = self._parameters(layout), self.machine
        n_bytes, reduce_s = parameters * max(4, self.item), 0.0
        inside = min(d, max(1, machine.ranks_per_node // inner))
        keeps_one_copy = machine.shares_memory and layout.zero == 1 and inside == d
        if inside > 1:
            reduce_s += ring_s(machine.levels[0], inside, n_bytes, passes=1 if keeps_one_copy else 2)
        if d > inside:
            level = machine.level_for(inner * d)
            reduce_s += ring_s(level, math.ceil(d / inside), n_bytes / inside)
        states = STATES[self.config.train.optimizer]
        own = parameters / (d if layout.zero else 1)
        touched = own * 4 * (3 + 2 * states) + parameters * (4 + self.item)
        return reduce_s, touched / machine.memory_bytes_per_s

    def _memory_bytes(self, layout, microbatches):
        layers, _, _, layer, head, _ = self._of(layout)
        p, v, item = layout.pipeline, layout.chunks, self.item
        held = {"gpipe": microbatches, "1f1b": p, "zb-h1": p, "zb-h2": 2 * p - 1,
                "interleaved": p * (1 + (p - 1) / (p * v))}[layout.schedule]
        masters = STATES[self.config.train.optimizer] + (item == 2)
        shards = layout.data if layout.zero else 1
        state = self._parameters(layout) * (item + max(4, item) * (1 + masters / shards))
        again = 0.0
        if layout.recompute == "full":  # one layer at a time is there as a whole
            again = self._works(layout.microbatch * self.config.train.seq_len, layout.tensor, "none",
                                layout.sequence_parallel)[0].kept_bytes
        return state + min(held, microbatches) * max(layers) * layer.kept_bytes + head.kept_bytes + again

    def bound_s(self):
        """Return a time that no layout can beat: all products at the best rate, shared evenly. Local."""
        train = self.config.train
        flops = step_flops(self.config.model, train.seq_len, train.global_batch * train.seq_len)
        return flops / self.ranks / max(rate for _, rate in self.machine.matmul)


def layouts(config, ranks, machine):
    """Yield every layout that the configuration leaves open and the model admits. Local."""
    wanted, model, train = config.layout, config.model, config.train

    def allowed(key, values):
        fixed = getattr(wanted, key)
        return [value for value in values if fixed in ("auto", value)] if isinstance(fixed, (str, int)) else []

    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    tensors = [t for t in allowed("tensor", divisors) if t <= model.num_heads]
    if wanted.tensor == "auto":
        tensors = [t for t in tensors if t <= max(1, machine.ranks_per_node)] or tensors[:1]
    exact = train.numerics == "exact"
    for tensor in tensors:
        for pipeline in allowed("pipeline", [n for n in divisors if ranks // tensor % n == 0]):
            data = ranks // tensor // pipeline
            if data > train.global_batch or pipeline > model.num_layers or data not in allowed("data", [data]):
                continue
            if exact and (data & (data - 1) or train.exact_blocks % tensor):
                continue
            sizes = [train.microbatch] if train.microbatch else [
                b for b in range(1, train.global_batch // data + 1) if train.global_batch % (b * data) == 0]
            for microbatch in sizes:
                if math.ceil(train.global_batch / microbatch) < data:
                    continue
                for schedule, chunks in _schedules(pipeline, model.num_layers, wanted):
                    for zero in allowed("zero", (0, 1) if data > 1 else (0,)) or [wanted.zero]:
                        for sequence_parallel in allowed("sequence_parallel", (False, True) if tensor > 1 else
                                                         (False,)) or [wanted.sequence_parallel]:
                            for recompute in _recompute(wanted):
                                yield Layout(data, pipeline, tensor, chunks, schedule, microbatch, zero,
                                             sequence_parallel, recompute)


def _schedules(pipeline, num_layers, wanted):
    """Return pairs of schedule and chunks that the configuration leaves open."""
    if pipeline == 1:
        pairs = [("1f1b", 1)]
    else:
        pairs = [(name, 1) for name in ("1f1b", "zb-h1", "zb-h2")]  # gpipe is as long as 1f1b and holds more
        pairs += [("gpipe", 1)] if wanted.schedule == "gpipe" else []
        pairs += [("interleaved", v) for v in (2, 3, 4, 6, 8) if pipeline * v <= num_layers]
    if pipeline > 1 or wanted.schedule in ("1f1b", "auto"):
        found = [pair for pair in pairs if wanted.schedule in ("auto", pair[0]) and wanted.chunks in ("auto", pair[1])]
        return found
    return [(wanted.schedule, 1 if wanted.chunks == "auto" else wanted.chunks)]


def _recompute(wanted):
    if wanted.recompute == "auto":
        return ("none", "selective", "full")
    return (wanted.recompute,) if isinstance(wanted.recompute, str) else ()


def make_plan(config, machine, ranks, top=5):
    """Choose how to train a model on a machine.

    Local; needs no data, no MPI and no accelerator. All layouts are priced by closed forms, the cheapest ones then by
    playing their schedules. Where none fits the memory, the answer is an error
    that names the one that needs the least.

    Parameters
    ----------
    config : Config
        With ``model.vocab_size``; what ``[layout]`` fixes is kept.
    machine : Machine
    ranks : int
    top : int
        How many alternatives to keep.

    Returns
    -------
    Plan

    Raises
    ------
    ConfigError
        When no layout is left, or none fits.
    """
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size is not given, and there is no data to take it from: set it "
                          "(--model.vocab_size N)")
    if machine.num_ranks not in (0, ranks):
        raise ConfigError(f"machine {machine.name} was measured with {machine.num_ranks} ranks, the plan is for "
                          f"{ranks}: run mpillm probe with {ranks} ranks")
    pricer = Pricer(config, machine, ranks)
    priced = sorted(map(pricer.price, layouts(config, ranks, machine)), key=_rank)
    if not priced:
        raise ConfigError(f"no layout of {ranks} ranks is left: {config.layout.sizes()} with {config.model.num_heads} "
                          f"heads, {config.model.num_layers} layers and {config.train.global_batch} sequences; leave "
                          "more of [layout] open, or take another number of ranks")
    fitting = [price for price in priced if price.memory_bytes <= machine.memory_bytes]
    if not fitting:
        least = min(priced, key=lambda price: price.memory_bytes)
        raise ConfigError(
            f"no layout of {ranks} ranks fits {machine.memory_bytes / 1e9:.4g} GB a rank: the least is "
            f"{least.memory_bytes / 1e9:.4g} GB with {describe(least.layout)}; take at least "
            f"{math.ceil(ranks * least.memory_bytes / machine.memory_bytes)} ranks, or a smaller model or microbatch")
    fitting = _played_first(pricer, fitting)
    best = fitting[0]
    return Plan(
        ranks, machine.num_nodes or math.ceil(ranks / machine.ranks_per_node),
        _table(machine, ranks), model=asdict(config.model),
        layout=to_config(best.layout, pricer),
        predicted={"step_s": best.step_s, "bubble_fraction": best.bubble_fraction,
                   "memory_bytes_per_rank": best.memory_bytes, "lower_bound_s": pricer.bound_s(),
                   "pipeline_s": best.pipeline_s, "gradients_s": best.gradients_s, "update_s": best.update_s},
        binding=_binding(pricer, best, priced),
        alternatives=[{"layout": to_config(price.layout, pricer), "step_s": price.step_s,
                       "memory_bytes_per_rank": price.memory_bytes} for price in sorted(fitting[1:top + 1], key=_rank)],
    )


def _table(machine, ranks):
    """Return the measured table; without one, shared memory inside a node, else what the levels make best."""
    if machine.table:
        return DecisionTable(machine.table)
    return DEFAULT_TABLE if machine.shares_memory and ranks <= machine.ranks_per_node else decide(machine, ranks)


def _rank(price):
    """Order prices; among equals the simpler and the leaner first."""
    layout = price.layout
    return price.step_s, layout.pipeline, layout.tensor, layout.chunks, price.memory_bytes


def to_config(layout, pricer):
    """Return the keys of ``[layout]``, and the microbatch, that a layout stands for. Local."""
    sizes, cuts = pricer.stage_sizes(layout), []
    for size in sizes[:-1]:
        cuts.append(size + (cuts[-1] if cuts else 0))
    return {**asdict(layout), "stage_cuts": cuts, "order": list(AXES)}


def describe(layout):
    """Return a layout in one line of words. Local."""
    shown = layout if isinstance(layout, dict) else asdict(layout)
    text = f"data={shown['data']} pipeline={shown['pipeline']} tensor={shown['tensor']}"
    text += f" microbatch={shown['microbatch']}"
    if shown["pipeline"] > 1:
        text += f" {shown['schedule']}" + (f" chunks={shown['chunks']}" if shown["chunks"] > 1 else "")
    text += f" zero={shown['zero']}" if shown["data"] > 1 else ""
    text += " sequence-parallel" if shown["sequence_parallel"] else ""
    return text + (f" recompute={shown['recompute']}" if shown["recompute"] != "none" else "")


def predicted_timeline(plan, config, machine):
    """Play the pipeline of a plan that was made for this configuration and machine. Local."""
    layout = Layout(**{field.name: plan.layout[field.name] for field in fields(Layout)})
    return Pricer(config, machine, plan.num_ranks).timeline(layout)


def _played_first(pricer, priced):
    """Return prices with the cheapest ones played, as many as :data:`PLAYED_ACTIONS` allows, and ranked anew."""
    left, played = PLAYED_ACTIONS, []
    for price in priced:
        layout = price.layout
        left -= 3 * layout.pipeline * layout.chunks * pricer.num_microbatches(layout)
        if left < 0:
            break
        played.append(pricer.played(price))
    return sorted(played, key=_rank) + priced[len(played):]


def _binding(pricer, best, priced):
    """Return what limits the plan, and what a unit more of each is worth: the layout priced again with 1 % more.

    Memory is worth what the next faster layout saves, over the bytes that it lacks: nothing where the fastest fits.
    """
    machine, found = pricer.machine, []
    is_played = best != pricer.price(best.layout)

    def price_on(other):
        changed = Pricer(pricer.config, other, pricer.ranks)
        price = changed.price(best.layout)
        return (changed.played(price) if is_played else price).step_s

    base = price_on(machine)
    figures = [("matmul", max(rate for _, rate in machine.matmul)), ("memory_bytes_per_s", machine.memory_bytes_per_s)]
    figures += [(what, getattr(machine, what)) for what in ("elementwise_bytes_per_s", "attention_flops_per_s")
                if getattr(machine, what)]
    figures += [(level.name, 1 / level.beta_s_per_byte) for level in machine.levels if level.beta_s_per_byte]
    for what, limit in figures:
        gain = (base - price_on(machine.scaled(what, 1.01))) / (0.01 * limit)
        if gain > 0:
            found.append({"what": what, "value": limit, "limit": limit, "price_s_per_unit": gain})
    lacking = [(price.memory_bytes - machine.memory_bytes, best.step_s - price.step_s) for price in priced
               if price.memory_bytes > machine.memory_bytes and price.step_s < best.step_s]
    worth = max((gain / lack for lack, gain in lacking), default=0.0)
    found.append({"what": "memory_bytes", "value": best.memory_bytes, "limit": machine.memory_bytes,
                  "price_s_per_unit": worth})
    return sorted(found, key=lambda one: -one["price_s_per_unit"] * one["limit"])


def price_layout(config, machine, ranks):
    """Return the plan of the layout that the configuration itself has, without a search. Local."""
    resolved = config.resolve(ranks)
    layout = replace(resolved.layout, stage_cuts="auto")
    return make_plan(replace(resolved, layout=layout), machine, ranks, top=0)

"""Every layout, pruned, priced and ranked: the planner's one entry point, :func:`make_plan`."""

import math
from dataclasses import asdict, replace

from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE, DecisionTable, Plan
from mpillm.planner.balance import price_speeds
from mpillm.planner.hierarchy import decide
from mpillm.planner.pricing import RECOMPUTE, Layout, Pricer, describe, to_config
from mpillm.planner.timeline import play
from mpillm.planner.volume import step_volume
from mpillm.schedules.pipeline import named_or_read

MIXED = 20  # so many of the most promising layouts are tried with layers that recompute each in its own way
PLAYED_ACTIONS = 50_000  # of the best layouts, those are played whose schedules together have no more actions


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
    return RECOMPUTE if wanted.recompute == "auto" else (wanted.recompute,)


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
    priced = list(map(pricer.price, layouts(config, ranks, machine)))
    if config.layout.recompute == "auto":
        priced += _mixtures(pricer, priced)
    priced.sort(key=_rank)
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
    (forward_s, input_s, weight_s), message_s = pricer.stage_times(best.layout)
    chosen = Plan(ranks, machine.num_nodes or math.ceil(ranks / machine.ranks_per_node), _table(machine, ranks),
                  model=asdict(config.model), layout=to_config(best, pricer))
    return replace(
        chosen,
        predicted={"step_s": best.step_s, "bubble_fraction": best.bubble_fraction,
                   "memory_bytes_per_rank": best.memory_bytes, "lower_bound_s": pricer.bound_s(),
                   "pipeline_s": best.pipeline_s, "gradients_s": best.gradients_s, "update_s": best.update_s,
                   "stages": {"forward_s": forward_s, "input_s": input_s, "weight_s": weight_s, "message_s": message_s,
                              "microbatches": pricer.num_microbatches(best.layout)},
                   "volume": step_volume(chosen.applied_to(config).resolve(ranks),
                                         pricer.reduction.keeps_one_copy(best.layout))},
        binding=_binding(pricer, best, priced),
        alternatives=[{"layout": to_config(price, pricer), "step_s": price.step_s,
                       "memory_bytes_per_rank": price.memory_bytes} for price in sorted(fitting[1:top + 1], key=_rank)],
    )


def _mixtures(pricer, priced):
    """Return prices of layouts that recompute in some layers only, where that beats all that treat layers alike.

    Mixing pays where one way to recompute is fast and does not fit and another fits. Its time is bounded by the
    faster one's; the most promising, by the mean of both that would just fit, come first.
    """
    limit = pricer.machine.memory_bytes
    best = min((price.step_s for price in priced if price.memory_bytes <= limit), default=math.inf)
    ways, candidates = len(RECOMPUTE), []
    for alike in (priced[i:i + ways] for i in range(0, len(priced), ways)):
        faster = [price for price in alike if price.step_s < best and price.memory_bytes > limit]
        guesses = [lean.step_s + (limit - lean.memory_bytes) / (fast.memory_bytes - lean.memory_bytes)
                   * (fast.step_s - lean.step_s)
                   for fast in faster for lean in alike if lean.memory_bytes <= limit and lean.step_s > fast.step_s]
        if guesses:
            bound = min(price.step_s for price in faster)
            candidates.append((min(guesses), bound, alike[0].layout))
    found = []
    for _, bound, layout in sorted(candidates, key=lambda one: one[0])[:MIXED]:
        if bound < best:
            price = pricer.mixed(layout, limit)
            if len(set(price.layout.recompute)) > 1:
                found.append(price)
                best = min(best, price.step_s)
    return found


def _table(machine, ranks):
    """Return the measured table; without one, shared memory inside a node, else what the levels make best."""
    if machine.table:
        return DecisionTable(machine.table)
    return DEFAULT_TABLE if machine.shares_memory and ranks <= machine.ranks_per_node else decide(machine, ranks)


def _rank(price):
    """Order prices; among equals the simpler and the leaner first."""
    layout = price.layout
    return price.step_s, layout.pipeline, layout.tensor, layout.chunks, price.memory_bytes


def predicted_timeline(plan):
    """Play the pipeline of a plan as it was priced. Local."""
    layout, stages = plan.layout, plan.predicted["stages"]
    made = named_or_read(layout["schedule"], layout["pipeline"], stages["microbatches"], layout["chunks"])
    return play(made, stages["forward_s"], stages["input_s"], stages["weight_s"], stages["message_s"])


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

    Memory is worth the dual of its limit where layers were mixed to fit into it; else what the next faster layout
    saves, over the bytes that it lacks: nothing where the fastest fits.
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
    if best.layout.pipeline > 1:
        figures += [(f"speed of rank {rank}", speed) for rank, speed in enumerate(machine.speeds)]
    found += price_speeds(pricer.config.train.global_batch, pricer._speeds(best.layout)[0], best.pipeline_s)
    for what, limit in figures:
        gain = (base - price_on(machine.scaled(what, 1.01))) / (0.01 * limit)
        if gain > 0:
            found.append({"what": what, "value": limit, "limit": limit, "price_s_per_unit": gain})
    lacking = [(price.memory_bytes - machine.memory_bytes, best.step_s - price.step_s) for price in priced
               if price.memory_bytes > machine.memory_bytes and price.step_s < best.step_s]
    worth = best.memory_price_s or max((gain / lack for lack, gain in lacking), default=0.0)
    found.append({"what": "memory_bytes", "value": best.memory_bytes, "limit": machine.memory_bytes,
                  "price_s_per_unit": worth})
    return sorted(found, key=lambda one: -one["price_s_per_unit"] * one["limit"])


def price_layout(config, machine, ranks):
    """Return the plan of the layout that the configuration itself has, without a search. Local."""
    resolved = config.resolve(ranks)
    layout = replace(resolved.layout, stage_cuts="auto")
    return make_plan(replace(resolved, layout=layout), machine, ranks, top=0)

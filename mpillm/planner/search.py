"""Every layout, pruned by its memory, priced and ranked: the planner's one entry point, :func:`make_plan`."""

import math
from dataclasses import asdict, replace
from itertools import product

from mpillm.config import AXES
from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE, DecisionTable, Plan
from mpillm.planner.balance import price_speeds
from mpillm.planner.hierarchy import decide
from mpillm.planner.keys import describe, to_config
from mpillm.planner.layout_costs import RECOMPUTE, Candidate, Pricer
from mpillm.planner.mixtures import mixtures
from mpillm.planner.timeline import BucketTimes, play
from mpillm.planner.volume import step_volume
from mpillm.schedules.formats import named_or_read, read_schedule
from mpillm.schedules.pipeline import SCHEDULES, make_schedule

CHUNKS = (2, 3, 4, 6, 8)
PLAYED_ACTIONS = 50_000  # of the best layouts, those are played whose schedules together have no more actions
SYNTHESISED_ACTIONS = 2_000  # in all of the schedules that are made to measure; each takes a dozen trials
MORE = 1.01  # of a limit, for the price of a unit of it
MOST_DOUBLINGS = 10  # of the ranks, to find so many that a model fits


def layouts(config, ranks, machine, admits=lambda leanest: True):
    """Yield every layout that the configuration leaves open and the model admits, but for those that another beats.

    Local. Left out are a replicated optimiser where a sharded one may be (as fast and leaner), and gpipe unless asked
    for (as long as 1f1b, and holds more).

    Parameters
    ----------
    config : Config
    ranks : int
    machine : Machine
    admits : callable
        Of layouts that differ only in order, sequence parallelism and recompute, those with the least activations are
        shown to it; unless it admits one of them, all are left out. Where it admits none of a microbatch, larger ones,
        which hold more, are not tried.

    Yields
    ------
    Candidate
    """
    wanted = config.layout
    ways = RECOMPUTE if wanted.recompute == "auto" else (wanted.recompute,)
    given = None if wanted.schedule in ("auto", *SCHEDULES) else read_schedule(wanted.schedule)
    if wanted.schedule in SCHEDULES and wanted.chunks != "auto":
        make_schedule(wanted.schedule, 1, 1, wanted.chunks)  # refuses what it cannot have
    for data, pipeline, tensor in _degrees(config, ranks, machine):
        zero = int(data > 1) if wanted.zero == "auto" else wanted.zero
        parallel = (False, True)[:tensor] if wanted.sequence_parallel == "auto" else (wanted.sequence_parallel,)
        first, *others = _orders(wanted, data, pipeline, tensor, machine)
        for microbatch in _microbatches(config, data):
            found = [[Candidate(data, pipeline, tensor, chunks, schedule, microbatch, zero, is_parallel, recompute, first)
                      for is_parallel in parallel for recompute in ways]
                     for schedule, chunks in _schedules(wanted, pipeline, given)
                     if _is_possible(config, data, pipeline, chunks, microbatch, given)]
            admitted = [one for alike in found if any(map(admits, alike[:-len(ways) - 1:-1])) for one in alike]
            yield from admitted
            for order in others:
                yield from (replace(one, order=order) for one in admitted)
            if found and not admitted:
                break


def _is_possible(config, data, pipeline, chunks, microbatch, given):
    """Tell whether layers are enough for the stages, microbatches for the data ranks, and both for what is given."""
    stages, microbatches = pipeline * chunks, math.ceil(config.train.global_batch / microbatch)
    cuts = config.layout.stage_cuts
    return (stages <= config.model.num_layers and microbatches >= data and (cuts == "auto" or len(cuts) == stages - 1)
            and (given is None or (given.num_ranks, given.num_stages, given.num_microbatches * data)
                 == (pipeline, stages, microbatches)))


def _degrees(config, ranks, machine):
    """Yield the sizes of data, pipeline and tensor axis; where left open, tensor ranks share a node."""
    wanted, model, train = config.layout, config.model, config.train
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for tensor, pipeline in product(divisors, divisors):
        data = ranks // (tensor * pipeline)
        sizes = data, pipeline, tensor
        if (data * pipeline * tensor == ranks
                and all(fixed in ("auto", size) for fixed, size in zip(wanted.sizes().values(), sizes))
                and (wanted.tensor != "auto" or tensor <= machine.ranks_per_node)
                and tensor <= model.num_heads and pipeline <= model.num_layers and data <= train.global_batch
                and (wanted.shares == "auto" or len(wanted.shares) == data)
                and (train.numerics != "exact" or not data & (data - 1) and train.exact_blocks % tensor == 0)):
            yield sizes


def _orders(wanted, data, pipeline, tensor, machine):
    """Return the orders of axes: tensor ranks next to each other; which other axis leaves the node is open, where more
    than tensor ranks have room there."""
    if wanted.order != "auto":
        return [wanted.order]
    ranks = data * pipeline * tensor
    is_open = data > 1 < pipeline and any(tensor < level.size < ranks for level in machine.levels)
    return [AXES, ("pipeline", "data", "tensor")] if is_open else [AXES]


def _microbatches(config, data):
    """Return sizes of a microbatch: divisors of what a data rank gets; where ranks get unequal parts, for every number
    of microbatches the least size."""
    batch, shares = config.train.global_batch, config.layout.shares
    if config.train.microbatch:
        return [config.train.microbatch]
    if shares == "auto" and batch % data == 0:
        return [size for size in range(1, batch // data + 1) if batch % (size * data) == 0]
    most = math.ceil(batch / data) if shares == "auto" else max(shares)
    return sorted({math.ceil(most / count) for count in range(1, most + 1)})


def _schedules(wanted, pipeline, given):
    """Return pairs of schedule and chunks; ``given`` is the schedule of a file."""
    name, chunks = wanted.schedule, wanted.chunks
    plain = ("1f1b", "zb-h1", "zb-h2") if pipeline > 1 else ("1f1b",)
    if chunks != "auto":
        return [(each, chunks) for each in ([name] if name != "auto" else ["interleaved"] if chunks > 1 else plain)]
    if given:
        return [(name, given.num_stages // given.num_ranks)]
    names = [name] if name != "auto" else [*plain, "interleaved"] if pipeline > 1 else plain
    return [(each, count) for each in names for count in (CHUNKS if each == "interleaved" and pipeline > 1 else (1,))]


def make_plan(config, machine, ranks, top=5):
    """Choose how to train a model on a machine.

    Local; needs no data, no MPI and no accelerator. What may fit is priced by closed forms, the cheapest layouts then
    by playing their schedules. Where none fits the memory, the answer is an error that names the one that needs the
    least, and how many ranks would do.

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
    missing = config.model.missing
    if missing:
        raise ConfigError(f"model.{missing} is not given, and there is no data to take it from: set it (--model.{missing} N)")
    if machine.num_ranks not in (0, ranks):
        raise ConfigError(f"machine {machine.name} was measured with {machine.num_ranks} ranks, the plan is for "
                          f"{ranks}: run mpillm probe with {ranks} ranks")
    pricer, limit = Pricer(config, machine, ranks), machine.memory_bytes
    priced = _priced(pricer, MORE * limit)
    fitting = _ranked(pricer, priced, limit)
    if not fitting:
        raise ConfigError(_too_small(pricer))
    best = fitting[0]
    (forward_s, input_s, weight_s), message_s, link_s = pricer.stage_times(best.layout)
    chosen = Plan(ranks, machine.num_nodes or math.ceil(ranks / machine.ranks_per_node), _table(machine, ranks),
                  model=asdict(config.model), layout=to_config(best, pricer))
    return replace(
        chosen,
        predicted={"step_s": best.step_s, "bubble_fraction": best.bubble_fraction,
                   "memory_bytes_per_rank": best.memory_bytes, "lower_bound_s": pricer.bound_s(),
                   "pipeline_s": best.pipeline_s, "gradients_s": best.gradients_s, "update_s": best.update_s,
                   "stages": {"forward_s": forward_s, "input_s": input_s, "weight_s": weight_s, "message_s": message_s,
                              "link_s": link_s, "shares_link": pricer.shares_link(best.layout),
                              "microbatches": pricer.num_microbatches(best.layout)},
                   "buckets": _buckets(pricer, best, chosen.table),
                   "activations": _activations(pricer, best.layout, chosen.table),
                   "volume": step_volume(chosen.applied_to(config).resolve(ranks, chosen.num_nodes),
                                         pricer.reduction.keeps_one_copy(best.layout))},
        binding=_binding(pricer, best, _ranked(pricer, priced, MORE * limit)[0]),
        alternatives=[{"layout": to_config(price, pricer), "step_s": price.step_s,
                       "memory_bytes_per_rank": price.memory_bytes} for price in sorted(fitting[1:top + 1], key=_rank)],
    )


def _buckets(pricer, best, table):
    """Return the buckets of gradients, each with its bytes and the algorithm that the table has for so many where they
    lie; and where they are reduced beside backward, with what the clock needs of them."""
    dtype, found = "float64" if pricer.config.train.dtype == "float64" else "float32", []
    keys = BucketTimes._fields if pricer.reduction.overlaps(best.layout) else ("n_bytes",)
    in_window = pricer.reduction.in_window(best.layout)
    for stage, own in enumerate(pricer.buckets(best)):
        for bucket in own:
            algorithm = table.choose("reduce_scatter", "data", dtype, bucket.n_bytes, in_window)
            found.append({"stage": stage, "algorithm": algorithm, "in_window": in_window,
                          **{key: getattr(bucket, key) for key in keys}})
    return found


def _activations(pricer, layout, table):
    """Return by which operations tensor ranks exchange a microbatch's activations, each with its bytes and the algorithm
    that the table has for so many."""
    train, operations = pricer.config.train, ("reduce_scatter", "allgather") if layout.sequence_parallel else ("allreduce",)
    n_bytes = layout.microbatch * train.seq_len * pricer.config.model.hidden_size * pricer.item
    return [{"operation": op, "algorithm": table.choose(op, "tensor", train.dtype, n_bytes), "in_window": False,
             "n_bytes": n_bytes} for op in operations if layout.tensor > 1]


def _priced(pricer, limit_bytes):
    """Return the price of every layout that fits into so much memory, or would with more recompute."""
    def fits(layout):
        return pricer.price(layout).memory_bytes <= limit_bytes

    return list(map(pricer.price, layouts(pricer.config, pricer.ranks, pricer.machine, fits)))


def _ranked(pricer, priced, limit_bytes):
    """Return what fits into so much memory, mixtures of ways to recompute too, the best first; these are played."""
    if pricer.config.layout.recompute == "auto":
        priced = priced + mixtures(pricer, priced, limit_bytes)
    found = _played_first(pricer, sorted((price for price in priced if price.memory_bytes <= limit_bytes), key=_rank))
    return sorted(_synthesised_first(pricer, found, limit_bytes), key=_rank)


def _too_small(pricer):
    """Return in words that no layout is left, or that none fits: the leanest, and how many ranks would do."""
    config, machine, ranks = pricer.config, pricer.machine, pricer.ranks
    priced = _priced(pricer, math.inf)
    if not priced:
        return (f"no layout of {ranks} ranks is left: {config.layout.sizes()} with {config.model.num_heads} heads, "
                f"{config.model.num_layers} layers and {config.train.global_batch} sequences; leave more of [layout] "
                "open, or take another number of ranks")
    least = min(priced, key=lambda price: price.memory_bytes)
    text = (f"no layout of {ranks} ranks fits {machine.memory_bytes / 1e9:.4g} GB a rank: the least is "
            f"{least.memory_bytes / 1e9:.4g} GB with {describe(least.layout)}; take ")
    unmeasured = replace(machine, num_ranks=0, num_nodes=0, speeds=())
    for more in (ranks << doublings for doublings in range(1, MOST_DOUBLINGS + 1)):
        found = _priced(Pricer(config, unmeasured, more), machine.memory_bytes)
        best = min((price for price in found if price.memory_bytes <= machine.memory_bytes), key=_rank, default=None)
        if best:
            return text + (f"{more} ranks, of which each would need {best.memory_bytes / 1e9:.4g} GB with "
                           f"{describe(best.layout)}, or a smaller model or microbatch")
    return text + f"a smaller model or microbatch: up to {more} ranks do not help"


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
    """Play the step of a plan as it was priced, up to its last gradients.

    Local.

    Parameters
    ----------
    plan : Plan
        With ``layout`` and ``predicted``.

    Returns
    -------
    Timeline
    """
    layout, stages = plan.layout, plan.predicted["stages"]
    made = named_or_read(layout["schedule"], layout["pipeline"], stages["microbatches"], layout["chunks"])
    buckets = [[] for _ in range(made.num_stages)]
    for one in plan.predicted.get("buckets", ()):
        if "left_s" in one:
            buckets[one["stage"]].append(BucketTimes(*(one[key] for key in BucketTimes._fields)))
    return play(made, stages["forward_s"], stages["input_s"], stages["weight_s"], stages["message_s"],
                stages.get("link_s", 0.0), buckets, stages.get("shares_link", False))


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


def _synthesised_first(pricer, found, limit_bytes):
    """Return prices, the best first, with schedules made for the most promising pipelines, where these are left open and
    short enough to make some: one for each number of ranks, stages and microbatches."""
    wanted, left, tried, better = pricer.config.layout, SYNTHESISED_ACTIONS, set(), []
    if wanted.schedule != "auto" or wanted.chunks not in ("auto", 1) or wanted.shares != "auto":
        return found
    for price in found:
        layout = price.layout
        key = layout.data, layout.pipeline, layout.tensor, layout.microbatch
        actions = 3 * layout.pipeline * pricer.num_microbatches(layout)
        if layout.pipeline == 1 or layout.chunks > 1 or key in tried or pricer.shares(layout) or actions > left:
            continue
        tried.add(key)
        left -= actions
        better.append(pricer.synthesised(price, limit_bytes))
    return [price for price in better if price not in found] + found


def _binding(pricer, best, roomier):
    """Return what limits the plan, and what a unit more of each is worth: the layout priced again with 1 % more; with
    1 % more memory all are ranked again, of which ``roomier`` is the best."""
    machine, found = pricer.machine, []

    def price_on(other):
        changed = Pricer(pricer.config, other, pricer.ranks)
        price = changed.price(best.layout)
        return (price if best.bucket_cuts is None else changed.played(price)).step_s

    figures = [("matmul", max(rate for _, rate in machine.matmul)), ("memory_bytes_per_s", machine.memory_bytes_per_s)]
    figures += [(what, getattr(machine, what)) for what in ("elementwise_bytes_per_s", "attention_flops_per_s")
                if getattr(machine, what)]
    figures += [(level.name, 1 / level.beta_s_per_byte) for level in machine.levels if level.beta_s_per_byte]
    if best.layout.pipeline > 1:
        figures += [(f"speed of rank {rank}", speed) for rank, speed in enumerate(machine.speeds)]
    found += price_speeds(pricer.config.train.global_batch, pricer._speeds(best.layout)[0], best.pipeline_s)
    for what, limit in figures:
        gain = (best.step_s - price_on(machine.scaled(what, MORE))) / ((MORE - 1) * limit)
        if gain > 0:
            found.append({"what": what, "value": limit, "limit": limit, "price_s_per_unit": gain})
    worth = max(0.0, best.step_s - roomier.step_s) / ((MORE - 1) * machine.memory_bytes)
    found.append({"what": "memory_bytes", "value": best.memory_bytes, "limit": machine.memory_bytes,
                  "price_s_per_unit": worth})
    return sorted(found, key=lambda one: -one["price_s_per_unit"] * one["limit"])


def price_layout(config, machine, ranks):
    """Return the plan of the layout that the configuration itself has, without a search.

    Local. What it leaves open is filled as :meth:`mpillm.Config.resolve` does, but for shares, stage cuts and buckets, which
    are chosen for the machine.

    Parameters
    ----------
    config, machine, ranks
        As for :func:`make_plan`.

    Returns
    -------
    Plan

    Raises
    ------
    ConfigError
        When the layout cannot run, or does not fit.
    """
    resolved, asked = config.resolve(ranks), config.layout
    layout = replace(resolved.layout, shares=asked.shares, stage_cuts=asked.stage_cuts, bucket_cuts=asked.bucket_cuts)
    return make_plan(replace(resolved, layout=layout), machine, ranks, top=0)

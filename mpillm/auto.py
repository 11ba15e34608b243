"""What ``"auto"`` means in ``[layout]``: whatever works, decided once, here; and the rules that a layout must keep.

Degrees, chunks and the microbatch are searched: the first choice in the order of preference that keeps every rule. What
follows from them (cuts, shares, buckets) is written out, so that all who read a resolved configuration read the same.
"""

import math
from dataclasses import replace
from itertools import product

from mpillm.errors import ConfigError, ScheduleError
from mpillm.planner.stages import default_cuts
from mpillm.schedules.blocks import all_bounds
from mpillm.schedules.check import check
from mpillm.schedules.formats import named_or_read, read_schedule
from mpillm.schedules.pipeline import SCHEDULES

MICROBATCHES = 4  # that a data rank has where the size of one is left open


def resolve(config, ranks, num_nodes):
    """Return the configuration with every open key of its layout filled.

    Local. Data ranks are preferred to pipeline ranks, these to tensor ranks, and microbatches that all fit; where no
    choice keeps the rules, the error is that of the preferred one.
    """
    refused = []
    for candidate in _candidates(config, ranks):
        try:
            _check(candidate, ranks)
        except (ConfigError, ScheduleError) as error:
            refused.append(error)
            continue
        return _written_out(candidate, math.ceil(ranks / num_nodes))
    first = refused[0]
    others = f"; none of {len(refused) - 1} other choices for what is left open can run either" if refused[1:] else ""
    raise type(first)(f"{first}{others}")


def default_microbatch(global_batch, data):
    """Return the sequences of a microbatch where they are left open. Local."""
    return max(1, global_batch // (MICROBATCHES * data))


def dealt(global_batch, size, data):
    """Return the sequences of each data rank where microbatches of ``size`` are dealt out evenly, the first ones first."""
    return tuple(min(stop * size, global_batch) - start * size
                 for start, stop in all_bounds(math.ceil(global_batch / size), data))


def _candidates(config, ranks):
    """Yield the configuration with its degrees, chunks, schedule and microbatch filled in every way, the preferred first:
    an unusual number of chunks only where the usual one suits no degrees."""
    layout, names = config.layout, tuple(config.layout.sizes())
    found = [(unusual, degrees, chunks) for degrees in _degrees(config, ranks)
             for unusual, chunks in enumerate(_chunks(config, degrees[1]))]
    for _, degrees, chunks in sorted(found, key=lambda choice: choice[0]):
        data, pipeline, tensor = degrees
        schedule = layout.schedule
        if schedule == "auto":
            schedule = "interleaved" if chunks > 1 else "zb-h1" if pipeline > 1 else "1f1b"
        filled = replace(
            layout, **dict(zip(names, degrees)), chunks=chunks, schedule=schedule,
            order=names if layout.order == "auto" else layout.order,
            zero=int(data > 1) if layout.zero == "auto" else layout.zero,
            sequence_parallel=tensor > 1 if layout.sequence_parallel == "auto" else layout.sequence_parallel,
            recompute="none" if layout.recompute == "auto" else layout.recompute,
        )
        for size in _microbatches(config, data):
            yield replace(config, layout=filled, train=replace(config.train, microbatch=size))


def _degrees(config, ranks):
    """Return the degrees that make up ``ranks``, most data ranks first, then pipeline ranks; before all others those
    whose data ranks have whole microbatches."""
    fixed, model = config.layout.sizes().values(), config.model
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    found = [degrees for degrees in product(divisors, repeat=3) if math.prod(degrees) == ranks
             and all(size in ("auto", degree) for size, degree in zip(fixed, degrees))]
    whole = max(1, config.train.global_batch // (config.train.microbatch or 1)), model.num_layers, model.num_heads
    found.sort(key=lambda degrees: (any(n > most for n, most in zip(degrees, whole)), *(-n for n in degrees)))
    return found or [tuple(1 if size == "auto" else size for size in fixed)]


def _chunks(config, pipeline):
    """Return the chunks of a pipeline rank to try: what is asked for, what a schedule that is asked for has by itself,
    and what given cuts make of the stages."""
    layout = config.layout
    if layout.chunks != "auto":
        return [layout.chunks]
    found = [2, 1] if layout.schedule == "interleaved" and pipeline > 1 else [1]
    if layout.stage_cuts != "auto":
        found.append((len(layout.stage_cuts) + 1) // pipeline)
    given = _given_schedule(config)
    if given:
        found.append(given.num_stages // given.num_ranks)
    return list(dict.fromkeys(chunks for chunks in found if chunks))


def _microbatches(config, data):
    """Return the sizes of a microbatch to try: that of the configuration, or the usual one, and the one of which a schedule
    from a file has as many as it needs."""
    train, shares = config.train, config.layout.shares
    if train.microbatch is not None:
        return [train.microbatch]
    given = _given_schedule(config)
    most = train.global_batch / data if shares == "auto" else max(shares)
    fitting = [math.ceil(most / given.num_microbatches)] if given else []
    return list(dict.fromkeys([default_microbatch(train.global_batch, data), *fitting]))


def _given_schedule(config):
    """Return the schedule of the file or text that is asked for; None if it is a named one, or cannot be read, which the
    rules find."""
    if config.layout.schedule in ("auto", *SCHEDULES):
        return None
    try:
        return read_schedule(config.layout.schedule)
    except (ConfigError, ScheduleError):
        return None


def _written_out(config, ranks_per_node):
    """Return the configuration with what follows from its degrees: shares, cuts of stages and of buckets."""
    model, train, layout = config.model, config.train, config.layout
    inner = layout.order[layout.order.index("data") + 1:]
    # Gradients are reduced beside backward, layer by layer, where no two data ranks share a node's cores.
    is_apart = math.prod(getattr(layout, axis) for axis in inner) >= ranks_per_node
    is_early = layout.data > 1 and is_apart and train.numerics != "exact" and not train.freeze
    every = tuple(range(model.num_layers + 1)) if is_early else ()
    found = {"shares": dealt(train.global_batch, train.microbatch, layout.data), "stage_cuts": default_cuts(config),
             "bucket_cuts": every}
    return replace(config, layout=replace(layout, **{
        key: value for key, value in found.items() if getattr(layout, key) == "auto"}))


def _check(config, ranks):
    """Refuse a layout that breaks a rule."""
    for rule in RULES:
        message = rule(config, config.layout, ranks)
        if message:
            raise ConfigError(message)
    _check_schedule(config)


def _check_schedule(config):
    """Refuse a schedule that does not run with the microbatches of some data rank; a named one that fits one of them fits
    any number."""
    layout, size = config.layout, config.train.microbatch
    shares = dealt(config.train.global_batch, size, layout.data) if layout.shares == "auto" else layout.shares
    for count in {1} if layout.schedule in SCHEDULES else {math.ceil(share / size) for share in shares}:
        check(named_or_read(layout.schedule, layout.pipeline, count, layout.chunks))


def _fills_the_launch(config, layout, ranks):
    needed = layout.data * layout.pipeline * layout.tensor
    if needed != ranks:
        return (f"layout data={layout.data} x pipeline={layout.pipeline} x tensor={layout.tensor} needs {needed} ranks, "
                f"this launch has {ranks}: change the degrees or start {needed} ranks (mpiexec -n {needed})")


def _has_a_layer_a_stage(config, layout, ranks):
    stages, layers = layout.pipeline * layout.chunks, config.model.num_layers
    if stages > layers:
        return (f"layout.pipeline={layout.pipeline} x chunks={layout.chunks} makes {stages} stages, but the model has only "
                f"{layers} layers: every stage needs one; use at most {layers // layout.chunks} pipeline ranks")


def _has_a_head_a_tensor_rank(config, layout, ranks):
    heads = config.model.num_heads
    if layout.tensor > heads:
        return (f"layout.tensor={layout.tensor} splits model.num_heads={heads}: every tensor rank needs a head; "
                f"use tensor <= {heads}")


def _cuts_every_stage(config, layout, ranks):
    cuts, stages, layers = layout.stage_cuts, layout.pipeline * layout.chunks, config.model.num_layers
    if cuts != "auto" and (len(cuts) != stages - 1 or list(cuts) != sorted(set(cuts)) or (cuts and cuts[-1] >= layers)):
        return (f"layout.stage_cuts = {list(cuts)}: {stages} stages need {stages - 1} growing first layers "
                f"between 1 and {layers - 1}")


def _cuts_buckets_at_layers(config, layout, ranks):
    cuts, layers = layout.bucket_cuts, config.model.num_layers
    if cuts != "auto" and (list(cuts) != sorted(set(cuts)) or (cuts and cuts[-1] > layers)):
        return f"layout.bucket_cuts = {list(cuts)}: needs growing layers between 0 and {layers}"


def _has_a_mode_a_layer(config, layout, ranks):
    modes, layers = layout.recompute, config.model.num_layers
    if isinstance(modes, tuple) and len(modes) != layers:
        return f"layout.recompute lists {len(modes)} modes for {layers} layers: give one a layer"


def _shares_out_the_batch(config, layout, ranks):
    shares, batch = layout.shares, config.train.global_batch
    if shares != "auto" and (len(shares) != layout.data or sum(shares) != batch):
        return (f"layout.shares = {list(shares)}: data={layout.data} needs {layout.data} shares that sum to "
                f"train.global_batch={batch}")


def _has_a_microbatch_a_data_rank(config, layout, ranks):
    batch, size = config.train.global_batch, config.train.microbatch
    if layout.shares == "auto" and math.ceil(batch / size) < layout.data:
        return (f"train.global_batch={batch} in microbatches of {size} gives fewer microbatches than "
                f"layout.data={layout.data}: every data rank needs one; lower train.microbatch or layout.data")


def _has_a_position_a_token(config, layout, ranks):
    length, most = config.train.seq_len, config.model.max_seq_len
    if length > most:
        return f"train.seq_len={length} exceeds model.max_seq_len={most}: lower one or raise the other"


def _adds_exactly(config, layout, ranks):
    """``exact`` admits the layouts whose shards are unions of its blocks."""
    train = config.train
    if train.numerics != "exact":
        return None
    if train.dtype == "bfloat16":
        return ("train.numerics=exact with train.dtype=bfloat16: sums are rounded once a rank, so that their bits would "
                "depend on the layout; use train.dtype = float32 or float64")
    if train.exact_blocks % layout.tensor:
        return (f"train.numerics=exact with exact_blocks={train.exact_blocks}: layout.tensor={layout.tensor} must divide "
                "it; use a power of two")
    even = dealt(train.global_batch, train.microbatch, layout.data)
    if layout.data & (layout.data - 1) or layout.shares not in ("auto", even):
        return (f"train.numerics=exact: layout.data={layout.data} must be a power of two with shares left out, "
                "so that each rank's microbatches are one branch of the fixed sum")


# Each returns what is wrong, or None.
RULES = (_fills_the_launch, _has_a_layer_a_stage, _has_a_head_a_tensor_rank, _cuts_every_stage, _cuts_buckets_at_layers,
         _has_a_mode_a_layer, _shares_out_the_batch, _has_a_microbatch_a_data_rank, _has_a_position_a_token, _adds_exactly)

"""Dynamic program: layers → stages."""

from itertools import accumulate

import numpy as np

from mpillm.planner.counts import ITEM_BYTES, num_states, trained_flops, trained_sizes

# What a core computes while it moves a byte: measured were 178 GFLOP/s in products and 14 to 38 GB/s in lookup and
# update, in float32 on one core while the other had nothing to do.
FLOPS_PER_BYTE = 10
LOOKUP_ITEMS = 7  # read and written of a row of the embedding: forward, and where backward selects and adds


def balanced_cuts(costs, num_stages, microbatches=None, speeds=None):
    """Return the first item of every stage after the first, so that a pipeline ends as early as possible.

    Local. A pipeline of stages that take ``t`` a microbatch ends after ``sum(t) + (m - 1) max(t)`` (Zheng et al. 2022).
    A state is what is placed and on how many stages; of each, all pairs of sum and maximum are kept that no other beats
    in both. Among equal optima the later stages get the fewer layers.

    Parameters
    ----------
    costs : sequence of float
        Of the layers in order; every stage gets at least one.
    num_stages : int
    microbatches : int, optional
        As many as make the costliest stage alone decide, unless given.
    speeds : sequence of float, optional
        Of every stage: its costs are divided by it. Equal unless given.

    Returns
    -------
    tuple of int

    Notes
    -----
    Time: ``O(len(costs)**2 num_stages)`` times the pairs that are kept, one where speeds are equal.
    """
    sums = np.array([0.0, *accumulate(costs)])
    speeds = np.ones(num_stages) if speeds is None else np.asarray(speeds, float)
    last, weight = len(costs), 1e9 if microbatches is None else microbatches - 1
    limit = _limit(sums, speeds, weight)
    # Of every number of placed layers: sums, maxima, and where each came from (layers before, pair of those).
    states = {0: (np.zeros(1), np.zeros(1), np.zeros((1, 2), int))}
    history = []
    for stage in range(num_stages):
        following = {}
        left = num_stages - stage - 1
        for stop in range(stage + 1, last - left + 1) if left else [last]:
            before = [(start, state) for start, state in states.items() if start < stop
                      and weight * (sums[stop] - sums[start]) / speeds[stage] <= limit]
            if not before:
                continue
            times = [(sums[stop] - sums[start]) / speeds[stage] for start, _ in before]
            total = np.concatenate([state[0] + time for (_, state), time in zip(before, times)])
            most = np.concatenate([np.maximum(state[1], time) for (_, state), time in zip(before, times)])
            origin = np.concatenate([np.stack([np.full(len(state[0]), start), np.arange(len(state[0]))], 1)
                                     for start, state in before])
            following[stop] = _undominated(total, most, origin)
        history.append(following)
        states = following
    total, most, _ = states[last]
    place, index, cuts = last, int(np.argmin(total + weight * most)), []
    for following in reversed(history):
        place, index = following[place][2][index]
        cuts.append(int(place))
    return tuple(reversed(cuts[:-1]))


def _limit(sums, speeds, weight):
    """Return what cuts in proportion to the speeds would cost, which no part of a better answer exceeds."""
    stages, last = len(speeds), len(sums) - 1
    wanted = np.searchsorted(sums, sums[-1] * np.cumsum(speeds)[:-1] / speeds.sum())
    cuts = np.maximum.accumulate(np.clip(wanted, np.arange(1, stages), last - stages + np.arange(1, stages)))
    cuts = np.r_[0, np.maximum.accumulate(cuts - np.arange(stages - 1)) + np.arange(stages - 1), last]
    times = np.diff(sums[cuts]) / speeds
    return (times.sum() + weight * times.max()) * (1 + 1e-9)


def _undominated(total, most, origin):
    """Keep the pairs that no other beats in both; of equal ones that with the most layers on earlier stages."""
    order = np.lexsort((-origin[:, 0], most.round(12), total.round(12)))
    total, most, origin = total[order], most[order], origin[order]
    is_kept = np.r_[True, most[1:] < np.minimum.accumulate(most)[:-1] * (1 - 1e-12)]
    return total[is_kept], most[is_kept], origin[is_kept]


def default_cuts(config):
    """Return the stage cuts of a configuration: its own, or balanced by :func:`step_costs`.

    Local.

    Parameters
    ----------
    config : Config
        With all degrees and chunks.

    Returns
    -------
    tuple of int
        The first layer of every stage after the first; ``"auto"`` while it is not known what the head weighs, because
        the sizes that the data say are not.
    """
    layout, stages = config.layout, config.layout.pipeline * config.layout.chunks
    if layout.stage_cuts != "auto" or stages > 1 and config.model.missing:
        return layout.stage_cuts
    return balanced_cuts(step_costs(config), stages) if stages > 1 else ()


def step_costs(config):
    """Return what every layer costs in a training step, the embedding with the first and the head with the last.

    Local. In FLOPs; what moves bytes instead, the lookup with its gradient and the update of weights, counts for what
    a core would compute meanwhile.
    """
    model, train = config.model, config.train
    tokens, item_bytes = train.global_batch * train.seq_len, ITEM_BYTES[train.dtype]
    update = FLOPS_PER_BYTE * (4 * (3 + 2 * num_states(train)) + 4 + item_bytes)  # of a parameter
    sizes, (layers, head) = trained_sizes(model, train.freeze), trained_flops(model, train.seq_len, train.freeze)
    costs = [tokens * flops + update * size for flops, size in zip(layers, sizes.layers)]
    costs[0] += update * sizes.first + FLOPS_PER_BYTE * tokens * LOOKUP_ITEMS * model.hidden_size * item_bytes
    costs[-1] += update * sizes.last + tokens * head
    return costs

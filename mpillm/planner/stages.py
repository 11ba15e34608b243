"""Dynamic program: layers → stages."""

from itertools import accumulate

from mpillm.planner.workload import head_flops, layer_flops


def balanced_cuts(costs, num_stages):
    """Return the first item of every stage after the first, so that the costliest stage costs as little as possible.

    Local. ``costs`` are those of the layers in order; every stage gets at least one. Among equal optima the later
    stages get the fewer layers. Time: ``O(len(costs)**2 * num_stages)``.
    """
    sums = [0, *accumulate(costs)]
    best = {stop: (sums[stop], ()) for stop in range(1, len(costs) + 1)}
    for stage in range(2, num_stages + 1):
        best = {
            stop: min(
                ((max(best[cut][0], sums[stop] - sums[cut]), (*best[cut][1], cut)) for cut in range(stage - 1, stop)),
                key=lambda found: (found[0], [-cut for cut in found[1]]),
            )
            for stop in range(stage, len(costs) + 1)
        }
    return best[len(costs)][1]


def default_cuts(config):
    """Return the stage cuts of a resolved configuration: its own, or balanced by FLOPs with the head counted."""
    layout, model = config.layout, config.model
    if layout.stage_cuts != "auto":
        return layout.stage_cuts
    costs = [layer_flops(model, config.train.seq_len)] * model.num_layers
    costs[-1] += head_flops(model)
    return balanced_cuts(costs, layout.pipeline * layout.chunks)

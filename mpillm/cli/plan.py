"""``mpillm plan``: choose how to train a model on a machine."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import click

from mpillm.cli.options import CONTEXT, with_config
from mpillm.plan import ANY, OPERATIONS

_PLACES = {False: "in own memory", True: "in a window"}


@click.command("plan", context_settings=CONTEXT)
@with_config
@click.option("--machine", "name", required=True, metavar="FILE|PRESET", help="what mpillm probe wrote, or a preset")
@click.option("--ranks", required=True, type=click.IntRange(1), help="ranks to plan for")
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="write the plan there")
@click.option("--top", default=5, show_default=True, type=click.IntRange(0), help="alternatives to keep")
@click.option("--price", is_flag=True, help="price the configuration's own layout, without a search")
@click.option("--explain", is_flag=True, help="say what was chosen, what else there is, and what limits it")
@click.option("--figure", type=click.Path(), metavar="FILE", help="draw the predicted timeline")
@click.option("--tolerate", default=0, type=click.IntRange(0), metavar="K",
              help="write plans for up to K ranks less beside it, for train --plan when a job comes back smaller")
def command(config, name, ranks, output, top, price, explain, figure, tolerate):
    """Choose the layout for CONFIG on a machine; needs no MPI, and no data if the vocabulary's size is given."""
    from mpillm.errors import ConfigError
    from mpillm.machine import Machine
    from mpillm.planner import search

    machine = Machine.load(name)
    if config.model.missing and Path(config.data.path).exists():
        from mpillm.data.sources import with_sizes

        config = with_sizes(config)
    made = search.price_layout(config, machine, ranks) if price else search.make_plan(config, machine, ranks, top)
    if tolerate and not output:
        raise ConfigError("--tolerate: the plans are written beside -o FILE, which is not given")
    if output:
        made.save(output)
        for fewer in range(ranks - 1, max(0, ranks - 1 - tolerate), -1):
            try:
                plan_for_fewer(config, machine, fewer, top).save(made.path_for(output, fewer))
            except ConfigError as error:
                click.echo(f"mpillm plan: no plan for {fewer} ranks: {error}", err=True)
    predicted = made.predicted
    click.echo(f"{search.describe(made.layout)}: {predicted['step_s']:.4g} s a step, "
               f"{predicted['memory_bytes_per_rank'] / 1e9:.3g} GB a rank, bubble {predicted['bubble_fraction']:.1%}; "
               f"at least {predicted['lower_bound_s']:.4g} s on any layout "
               f"(gap {predicted['step_s'] / predicted['lower_bound_s'] - 1:.0%})")
    if explain:
        click.echo(explanation(made))
    if figure:
        from mpillm.report.planned import draw_predicted

        draw_predicted(search.predicted_timeline(made), predicted, figure)


def plan_for_fewer(config, machine, ranks, top):
    """Return the plan for fewer ranks than a machine was measured with: what is left of it, taken as it was."""
    from mpillm.planner.search import make_plan

    return make_plan(config, replace(machine, num_ranks=0, num_nodes=0, speeds=()), ranks, top)


def explanation(plan):
    """Return in words and tables what was chosen, what limits it, and what the alternatives cost."""
    from mpillm.planner.search import describe

    predicted, lines = plan.predicted, ["", "where the step goes:"]
    for part, name in (("pipeline_s", "forward and backward"), ("gradients_s", "gradients"),
                       ("update_s", "optimiser and weights")):
        lines.append(f"  {name:22} {predicted[part]:10.4g} s {predicted[part] / predicted['step_s']:7.1%}")
    lines += ["", _longest_way(plan)]
    buckets = Counter((one["n_bytes"], one["algorithm"], one["in_window"]) for one in predicted["buckets"])
    lines += ["", "gradients are summed in:"] * bool(buckets)
    lines += [f"  {count:4} x {n_bytes / 1e6:10.4g} MB by {algorithm}, {_PLACES[in_window]}"
              for (n_bytes, algorithm, in_window), count in buckets.items()]
    lines += ["", "tensor ranks exchange activations by:"] * bool(predicted["activations"])
    lines += [f"  {one['operation']} of {one['n_bytes'] / 1e6:.4g} MB by {one['algorithm']}, {_PLACES[one['in_window']]}"
              for one in predicted["activations"]]
    lines += ["", "what limits it, and what one per cent more of it would save:"]
    for one in plan.binding:
        saved = one["price_s_per_unit"] * one["limit"] * 0.01
        lines.append(f"  {one['what']:22} {one['limit']:10.4g}   {saved / predicted['step_s']:7.2%} of the step"
                     + (f" ({one['value'] / one['limit']:.0%} used)" if one["what"] == "memory_bytes" else ""))
    lines += ["", "next best:"]
    for other in plan.alternatives:
        lines.append(f"  {other['step_s']:10.4g} s (+{other['step_s'] / predicted['step_s'] - 1:.1%}) "
                     f"{other['memory_bytes_per_rank'] / 1e9:8.3g} GB  {describe(other['layout'])}")
    return "\n".join(lines + _choices(plan.table))


def _choices(table):
    """Return in lines which algorithm each operation takes, by where its tensors lie and how large they are."""
    lines = ["", "algorithms by size:"]
    for op, in_window in product(OPERATIONS, (False, True)):
        limits, algorithms = table.choices(op, ANY, ANY, in_window)
        if not in_window or (limits, algorithms) != table.choices(op, ANY, ANY):
            sizes = [f" up to {limit / 1e3:.4g} kB" if limit < 1e6 else f" up to {limit / 1e6:.4g} MB" for limit in limits[:-1]]
            text = ", ".join(f"{algorithm}{size}" for algorithm, size in zip(algorithms, [*sizes, ""]))
            lines.append(f"  {op:14} {_PLACES[in_window]}: {text}")
    return lines


def _longest_way(plan):
    """Return in words what decides how long pipeline and gradients under way take, and of what that consists."""
    from mpillm.planner.search import predicted_timeline

    timeline = predicted_timeline(plan)
    ranks = list(dict.fromkeys(step.rank for step in timeline.critical_path()))
    parts = zip(timeline.critical_s, ("computing", "in messages", "in gradients under way"))
    shown = ", ".join(f"{seconds:.4g} s {what}" for seconds, what in parts if seconds > 0)
    goal = "the last gradients" if any(timeline.transfers) else "the end of backward"
    return f"the longest way to {goal}: {shown}; over pipeline ranks {', '.join(map(str, ranks))}"

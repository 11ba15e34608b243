"""A priced layout as the keys of a configuration, and in words."""

from dataclasses import asdict

from mpillm.config import AXES
from mpillm.planner.layout_costs import RECOMPUTE
from mpillm.schedules.formats import label


def to_config(price, pricer):
    """Return the keys of ``[layout]``, and the microbatch, that a priced layout stands for.

    Local.

    Parameters
    ----------
    price : Price
        Its buckets, if it was played, are among them.
    pricer : Pricer

    Returns
    -------
    dict
        As JSON can hold it.
    """
    layout = price.layout
    sizes, cuts = pricer.stage_sizes(layout), []
    for size in sizes[:-1]:
        cuts.append(size + (cuts[-1] if cuts else 0))
    modes = layout.recompute if isinstance(layout.recompute, str) else list(layout.recompute)
    found = {**asdict(layout), "recompute": modes, "stage_cuts": cuts, "order": list(layout.order)}
    if price.bucket_cuts is not None:
        found["bucket_cuts"] = list(price.bucket_cuts)
    shares = pricer.shares(layout)
    return found if shares is None or len(set(shares)) == 1 else {**found, "shares": list(shares)}


def describe(layout):
    """Return a layout, planned, priced or of a configuration, in one line of words. Local."""
    shown = layout if isinstance(layout, dict) else asdict(layout)
    text = f"data={shown['data']} pipeline={shown['pipeline']} tensor={shown['tensor']}"
    text += f" microbatch={shown['microbatch']}" if "microbatch" in shown else ""
    if shown["pipeline"] > 1:
        text += f" {label(shown['schedule'])}" + (f" chunks={shown['chunks']}" if shown["chunks"] > 1 else "")
    text += f" zero={shown['zero']}" if shown["data"] > 1 else ""
    text += " sequence-parallel" if shown["sequence_parallel"] else ""
    text += f" order={','.join(shown['order'])}" if tuple(shown["order"]) != AXES else ""
    return text + describe_recompute(shown["recompute"])


def describe_recompute(modes):
    """Return what backward computes again, in words for the end of a line; nothing if nothing is. Local."""
    if isinstance(modes, str):
        return "" if modes == "none" else f" recompute={modes}"
    counts = [f"{mode} in {list(modes).count(mode)}" for mode in RECOMPUTE if mode in modes]
    return f" recompute={', '.join(counts)} layers"

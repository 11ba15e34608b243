"""Layouts whose layers recompute each in its own way, where memory binds."""

import math
from dataclasses import replace

import numpy as np

from mpillm.errors import ConfigError
from mpillm.planner.layout_costs import RECOMPUTE
from mpillm.planner.memory import choose_modes

MIXED = 20  # so many of the most promising layouts are tried with layers that recompute each in its own way


def mixtures(pricer, priced, limit_bytes):
    """Return prices of layouts that recompute in some layers only, where that beats all that treat layers alike.

    Local. Mixing pays where one way to recompute is fast and does not fit and another fits. Its time is bounded by the
    faster one's; the most promising, by the mean of both that would just fit, come first.

    Parameters
    ----------
    pricer : Pricer
    priced : list of Price
        Of every layout in all ways to recompute, one after the other.
    limit_bytes : float
        Memory of a rank.

    Returns
    -------
    list of Price
    """
    best = min((price.step_s for price in priced if price.memory_bytes <= limit_bytes), default=math.inf)
    ways, candidates = len(RECOMPUTE), []
    for alike in (priced[i:i + ways] for i in range(0, len(priced), ways)):
        faster = [price for price in alike if price.step_s < best and price.memory_bytes > limit_bytes]
        guesses = [lean.step_s + (limit_bytes - lean.memory_bytes) / (fast.memory_bytes - lean.memory_bytes)
                   * (fast.step_s - lean.step_s) for fast in faster for lean in alike
                   if lean.memory_bytes <= limit_bytes and lean.step_s > fast.step_s]
        if guesses:
            bound = min(price.step_s for price in faster)
            candidates.append((min(guesses), bound, alike[0].layout))
    found = []
    for _, bound, layout in sorted(candidates, key=lambda one: one[0])[:MIXED]:
        if bound < best:
            try:
                price = mix(pricer, layout, limit_bytes)
            except ConfigError:  # its stages are those of nothing recomputed: the fullest may not fit
                continue
            if len(set(price.layout.recompute)) > 1:
                found.append(price)
                best = min(best, price.step_s)
    return found


def mix(pricer, layout, limit_bytes):
    """Return the price of a layout whose layers recompute each in its own way, so that it just fits.

    Local. The programs of :mod:`mpillm.planner.memory` choose for every pipeline rank; its layers are dealt out evenly
    over its stages. Without whole layers recomputed there is room for one layer more.

    Raises
    ------
    ConfigError
        If it does not fit even with all layers recomputed.
    """
    found = []
    for ways in (RECOMPUTE[:2], RECOMPUTE):
        try:
            found.append(_mix(pricer, layout, limit_bytes, ways))
        except ConfigError:
            if ways == RECOMPUTE and not found:
                raise
    return min(found, key=lambda price: price.step_s)


def _mix(pricer, layout, limit_bytes, ways):
    """Return the price of the best mixture of some ways to recompute."""
    plain, footprint = replace(layout, recompute="none"), pricer.footprint
    p, sizes = layout.pipeline, pricer.stage_sizes(plain)
    works, each = [pricer.work(layout, mode)[0] for mode in ways], [footprint.layer(layout, mode) for mode in ways]
    time_s = np.array([sum(work) for work in works])
    starts, modes, choices = np.cumsum(sizes) - sizes, [""] * sum(sizes), {}
    held = pricer.held(plain)
    fixed = footprint.peaks(plain, sizes, footprint.ends(plain, sizes), np.zeros(p),
                            footprint.beside(plain, sizes, ways, pricer.is_split(plain)), held, pricer.num_microbatches(plain))
    kept = held[:, :, :2] @ np.transpose([(layer.kept, layer.split) for layer in each]) / layout.chunks
    for rank in range(p):
        # From a stage to the next, so that what is dealt out in turn is spread over them.
        own = sorted((place, starts[stage] + place) for stage in range(rank, len(sizes), p)
                     for place in range(sizes[stage]))
        room = np.maximum(limit_bytes - fixed[rank], 1.0)
        key = len(own), room.tobytes(), kept[rank].tobytes()
        if key not in choices:
            choices[key] = _choose(len(own), time_s, kept[rank], room)
        for mode, (_, layer) in zip(sorted(choices[key]), own):
            modes[layer] = ways[mode]
    return pricer.price(replace(layout, recompute=tuple(modes)))


def _choose(layers, time_s, n_bytes, room_bytes):
    """Return modes for so many layers that are alike, which keep ``n_bytes[point, mode]`` each, ``room_bytes`` together."""
    # A layer weighs what it takes of the room at the point that it fills most: then all fit at every point.
    least = room_bytes.min()
    weights = (n_bytes * (least / room_bytes)[:, None]).max(0)
    modes = list(choose_modes(np.tile(time_s[:, None], layers), np.tile(weights[:, None], layers), least).modes)
    left = np.maximum(room_bytes - n_bytes[:, modes].sum(1), 0.0)
    for layer, mode in enumerate(modes):  # layers that fill different points leave room for faster ones
        fits = (n_bytes - n_bytes[:, [mode]] <= left[:, None]).all(0)
        modes[layer] = int(np.where(fits, time_s, np.inf).argmin())
        left -= n_bytes[:, modes[layer]] - n_bytes[:, mode]
    return modes

"""Before a run that leaves its layout open: the machine is measured or remembered, planned for, the best few tried."""

import hashlib
import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import platformdirs
import torch

from mpillm.comm.buffers import synchronize
from mpillm.comm.devices import device_name, pick_device
from mpillm.comm.group import as_group
from mpillm.comm.probe import as_of_now, measure_machine
from mpillm.comm.scheduled import nodes_of
from mpillm.comm.world import set_threads
from mpillm.data.labelled import counted
from mpillm.data.sources import random_batches, with_sizes
from mpillm.errors import MpillmError, agreed, on_rank_0
from mpillm.machine import Level, Machine
from mpillm.nn.products import fast_product
from mpillm.plan import Plan
from mpillm.planner.search import make_plan, price_layout
from mpillm.train.engine import Engine

TRIED_STEPS = 5
MEASURED = 3  # counts what the figures of a remembered machine have come to mean


def is_open(config):
    """Tell whether a configuration leaves the degrees of all axes to the planner. Local."""
    return set(config.layout.sizes().values()) == {"auto"}


def choose_plan(config, comm, probe_top=1):
    """Return the plan for a configuration on this launch, and in a line where it comes from, and why not from the run.

    Collective over ``comm``. The plan that the run directory already has is kept if it is for this launch; so a run
    goes on as it began.

    Parameters
    ----------
    config : Config
        What its ``[layout]`` fixes is kept.
    comm : Comm
    probe_top : int
        Of so many best plans each is run for a few steps, and the fastest taken.

    Returns
    -------
    plan : Plan
    origin : str

    Raises
    ------
    MpillmError
        On every rank, if no layout is left or none fits the memory, the data cannot be read, or some ranks would train
        on GPUs and others not.
    """
    with agreed(comm, "data"):
        config = with_sizes(config)
    num_nodes = len(set(nodes_of(comm)))
    kept, instead = on_rank_0(comm, "plan", _kept_plan, config, comm.size, num_nodes)
    if kept:
        return kept, f"plan of {config.train.run_dir}"
    machine, origin = known_machine(comm, pick_device(config.train.device, comm), getattr(torch, config.train.dtype))
    plans = on_rank_0(comm, "plan", _best_plans, config, machine, comm.size, probe_top)  # once: all obey the same
    return (plans[0] if len(plans) == 1 else _fastest(plans, config, comm)), origin + instead


def known_machine(comm, device, dtype):
    """Return this launch's :class:`Machine`, from an earlier launch of its kind or measured now; and its origin.

    Collective over ``comm``, each rank with its device; ``dtype`` is that of the training. It is remembered below
    ``$XDG_CACHE_HOME/mpillm`` for launches with as many ranks on as many nodes, the same processors or GPUs, threads
    and libraries; not where ranks were unequal, because what slows one, and all figures with it, passes. Speeds of
    ranks and free memory are measured in every launch.
    """
    threads, multiply = set_threads(comm), fast_product(comm, device, dtype)
    library = "none"
    if comm.size > 1:
        from mpi4py import MPI

        library = MPI.Get_library_version()
    kinds = comm.allgather([device_name(device), device.index, str(dtype), len(os.sched_getaffinity(0)), threads,
                            library, torch.__version__])
    figures = [field.name for of in (Machine, Level) for field in fields(of)]  # an earlier version's say less
    digest = hashlib.sha256(json.dumps([kinds, nodes_of(comm), figures, MEASURED]).encode()).hexdigest()[:16]
    cache = _cache_folder() / f"machine-{digest}.json"
    machine = on_rank_0(comm, "machine", _remembered, cache)
    if machine:
        machine = as_of_now(comm, machine, device, dtype, multiply)
        return machine, f"machine as measured before, {cache}; remove it to measure again"
    machine = measure_machine(as_group(comm), device=device, dtype=dtype, multiply=multiply)
    if machine.speeds:
        return machine, "machine measured now, and not remembered: its ranks are unequal"
    if comm.rank == 0:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            machine.save(cache)
        except OSError as error:  # a launch without a home directory measures every time
            return machine, f"machine measured now, and not remembered: {error}"
    return machine, f"machine measured now, {cache}"


def _kept_plan(config, num_ranks, num_nodes):
    """Return the plan of the run directory if this run could obey it; else None, and why not where there is one."""
    path = Path(config.train.run_dir) / "plan.json"
    if not path.exists():
        return None, ""
    try:
        plan = Plan.load(path)
        plan.check(num_ranks, num_nodes)
        plan.applied_to(config)
    except MpillmError as error:
        return None, f"; instead of {path}: {error}"
    return plan if plan.layout else None, ""


def _best_plans(config, machine, num_ranks, count):
    """Return the best plans, the best first."""
    best = make_plan(config, machine, num_ranks, top=count - 1)
    return [best, *(price_layout(Plan(0, 0, layout=other["layout"]).applied_to(config), machine, num_ranks)
                    for other in best.alternatives)]


def _cache_folder():
    """Return where machines are remembered; without a home directory one that cannot be written."""
    try:
        return platformdirs.user_cache_path("mpillm", appauthor=False)
    except RuntimeError:
        return Path(os.devnull)


def _remembered(path):
    try:
        return Machine.load(path)
    except MpillmError:
        return None


def _fastest(plans, config, comm):
    """Run each plan for a few steps on random tokens and return the fastest, with what was found."""
    tried = []
    for plan in plans:
        resolved = plan.applied_to(config).resolve(comm.size, plan.num_nodes)
        engine = Engine(resolved, comm, table=plan.table)
        times = [time_step(engine, resolved, comm) for _ in range(TRIED_STEPS)]
        engine.free()
        tried.append({"layout": plan.layout, "predicted_s": plan.predicted["step_s"],
                      "measured_s": float(np.median(times[1:]))})  # the first makes windows and requests
    best = min(range(len(plans)), key=lambda i: tried[i]["measured_s"])
    return replace(plans[best], tried=tried, alternatives=plans[0].alternatives)


def time_step(engine, config, comm):
    """Return the seconds of one step, of the slowest rank; the same on all."""
    (batch,) = random_batches(config, 1)
    comm.Barrier()
    start = time.perf_counter()
    engine.train_step(batch.part, config.train.lr, counted=counted(batch.targets))
    synchronize(engine.device)
    return max(comm.allgather(time.perf_counter() - start))

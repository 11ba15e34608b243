"""Collectives side by side: mpillm's, in and outside windows, the MPI library's own and PyTorch's over gloo."""

import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.tables import candidates, make_call, measure_table, only, time_calls
from mpillm.schedules.algorithm import LIBRARY
from mpillm.schedules.blocks import counts

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall")
SIZES_BYTES = tuple(1 << k for k in range(10, 29, 2))
CLEARLY = 0.95  # of the best candidate's speed: a choice that reaches less is not a good one
_COPY_ITEMS = 1 << 24
# gloo's name of each operation and how it is called on flat tensors; it has no other two on the CPU
_GLOO = {
    "allreduce": lambda dist, x, block: dist.all_reduce(x),
    "allgather": lambda dist, x, block: dist.all_gather_into_tensor(x, block),
    "reduce_scatter": lambda dist, x, block: dist.reduce_scatter_tensor(block, x),
    "bcast": lambda dist, x, block: dist.broadcast(x, 0),
}


def copy_bandwidth(comm):
    """Return how many bytes a second all ranks together copy, all at once, in memory of their own.

    Collective over ``comm``.

    Returns
    -------
    float
    """
    x, y = torch.empty(_COPY_ITEMS).fill_(0), torch.empty(_COPY_ITEMS).fill_(0)
    times = time_calls(comm, {"copy": lambda: y.copy_(x)})["copy"]
    return comm.size * x.numel() * x.element_size() / float(np.median(times))


def measure(group, operations, sizes_bytes, dtype, with_peers, table=None, with_candidates=False, budget_s=0.2,
            show=lambda op, size: None):
    """Measure every operation at every size, all implementations in turn but gloo, which comes after.

    Collective over ``group``.

    Parameters
    ----------
    group : Group
        Of two ranks or more.
    operations : sequence of str
        Of :data:`OPERATIONS`.
    sizes_bytes : sequence of int
        Of the whole vector.
    dtype : torch.dtype
    with_peers : bool
        Measure gloo too.
    table : DecisionTable, optional
        What mpillm chooses by; measured first if not given.
    with_candidates : bool
        Measure, as ``impl`` ``"candidate"``, every algorithm that a table could name for the place where tensors lie.
    budget_s : float
        About how long each may be measured.
    show : callable
        Told of every operation and size before it is measured.

    Returns
    -------
    list of dict
        A row an operation, size, implementation and place: ``op dtype impl in_window bytes ranks nodes algorithm median_s
        p99_s bandwidth_bytes_per_s copy_fraction``. ``impl`` is ``mpillm`` on tensors in a window, ``mpillm-copy`` on
        others, ``mpillm-bound-window`` and ``mpillm-bound`` the same by bound requests, ``mpi`` plain mpi4py, ``gloo`` or
        ``candidate``.
    """
    table = measure_table(group, operations, dtype=dtype) if table is None else table
    chosen, places = group.with_table(table), (False, True) if group.node else (False,)
    speed, rows, members = copy_bandwidth(group.comm), [], {}
    for op, in_window in product(operations if with_candidates else (), places):
        members[op, in_window] = {name: group.with_table(only(name)) for name in candidates(op, group, in_window)}
    window = group.node.empty(max(group.size, max(sizes_bytes) // dtype.itemsize), dtype).zero_() if group.node else None
    with gloo(group.comm) if with_peers else _nothing() as dist:
        for op, n_bytes in product(operations, sizes_bytes):
            show(op, n_bytes)
            n = max(group.size, n_bytes // dtype.itemsize)
            # written, because pages that only were asked for are all one page of zeros
            x, out = torch.empty(n, dtype=dtype).fill_(0), torch.empty(n + group.size, dtype=dtype).fill_(0)
            bound, entries = [], []
            for in_window in places:
                tensor = window[:n] if in_window else x
                entries += _own_entries(op, tensor, out, chosen, in_window, bound)
                entries += [Entry("candidate", name, in_window, make_call(op, tensor, member, out))
                            for name, member in members.get((op, in_window), {}).items()]
            if dtype not in HALF_TYPES:
                call = _library_call(op, group.comm, x.numpy(), out.numpy(), counts(n, group.size))
                entries.append(Entry("mpi", LIBRARY, False, call))
            times_s = time_calls(group.comm, {entry: entry.call for entry in entries}, budget_s)
            if dist is not None and op in _GLOO:  # apart: its threads would disturb the next
                entry = _gloo_entry(op, x, out, group.size, dist)
                times_s |= time_calls(group.comm, {entry: entry.call}, budget_s)
            for entry, times in times_s.items():
                median_s = float(np.median(times))
                rows.append({
                    "op": op, "dtype": _name(dtype), "impl": entry.impl, "in_window": entry.in_window, "bytes": n_bytes,
                    "ranks": group.size, "nodes": len(set(group.schedules.nodes)), "algorithm": entry.algorithm,
                    "median_s": median_s, "p99_s": float(np.percentile(times, 99)),
                    "bandwidth_bytes_per_s": n_bytes / median_s, "copy_fraction": n_bytes / median_s / speed,
                })
            for one in bound:
                one.free()
    if window is not None:
        group.node.release(window)
    return rows


class Entry(NamedTuple):
    """What is measured: who carries an operation out, by which algorithm, and whether the tensor lies in a window."""

    impl: str
    algorithm: str
    in_window: bool
    call: Callable


def far_from_best(rows):
    """Return where the table's choice was clearly slower than the best candidate.

    Local. What mpillm adds to a bare call of the library is no matter of choice: it is in the rows of both.

    Parameters
    ----------
    rows : list of dict
        Of :func:`measure`, with candidates.

    Returns
    -------
    list of (dict, dict)
        Row of the choice and row of the best for tensors in the same place, where the first reached less than
        :data:`CLEARLY` of the other's speed.
    """
    found = []
    for choice in choices(rows):
        others = [row for row in rows if (row["impl"], row["op"], row["bytes"], row["in_window"]) == (
            "candidate", choice["op"], choice["bytes"], choice["in_window"])]
        best = min(others, key=lambda row: row["median_s"])
        if best["algorithm"] != choice["algorithm"] and best["median_s"] < CLEARLY * choice["median_s"]:
            found.append((choice, best))
    return found


def choices(rows):
    """Return the rows of what a table chose, carried out by ordinary calls. Local."""
    return [row for row in rows if row["impl"] in ("mpillm", "mpillm-copy")]


def _own_entries(op, x, out, chosen, in_window, bound):
    """Return what the table chooses for ``x``, by an ordinary call and by a bound request, which is added to ``bound``."""
    algorithm = chosen.table.choose(op, chosen.name, _name(x.dtype), x.nbytes, in_window)
    mine = counts(len(x), chosen.size)[chosen.rank]
    bound.append(chosen.bind(op, x, out[:chosen.size * mine] if op == "alltoall" else None))
    called, requested = ("mpillm", "mpillm-bound-window") if in_window else ("mpillm-copy", "mpillm-bound")
    return [Entry(called, algorithm, in_window, make_call(op, x, chosen, out)),
            Entry(requested, algorithm, in_window, bound[-1].run)]


def _gloo_entry(op, x, out, ranks, dist):
    whole, block = x[:len(x) // ranks * ranks], out[:len(x) // ranks]
    return Entry("gloo", "gloo", False, lambda: _GLOO[op](dist, whole, block))


def _library_call(op, comm, x, out, sizes):
    """Return the plain mpi4py call of an operation on numpy arrays, in place where the operation allows."""
    from mpi4py import MPI

    mine = [sizes[comm.rank]] * comm.size
    is_uneven = sizes[0] < sizes[1]  # MPICH 5.0.2 aborts in place: its copy to the front overlaps
    scattered = (x, out[:mine[0]]) if is_uneven else (MPI.IN_PLACE, x)
    return {
        "allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, x),
        "reduce_scatter": lambda: comm.Reduce_scatter(*scattered, sizes),
        "allgather": lambda: comm.Allgatherv(MPI.IN_PLACE, [x, sizes]),
        "bcast": lambda: comm.Bcast(x),
        "alltoall": lambda: comm.Alltoallv([x, sizes], [out[:sum(mine)], mine]),
    }[op]


@contextmanager
def gloo(comm):
    """Give PyTorch's ``torch.distributed`` over gloo on the ranks of ``comm``.

    Collective over ``comm``. A rank that fails leaves at once: the others may be waiting for it elsewhere.
    """
    import torch.distributed as dist

    with tempfile.TemporaryDirectory(prefix="mpillm-gloo-") as folder:
        path = comm.bcast(f"{folder}/store")
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=comm.rank, world_size=comm.size)
        yield dist
        dist.destroy_process_group()
        comm.Barrier()


@contextmanager
def _nothing():
    yield None


def _name(dtype):
    return str(dtype).removeprefix("torch.")

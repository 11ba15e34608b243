"""Collectives side by side: mpillm's, in and outside windows, the MPI library's own and PyTorch's over gloo."""

import tempfile
from contextlib import contextmanager

import numpy as np
import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.tables import candidates, make_call, measure_table, only, time_calls
from mpillm.schedules.algorithm import LIBRARY, WINDOW
from mpillm.schedules.blocks import counts

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall")
SIZES_BYTES = tuple(1 << k for k in range(10, 29, 2))
_IN_PLACE = ("allreduce", "reduce_scatter", "allgather")  # what a tensor in a window is good for
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
        Measure, as ``impl`` ``"candidate"``, every algorithm that a table could name.
    budget_s : float
        About how long each may be measured.
    show : callable
        Told of every operation and size before it is measured.

    Returns
    -------
    list of dict
        A row an operation, size and implementation: ``op dtype impl bytes ranks nodes algorithm median_s p99_s
        bandwidth_bytes_per_s copy_fraction``.
    """
    table = measure_table(group, operations, dtype=dtype) if table is None else table
    chosen = group.with_table(table)
    window = None if group.node is None else group.with_table(only(WINDOW))
    speed, rows = copy_bandwidth(group.comm), []
    members = {op: {name: group.with_table(only(name)) for name in candidates(op, group)} if with_candidates else {}
               for op in operations}
    with gloo(group.comm) if with_peers else _nothing() as dist:
        for op in operations:
            for n_bytes in sizes_bytes:
                show(op, n_bytes)
                n = max(group.size, n_bytes // dtype.itemsize)
                shared = window.node.empty(n, dtype).zero_() if window and op in _IN_PLACE else None
                calls, algorithms = _calls(op, n, dtype, chosen, members[op], dist)
                if shared is not None:
                    calls["mpillm"], algorithms["mpillm"] = make_call(op, shared, window), WINDOW
                alone = {"gloo": calls.pop("gloo")} if "gloo" in calls else {}  # its threads would disturb the next
                times_s = time_calls(group.comm, calls, budget_s) | (alone and time_calls(group.comm, alone, budget_s))
                for impl, times in times_s.items():
                    median_s = float(np.median(times))
                    rows.append({
                        "op": op, "dtype": _name(dtype), "impl": impl.partition(" ")[0], "bytes": n_bytes,
                        "ranks": group.size, "nodes": len(set(group.schedules.nodes)), "algorithm": algorithms[impl],
                        "median_s": median_s, "p99_s": float(np.percentile(times, 99)),
                        "bandwidth_bytes_per_s": n_bytes / median_s, "copy_fraction": n_bytes / median_s / speed,
                    })
                if shared is not None:
                    window.node.release(shared)
    return rows


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
        Row of the choice and row of the best, where the first took more than 10 % and more than 10 us longer.
    """
    found = []
    for choice in rows:
        if choice["impl"] == "mpillm-copy":
            others = [row for row in rows if (row["impl"], row["op"], row["bytes"]) == (
                "candidate", choice["op"], choice["bytes"])]
            best = min(others, key=lambda row: row["median_s"])
            if choice["median_s"] > max(1.1 * best["median_s"], best["median_s"] + 1e-5):
                found.append((choice, best))
    return found


def _calls(op, n, dtype, chosen, members, dist):
    """Return the functions to time on ``n`` items of a rank's own, and the algorithm of each, by implementation."""
    # written, because pages that only were asked for are all one page of zeros
    x, out = torch.empty(n, dtype=dtype).fill_(0), torch.empty(n + chosen.size, dtype=dtype).fill_(0)
    calls = {"mpillm-copy": make_call(op, x, chosen, out)}
    algorithms = {"mpillm-copy": chosen.table.choose(op, chosen.name, _name(dtype), n * dtype.itemsize)}
    if dtype not in HALF_TYPES:
        calls["mpi"] = _library_call(op, chosen.comm, x.numpy(), out.numpy(), counts(n, chosen.size))
        algorithms["mpi"] = LIBRARY
    for name, member in members.items():
        calls[f"candidate {name}"], algorithms[f"candidate {name}"] = make_call(op, x, member, out), name
    if dist is not None and op in _GLOO:
        whole, block = x[:n // chosen.size * chosen.size], out[:n // chosen.size]
        calls["gloo"], algorithms["gloo"] = lambda: _GLOO[op](dist, whole, block), "gloo"
    return calls, algorithms


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

"""Collectives side by side: mpillm's, in and outside windows, the MPI library's own and PyTorch's over gloo."""

import tempfile
from contextlib import contextmanager

import numpy as np
import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.comm.probe import make_call, measure_table, only, time_calls
from mpillm.plan import LIBRARY, WINDOW
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
    """Return how many bytes a second all ranks together copy, all at once, in memory of their own. Collective."""
    x, y = torch.empty(_COPY_ITEMS).fill_(0), torch.empty(_COPY_ITEMS).fill_(0)
    times = time_calls(comm, {"copy": lambda: y.copy_(x)})["copy"]
    return comm.size * x.numel() * x.element_size() / float(np.median(times))


def measure(group, operations, sizes_bytes, dtype, with_peers, table=None, budget_s=0.2, show=lambda op, size: None):
    """Measure every operation at every size, all implementations in turn but gloo, which comes after.

    Collective over ``group``.

    Parameters
    ----------
    table : DecisionTable, optional
        What mpillm chooses by; measured first if not given.

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
    nodes = len(set(group.comm.allgather(_node_name())))
    with gloo(group.comm) if with_peers else _nothing() as dist:
        for op in operations:
            for n_bytes in sizes_bytes:
                show(op, n_bytes)
                n = max(group.size, n_bytes // dtype.itemsize)
                shared = window.node.empty(n, dtype).zero_() if window and op in _IN_PLACE else None
                calls, algorithms = _calls(op, n, dtype, chosen, dist)
                if shared is not None:
                    calls["mpillm"], algorithms["mpillm"] = make_call(op, shared, window), WINDOW
                alone = {"gloo": calls.pop("gloo")} if "gloo" in calls else {}  # its threads would disturb the next
                times_s = time_calls(group.comm, calls, budget_s) | (alone and time_calls(group.comm, alone, budget_s))
                for impl, times in times_s.items():
                    median_s = float(np.median(times))
                    rows.append({
                        "op": op, "dtype": _name(dtype), "impl": impl, "bytes": n_bytes, "ranks": group.size,
                        "nodes": nodes, "algorithm": algorithms[impl], "median_s": median_s,
                        "p99_s": float(np.percentile(times, 99)), "bandwidth_bytes_per_s": n_bytes / median_s,
                        "copy_fraction": n_bytes / median_s / speed,
                    })
                if shared is not None:
                    window.node.release(shared)
    return rows


def _calls(op, n, dtype, chosen, dist):
    """Return the functions to time on ``n`` items of a rank's own, and the algorithm of each, by implementation."""
    # written, because pages that only were asked for are all one page of zeros
    x, out = torch.empty(n, dtype=dtype).fill_(0), torch.empty(n + chosen.size, dtype=dtype).fill_(0)
    calls = {"mpillm-copy": make_call(op, x, chosen, out)}
    algorithms = {"mpillm-copy": chosen.table.choose(op, chosen.name, _name(dtype), n * dtype.itemsize)}
    if dtype not in HALF_TYPES:
        calls["mpi"] = _library_call(op, chosen.comm, x.numpy(), out.numpy(), counts(n, chosen.size))
        algorithms["mpi"] = LIBRARY
    if dist is not None and op in _GLOO:
        whole, block = x[:n // chosen.size * chosen.size], out[:n // chosen.size]
        calls["gloo"], algorithms["gloo"] = lambda: _GLOO[op](dist, whole, block), "gloo"
    return calls, algorithms


def _library_call(op, comm, x, out, sizes):
    """Return the plain mpi4py call of an operation on numpy arrays, in place where the operation allows."""
    from mpi4py import MPI

    mine = [sizes[comm.rank]] * comm.size
    return {
        "allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, x),
        "reduce_scatter": lambda: comm.Reduce_scatter(MPI.IN_PLACE, x, sizes),
        "allgather": lambda: comm.Allgatherv(MPI.IN_PLACE, [x, sizes]),
        "bcast": lambda: comm.Bcast(x),
        "alltoall": lambda: comm.Alltoallv([x, sizes], [out[:sum(mine)], mine]),
    }[op]


@contextmanager
def gloo(comm):
    """Give PyTorch's ``torch.distributed`` over gloo on the ranks of ``comm``. Collective."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory(prefix="mpillm-gloo-") as folder:
        path = comm.bcast(f"{folder}/store")
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=comm.rank, world_size=comm.size)
        try:
            yield dist
        finally:
            dist.destroy_process_group()
            comm.Barrier()


@contextmanager
def _nothing():
    yield None


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _node_name():
    from mpi4py import MPI

    return MPI.Get_processor_name()

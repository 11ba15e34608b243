"""Measures what a launch can do: what its ranks compute, remember and send while all others do the same."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from mpillm.comm import limits
from mpillm.comm.buffers import as_words, synchronize
from mpillm.comm.devices import device_name, onednn_gains
from mpillm.comm.group import Group
from mpillm.comm.tables import largest_window, make_call, measure_table, medians, time_calls
from mpillm.errors import ConfigError
from mpillm.machine import EVERYWHERE, Level, Machine, Measured
from mpillm.plan import DEFAULT_TABLE

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
_TILE = (256, 128)  # of the products of GPUs (NVIDIA, Matrix Multiplication Background User's Guide, 2023)
_LEVEL_OPERATIONS = ("allreduce", "reduce_scatter", "allgather")
_LEVEL_BYTES = (1 << 6, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 23, 1 << 25)  # of those that a level is known by
_SLOW_S = 0.05  # larger ones than took so long are taken to go at the same rate
_COLD_BYTES = 1 << 26  # of operands in turn, so that they come from memory as those of layers do
_SUSTAINED_S, _SUSTAINED_WIDTH = 0.5, 512
_LONG_S = 1.0  # of one product of a width: wider ones are taken to be as fast
_UNEQUAL = 1.2  # ranks that differ by less are taken as equal
_MEETINGS, _BUSY_BYTES = 8, 1 << 18


@dataclass(frozen=True)
class Sizes:
    """What a kind of device is measured with: large enough to keep it busy.

    Attributes
    ----------
    rows : int
        Of products and activations.
    columns : int or None
        Of products; None for as many as the width.
    ffn, sequences, seq : int
        Of a gated activation; of attention with eight heads of 64.
    memory_bytes : int
    kernels : int
        That a layer's forward starts, with what the interpreter takes in between.
    at_once : int
        Products before a device is waited for.
    """

    rows: int
    columns: int | None
    ffn: int
    sequences: int
    seq: int
    memory_bytes: int
    kernels: int
    at_once: int

    def product(self, width):
        """Return rows, inner size and columns of the product whose smallest dimension is ``width``."""
        return self.rows, width, self.columns or width


SIZES = {
    "cpu": Sizes(rows=512, columns=None, ffn=1376, sequences=1, seq=256, memory_bytes=1 << 27, kernels=60, at_once=1),
    "cuda": Sizes(rows=4096, columns=4096, ffn=22016, sequences=32, seq=2048, memory_bytes=1 << 29, kernels=120,
                  at_once=8),
}


def measure_machine(group, table=None, device=torch.device("cpu"), dtype=torch.float32, multiply=torch.mm):
    """Measure what every rank can do while all others do the same.

    Collective over ``group``; all ranks return the same. Products of several widths, additions in memory, a gated
    activation and an attention there and back, the start of a kernel, of :data:`SIZES`; allreduces of 64 bytes to 32 MiB
    and their halves inside nodes and between them, on tensors of a rank's own, which are told as the messages of a ring
    too, and in windows. Every figure is the median of its repetitions on the slowest rank.

    Parameters
    ----------
    group : Group
    table : DecisionTable, optional
        Which algorithms to measure with; kept in the machine. Left out it is measured first (:func:`measure_table`).
    device : torch.device
        Of this rank, where it is going to train.
    dtype : torch.dtype
        Of weights and activations. Messages are of float32, as gradients are.
    multiply : callable
        Two matrices, as training will (:func:`mpillm.nn.products.fast_product`).

    Returns
    -------
    Machine

    Raises
    ------
    ConfigError
        On every rank, if some have a GPU and others not.
    """
    if len(set(group.comm.allgather(device.type))) > 1:
        raise ConfigError("train.device = auto: some ranks see a GPU and others do not, for which there is no plan: "
                          "set it to cpu, ask for nodes of one kind, or give data, pipeline and tensor")
    if table is None:
        table = measure_table(group) if group.size > 1 else DEFAULT_TABLE
    spread, kind, sizes = {}, {"device": device, "dtype": dtype}, SIZES[device.type]

    def whole(call):
        return lambda: (call(), synchronize(device))

    def medians_s(calls):
        times = time_calls(group.comm, {name: whole(call) for name, call in calls.items()}, 0.2, repeats=(5, 100))
        spread.update({name: float(np.median(np.abs(own / np.median(own) - 1))) for name, own in times.items()})
        return medians(times)

    def median_s(name, call):
        return medians_s({name: call})[name]

    matmul = []
    for width in WIDTHS:
        rows, inner, columns = sizes.product(width)
        count = max(2, _COLD_BYTES // (dtype.itemsize * (rows * inner + inner * columns + rows * columns)))
        pairs = [(torch.rand(rows, inner, **kind), torch.rand(inner, columns, **kind)) for _ in range(count)]
        seconds = median_s(f"product {width}", lambda pairs=pairs: [multiply(a, b) for a, b in pairs]) / count
        matmul.append((width, 2 * rows * inner * columns / seconds))
        if seconds > _LONG_S:
            break
    source, small = torch.rand(sizes.memory_bytes // 4, device=device), torch.rand(8, **kind)
    target = torch.zeros_like(source)
    added_s = median_s("memory", lambda: target.add_(source))  # as an optimiser: a copy also reads what it overwrites
    gate, up = (torch.rand(sizes.rows, sizes.ffn, requires_grad=True, **kind) for _ in range(2))
    gated_s = median_s("elementwise", lambda: (functional.silu(gate) * up).sum().backward())
    heads = torch.rand(2, sizes.sequences, 8, sizes.seq, 64, requires_grad=True, **kind)
    attention_s = median_s("attention", lambda: functional.scaled_dot_product_attention(
        heads[0], heads[1], heads[1], is_causal=True).sum().backward())
    kernel_s = median_s("kernels", lambda: [small + 1 for _ in range(sizes.kernels)])
    nodes = group.schedules.nodes if group.size > 1 else (0,)
    inside = max(nodes.count(node) for node in nodes)
    levels = [_level("node", group.comm, nodes[group.rank], inside, table, device, medians_s)] if inside > 1 else []
    if len(set(nodes)) > 1:
        lane = nodes[:group.rank].count(nodes[group.rank])
        levels.append(_level("network", group.comm, lane, len(set(nodes)), table, device, medians_s))
    if not levels:
        levels = [Level("node", 1, 0.0, 0.0)]
    levels[-1] = replace(levels[-1], size=EVERYWHERE if len(levels) > 1 else inside)
    return Machine(
        f"{group.size} ranks on {len(set(nodes))} nodes",
        f"mpillm probe, {device_name(device)}, {str(dtype).removeprefix('torch.')}", tuple(levels), _rising(matmul),
        _free_bytes(group.comm, device), 3 * source.nbytes / added_s, kernel_s,
        elementwise_bytes_per_s=(2 + 3) * 3 * gate.nbytes / gated_s,  # three tensors, see workload.BACKWARD_BYTES
        attention_flops_per_s=3 * 2 * sizes.sequences * 8 * 64 * sizes.seq**2 / attention_s,
        shares_memory=device.type == "cpu" and group.size > 1 and group.node is not None, num_ranks=group.size,
        num_nodes=len(set(nodes)), table=table.rows, repeatability=spread, wave=_wave(device),
        hides_calls=device.type == "cuda", adds_in_parts=onednn_gains(group.comm, device, dtype),
        speeds=_speeds(group.comm, _rising(matmul), device, dtype, multiply),
    )


def as_of_now(comm, machine, device, dtype, multiply=torch.mm):
    """Return a machine with what changes from launch to launch measured again: the speeds of ranks, and free memory.

    Collective over ``comm``; all ranks return the same. Takes half a second.
    """
    speeds = _speeds(comm, machine.matmul, device, dtype, multiply)
    return replace(machine, memory_bytes=_free_bytes(comm, device), speeds=speeds)


def _wave(device):
    """Return the multiprocessors of a GPU and the sides of the tile that each makes of a product; nothing for a CPU."""
    return (torch.cuda.get_device_properties(device).multi_processor_count, *_TILE) if device.type == "cuda" else ()


def _free_bytes(comm, device):
    """Return the memory that a rank may have: its share of what is free on its device, files that are kept in memory
    counted as that, on the fullest one. Of a node's memory no more counts than its cgroup, RLIMIT_AS and SLURM_MEM_PER_NODE
    leave the job."""
    if device.type == "cuda":  # ranks of a node may each see another GPU as their first
        name = str(torch.cuda.get_device_properties(device).uuid)
        bounds = [limits.MemoryLimit(name, torch.cuda.mem_get_info(device)[0])]
    else:
        bounds = limits.memory_bounds()
    return min(comm.allgather(limits.memory_of_rank(comm, bounds)[0]))


def _speeds(comm, matmul, device, dtype, multiply):
    """Return what each rank sustains as a multiple of the measured rate; nothing where all are about equal.

    A rank that shares its core with another program gets it in slices longer than one product.
    """
    width, flops_per_s = max(point for point in matmul if point[0] <= _SUSTAINED_WIDTH)
    product, sizes, count = _product(device, dtype, width, multiply), SIZES[device.type], 0
    comm.Barrier()
    start = time.perf_counter()
    while time.perf_counter() - start < _SUSTAINED_S:
        for _ in range(sizes.at_once):
            product()
        synchronize(device)
        count += sizes.at_once
    rates = comm.allgather(2 * math.prod(sizes.product(width)) * count / (time.perf_counter() - start))
    return tuple(rate / flops_per_s for rate in rates) if max(rates) > _UNEQUAL * min(rates) else ()


def _level(name, comm, colour, size, table, device, medians_s):
    """Measure allreduces and their halves among ranks of one colour, all colours at once. A message of their ring takes
    what an allreduce tells of it; or its halves, where these are faster: some libraries leave a network half idle in an
    allreduce, and gradients take the halves."""
    part = comm.Split(colour, comm.rank)
    member = Group(part, name, table=table)
    taken_s, whole_s, adding_s = {}, [], 0.0
    with largest_window(member, _LEVEL_BYTES if device.type == "cpu" else (), torch.float32) as window:
        room_bytes = min(comm.allgather(0 if window is None else window.nbytes))
        for n_bytes in _LEVEL_BYTES:
            tensors = [torch.zeros(n_bytes // 4, device=device)]
            if n_bytes <= room_bytes:
                tensors.append(window[:n_bytes // 4])
            calls = {(op, in_window): make_call(op, x, member)
                     for in_window, x in enumerate(tensors) for op in _LEVEL_OPERATIONS}
            names = {key: f"{name} {key[0]} {n_bytes}{' in a window' * key[1]}" for key in calls}
            found_s = medians_s({names[key]: call for key, call in calls.items()})
            for key in calls:
                taken_s.setdefault(key, []).append(found_s[names[key]])
            allreduce_s, scattered_s, gathered_s = (taken_s[op, False][-1] for op in _LEVEL_OPERATIONS)
            whole_s.append(min(allreduce_s, scattered_s + gathered_s))
            adding_s = min(max(0.0, scattered_s - gathered_s), whole_s[-1] / 2)  # the largest counts
            if len(whole_s) > 1 and allreduce_s > _SLOW_S:
                break
    busy_s_per_byte = _busy_s_per_byte(part, device) if name == "network" else 0.0
    skew_s = _skew_s(comm, make_call("allreduce", torch.zeros(_LEVEL_BYTES[0] // 4, device=device), member), device)
    member.free()
    sizes = np.array(_LEVEL_BYTES[:len(whole_s)])
    gamma = adding_s / sizes[-1] * size / (size - 1)
    messages_s = (np.array(_not_falling(whole_s)) - gamma * sizes * (size - 1) / size) / (2 * (size - 1))
    messages_s = np.maximum.accumulate(np.maximum(messages_s, 0.0)).tolist()
    beta = (messages_s[-1] - messages_s[0]) / (sizes[-1] - sizes[0]).item() * size
    return Level(name, size, messages_s[0], beta, gamma.item(), tuple(zip((sizes / size).tolist(), messages_s)), skew_s,
                 busy_s_per_byte, tuple(Measured(op, bool(in_window), size, tuple(zip(sizes.tolist(), _not_falling(own))))
                                        for (op, in_window), own in taken_s.items()))


def _not_falling(times_s):
    """Return times of ever more bytes, none longer than that of more: what disturbs a measurement adds to it."""
    return np.minimum.accumulate(times_s[::-1])[::-1].tolist()


def _skew_s(comm, call, device):
    """Return what ranks that compute in between wait for each other at a collective, on top of what it takes alone."""
    product = _product(device)

    def repeat(*parts):
        def run():
            for _ in range(_MEETINGS):
                for part in parts:
                    part()
            synchronize(device)
        return run

    work_s, talk_s, both_s = medians(time_calls(comm, {
        "work": repeat(product), "talk": repeat(call), "both": repeat(product, call)})).values()
    return max(0.0, both_s - work_s - talk_s) / _MEETINGS


def _busy_s_per_byte(comm, device):
    """Return what a byte of a message takes of a rank that computes meanwhile, at either end: ranks send around a ring."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x, out = (torch.zeros(_BUSY_BYTES // 4) for _ in range(2))
    product = _product(device)

    def exchange():
        return [comm.Irecv(as_words(out), source), comm.Isend(as_words(x), to)]

    def work(times, requests=()):
        for _ in range(times):
            product()
            synchronize(device)
            for request in requests:  # as a pipeline does between its actions
                request.Test()
        for request in requests:
            request.Wait()

    talk_s, once_s = medians(time_calls(comm, {"talk": lambda: work(0, exchange()), "once": lambda: work(1)})).values()
    times = math.ceil(2 * talk_s / once_s)  # long enough to hide the message
    alone_s, both_s = medians(time_calls(comm, {
        "alone": lambda: work(times), "both": lambda: work(times, exchange())})).values()
    return max(0.0, both_s - alone_s) / (2 * x.nbytes)


def _product(device, dtype=torch.float32, width=_SUSTAINED_WIDTH, multiply=torch.mm):
    """Return a function that makes a product of this width."""
    rows, inner, columns = SIZES[device.type].product(width)
    a, b = (torch.rand(*shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
    return lambda: multiply(a, b)


def _rising(matmul):
    """Return rates that do not fall with the width: what a wide product does slower is noise or a cache, and a product
    can be cut."""
    best, found = 0.0, []
    for width, rate in matmul:
        best = max(best, rate)
        found.append((width, best))
    return tuple(found)

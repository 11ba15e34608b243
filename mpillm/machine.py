"""Machine: what the hardware can do, as the planner sees it; measured by ``mpillm probe``, or a preset."""

import math
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from pydantic import StrictInt

from mpillm.errors import ConfigError
from mpillm.files import write_json
from mpillm.plain import KNOWN_KEYS, load_json


@dataclass(frozen=True)
class Measured:
    """A collective as the ranks of a level were measured to carry it out, by the algorithms of their table.

    Attributes
    ----------
    op : str
    in_window : bool
        Whether the tensors lay in a window of shared memory.
    ranks : int
        How many there were.
    points : tuple of (float, float)
        Bytes of the whole vector, ascending, and seconds, not falling.
    """

    __pydantic_config__ = KNOWN_KEYS
    op: str
    in_window: bool
    ranks: StrictInt
    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        sizes, times = [n for n, _ in self.points], [time_s for _, time_s in self.points]
        if self.ranks < 2 or not sizes or sizes != sorted(set(sizes)) or times != sorted(times) or not (
                0 < min(sizes) and 0 <= times[0] and times[-1] < math.inf):
            raise ConfigError(f"measured {self.op} among {self.ranks} ranks, points {self.points}: needs two ranks or more, "
                              "bytes that are positive and ascend, and seconds that do not fall")

    def time_s(self, ranks, n_bytes):
        """Return the seconds among so many ranks, of an array of them for an array of bytes. Local.

        Linear between the points, constant before the first; beyond the last a byte takes what it takes there. Among
        other numbers of ranks than were measured it takes as many steps, of as many bytes, as a ring.
        """
        sizes, times = zip(*self.points)
        whole = n_bytes * (self.ranks / ranks)
        return (np.interp(whole, sizes, times) * np.maximum(whole / sizes[-1], 1.0)) * (ranks - 1) / (self.ranks - 1)

    def faster(self, factor):
        """Return it with so many times the bandwidth and the same latency. Local."""
        start_s = self.points[0][1]
        return replace(self, points=tuple((n, start_s + (time_s - start_s) / factor) for n, time_s in self.points))


@dataclass(frozen=True)
class Level:
    """One level of the machine: ranks that reach each other over the same kind of link.

    Attributes
    ----------
    name : str
    size : int
        Ranks in one group of this level; the last level holds all.
    alpha_s, beta_s_per_byte : float
        Time of a message: ``alpha_s + n beta_s_per_byte``, for each rank while all ranks talk.
    gamma_s_per_byte : float
        What it takes on top of that to add a byte that arrived to one's own.
    points : tuple of (float, float)
        Measured messages: bytes, ascending, and seconds, not falling. Empty where the two figures say it all.
    skew_s : float
        What ranks that compute in between wait for each other at a collective, on top of what it takes by itself: some
        per cent of the work, and where ranks share a core, until the system lets the other one run.
    busy_s_per_byte : float
        What a byte of a message takes of a rank that computes meanwhile, at either end: where the processor drives the
        network. Inside a node, where pipelines hand over in memory, it is not measured.
    collectives : tuple of Measured
        What collectives took by the table; empty where they are priced by the messages that they are made of.
    """

    __pydantic_config__ = KNOWN_KEYS
    name: str
    size: StrictInt
    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float = 0.0
    points: tuple[tuple[float, float], ...] = ()
    skew_s: float = 0.0
    busy_s_per_byte: float = 0.0
    collectives: tuple[Measured, ...] = ()

    def message_s(self, n_bytes):
        """Return the seconds of a message, of an array of them for an array of bytes. Local.

        Linear between the measured points, constant before the first; beyond the last it grows by the level's rate.
        """
        if not self.points:
            return self.alpha_s + n_bytes * self.beta_s_per_byte
        sizes, times = zip(*self.points)
        return np.interp(n_bytes, sizes, times) + np.maximum(n_bytes - sizes[-1], 0.0) * self.beta_s_per_byte

    def faster(self, factor):
        """Return the level with so many times the bandwidth and the same latency. Local."""
        points = tuple((n, self.alpha_s + (time_s - self.alpha_s) / factor) for n, time_s in self.points)
        return replace(self, beta_s_per_byte=self.beta_s_per_byte / factor, points=points,
                       collectives=tuple(one.faster(factor) for one in self.collectives))

    def measured(self, op, in_window=False):
        """Return the :class:`Measured` of an operation on tensors in a window or not, or None. Local.

        Where tensors in a window were not measured, they take what others do, as in a table.
        """
        found = {one.in_window: one for one in self.collectives if one.op == op}
        return found.get(in_window, found.get(False))


@dataclass(frozen=True)
class Machine:
    """What every rank of a launch can do, while all others do the same.

    Attributes
    ----------
    name, source : str
        What it is; where the figures come from.
    levels : tuple of Level
        From the inside out.
    matmul : tuple of (int, float)
        FLOPs a second of matrix products whose smallest dimension is so wide, in ascending order; interpolated in the
        logarithm, held beyond the ends.
    wave : tuple of int
        Multiprocessors, and the two sides of the tile that each makes of a product while the others make theirs; empty
        where products are not made in such waves.
    memory_bytes, memory_bytes_per_s : float
        Memory of a rank, and how fast it is read and written.
    elementwise_bytes_per_s, attention_flops_per_s : float
        What kernels that are neither copies nor products reach: activations and norms by the bytes they read and write,
        attention by its products. 0 stands for the memory's rate, and for the product of a head's size.
    call_s : float
        Overhead of one layer's forward: launching kernels, the interpreter.
    shares_memory : bool
        Whether ranks of a node share windows, so that replicas keep one copy of the weights.
    adds_in_parts : bool
        Whether a product in float32 is added to a gradient part by part, which takes memory: where oneDNN multiplies. So where
        nothing is known.
    keeps_scores : bool
        Whether its programs keep attention scores as a matrix, and what an activation makes of its input: those of a time
        before fused attention, by which the machine was calibrated.
    hides_calls : bool
        Whether ``call_s`` runs beside the kernels before, as on a GPU that was measured; else it comes on top of them.
    num_ranks, num_nodes : int
        Of the launch that was measured; 0 for a preset, which stands for any number.
    table : tuple
        Rows of the measured :class:`mpillm.plan.DecisionTable`.
    speeds : tuple of float
        What every rank sustains, as a multiple of ``matmul``; empty where all are about equal.
    repeatability : dict of str to float
        For measured figures the median relative deviation between repetitions.
    """

    __pydantic_config__ = KNOWN_KEYS
    name: str
    source: str
    levels: tuple[Level, ...]
    matmul: tuple[tuple[StrictInt, float], ...]
    memory_bytes: float
    memory_bytes_per_s: float
    call_s: float = 0.0
    elementwise_bytes_per_s: float = 0.0
    attention_flops_per_s: float = 0.0
    shares_memory: bool = False
    adds_in_parts: bool = True
    keeps_scores: bool = False
    hides_calls: bool = False
    wave: tuple[StrictInt, ...] = ()
    num_ranks: StrictInt = 0
    num_nodes: StrictInt = 0
    table: tuple[tuple, ...] = ()
    speeds: tuple[float, ...] = ()
    repeatability: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if len(self.wave) not in (0, 3) or min(self.elementwise_bytes_per_s, self.attention_flops_per_s) < 0:
            raise ConfigError(f"machine {self.name}: wave {list(self.wave)} must have three sizes or none; "
                              f"elementwise_bytes_per_s {self.elementwise_bytes_per_s} and attention_flops_per_s "
                              f"{self.attention_flops_per_s} must not be negative")
        rates = [rate for _, rate in self.matmul] + [self.memory_bytes, self.memory_bytes_per_s]
        times = [self.call_s]
        for level in self.levels:
            times += [level.alpha_s, level.beta_s_per_byte, level.gamma_s_per_byte, level.skew_s, level.busy_s_per_byte]
            sizes, measured_s = [n for n, _ in level.points], [time_s for _, time_s in level.points]
            times += measured_s
            if sizes != sorted(set(sizes)) or measured_s != sorted(measured_s):
                raise ConfigError(f"machine {self.name}: points {level.points} of level {level.name}: their bytes must "
                                  "ascend, and their seconds must not fall")
        if not self.levels or not self.matmul or not all(0 < rate < math.inf for rate in rates) or not all(
                0 <= time < math.inf for time in times):
            raise ConfigError(f"machine {self.name}: it needs levels and matrix rates; rates must be positive "
                              f"and times at least zero; found rates {rates}, times {times}")
        sizes, widths = [level.size for level in self.levels], [width for width, _ in self.matmul]
        if min(sizes + widths) < 1 or sizes != sorted(sizes) or widths != sorted(set(widths)):
            raise ConfigError(f"machine {self.name}: sizes of levels {sizes}, widths of matrix products {widths}: both "
                              "must be positive and ascend, from the innermost level and the narrowest product on")
        if self.speeds and (len(self.speeds) != self.num_ranks or not all(0 < s < math.inf for s in self.speeds)):
            raise ConfigError(f"machine {self.name}: speeds {list(self.speeds)}: needs one positive number for each of "
                              f"its {self.num_ranks} ranks")

    @property
    def ranks_per_node(self):
        """Ranks of the innermost level."""
        return self.levels[0].size

    def matmul_flops_per_s(self, width):
        """Return the rate of a product whose smallest dimension is ``width``. Local."""
        points = self.matmul
        if width <= points[0][0]:
            return points[0][1]
        for (low, slow), (high, fast) in zip(points, points[1:]):
            if width <= high:
                return slow + (fast - slow) * math.log(width / low) / math.log(high / low)
        return points[-1][1]

    def product_s(self, rows, inner, columns):
        """Return the seconds of a product ``[rows, inner] @ [inner, columns]``, its last wave as long as any. Local."""
        seconds = 2 * rows * inner * columns / self.matmul_flops_per_s(min(rows, inner, columns))
        if not self.wave:
            return seconds
        at_once, long, short = self.wave
        made = min(math.ceil(math.ceil(rows / high) * math.ceil(columns / wide) / at_once)
                   for high, wide in ((long, short), (short, long))) * at_once * long * short
        return seconds * made / (rows * columns)

    def with_call(self, kernels_s):
        """Return the seconds of a layer's kernels with the overhead of starting them. Local."""
        return max(kernels_s, self.call_s) if self.hides_calls else kernels_s + self.call_s

    def level_for(self, reach):
        """Return the level over which ``reach`` neighbouring ranks talk. Local."""
        return next((level for level in self.levels if reach <= level.size), self.levels[-1])

    def level_between(self, rank, other):
        """Return the innermost level that holds both ranks in one group. Local."""
        return next((level for level in self.levels if rank // level.size == other // level.size), self.levels[-1])

    def node_of(self, rank):
        """Return the node that a rank is on. Local."""
        return rank // self.ranks_per_node

    def scaled(self, what, factor):
        """Return the machine with one figure multiplied.

        Local. ``what`` is ``matmul``, the attribute of a figure of memory, elementwise work or attention, the name of a
        level for its bandwidth, or ``speed of rank R``.
        """
        speeds = {f"speed of rank {rank}": rank for rank in range(len(self.speeds))}
        if what in speeds:
            return replace(self, speeds=tuple(speed * (factor if rank == speeds[what] else 1)
                                              for rank, speed in enumerate(self.speeds)))
        if what == "matmul":
            return replace(self, matmul=tuple((width, rate * factor) for width, rate in self.matmul))
        if what in ("memory_bytes", "memory_bytes_per_s", "elementwise_bytes_per_s", "attention_flops_per_s"):
            return replace(self, **{what: getattr(self, what) * factor})
        return replace(self, levels=tuple(level.faster(factor) if level.name == what else level
                                          for level in self.levels))

    def save(self, path):
        """Write the machine as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, name):
        """Return a preset by its name, or read a file that :meth:`save` wrote.

        Raises
        ------
        ConfigError
            If it is neither.
        """
        if name in PRESETS:
            return PRESETS[name]
        return load_json(cls, name, "machine", f"give a file that mpillm probe wrote, or one of {', '.join(PRESETS)}")


EVERYWHERE = 1 << 20  # the size of a preset's last level

# Sustained matrix rates are the largest that a search over shapes measured (Bekman, Machine Learning Engineering,
# 2024). Products of 4096 x 4096 over an inner dimension of 256 and 1024 reach 392 and 681 of the 785 TFLOP/s of 4096
# on an H100 (OpenXLA, gpu/model/matmul_interpolator_data.h, 2025); the others are taken to lose as much. A layer's
# forward is about 20 kernels of 2.1 us to launch (Spector et al., Look Ma, No Bubbles, 2025). A rank's share of the
# network is the node's over its ranks; collectives inside reach 78 % of NVLink on A100 and 82 % on H100 (nccl-tests,
# Bekman). Elementwise kernels reach nine tenths of the memory's rate (Calculon, Isaev et al. 2023). Multiprocessors are
# those of the data sheets, tiles those of NVIDIA's Matrix Multiplication Background User's Guide (2023).
# Latencies: TACCL (Shah et al. 2023), and nccl-tests' 32 KiB over the 14 messages of a ring of eight.
# What A100s took for whole iterations was published for programs that keep attention scores (Narayanan et al. 2021).
# What a CPU sustains of its data sheet is an estimate: measure yours.
_LAUNCH_S = 20 * 2.1e-6


def _narrower(flops_per_s):
    """Return the rates of narrow products of an accelerator whose wide ones reach ``flops_per_s``."""
    return (256, flops_per_s * 392 / 785), (1024, flops_per_s * 681 / 785), (4096, flops_per_s)


PRESETS = {machine.name: machine for machine in (
    Machine("dgx-a100", "NVIDIA A100 SXM 80 GB data sheet; DGX A100: 8 GPUs, 8 x 200 Gb/s",
            (Level("node", 8, 3e-6, 1 / 235e9), Level("network", EVERYWHERE, 5e-6, 1 / 25e9)),
            _narrower(271.2e12), 80e9, 2.04e12, _LAUNCH_S, 0.9 * 2.04e12, keeps_scores=True, wave=(108, 256, 128)),
    Machine("dgx-h100", "NVIDIA H100 SXM 80 GB data sheet; DGX H100: 8 GPUs, 8 x 400 Gb/s",
            (Level("node", 8, 3e-6, 1 / 367e9), Level("network", EVERYWHERE, 5e-6, 1 / 50e9)),
            _narrower(794.5e12), 80e9, 3.35e12, _LAUNCH_S, 0.9 * 3.35e12, wave=(132, 256, 128)),
    Machine("mi250x-node", "AMD Instinct MI250X data sheet; 8 dies of 64 GB a node, 4 x 200 Gb/s",
            (Level("node", 8, 5e-6, 1 / 40e9), Level("network", EVERYWHERE, 5e-6, 1 / 12.5e9)),
            _narrower(125e12), 64e9, 1.6e12, _LAUNCH_S),
    Machine("cpu-node", "AMD EPYC 7763 data sheet: a rank a socket of 64 cores, 2.45 GHz, 32 FLOPs a cycle, "
            "8 x DDR4-3200; 100 Gb/s a node",
            (Level("node", 2, 1e-6, 1 / 20e9), Level("network", EVERYWHERE, 2e-6, 1 / 6.25e9)),
            ((64, 1.5e12), (256, 3e12), (1024, 4e12)), 256e9, 0.8 * 204.8e9, 5e-4, shares_memory=True),
)}

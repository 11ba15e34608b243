"""What collectives cost over one level of a machine: as measured, as a ring of messages, by the fastest algorithm."""

import numpy as np

# Rounds, and bytes that a rank sends as a share of the whole (Thakur et al. 2005; Bruck et al. 1997).
FORMULAS = {
    "allreduce": {
        "recursive_doubling": lambda p: (_log(p), _log(p)),
        "halving_doubling": lambda p: (2 * _log(p), 2 * (p - 1) / p + (0 if _is_power(p) else 1)),
        "ring": lambda p: (2 * (p - 1), 2 * (p - 1) / p),
    },
    "reduce_scatter": {
        "recursive_halving": lambda p: (_log(p), (p - 1) / p + (0 if _is_power(p) else 1)),
        "ring": lambda p: (p - 1, (p - 1) / p),
    },
    "allgather": {
        "bruck": lambda p: (_log(p), (p - 1) / p),
        "ring": lambda p: (p - 1, (p - 1) / p),
    },
    "bcast": {
        "binomial": lambda p: (_log(p), _log(p)),
        "scatter_allgather": lambda p: (_log(p) + p - 1, 2 * (p - 1) / p),
    },
    "alltoall": {
        "bruck": lambda p: (_log(p), _log(p) / 2),
        "pairwise": lambda p: (p - 1, (p - 1) / p),
    },
}


def ring_s(level, size, n_bytes, op="allreduce"):
    """Return how long a ring takes.

    Local.

    Parameters
    ----------
    level : Level
        The link between neighbours.
    size : int
        Ranks of the ring.
    n_bytes : float or ndarray
        Of the whole vector.
    op : {"allreduce", "reduce_scatter", "allgather"}

    Returns
    -------
    float or ndarray
        Seconds.
    """
    passes, sums = {"allreduce": (2, 1), "reduce_scatter": (1, 1), "allgather": (1, 0)}[op]
    part = n_bytes / size
    return (size - 1) * (passes * level.message_s(part) + sums * part * level.gamma_s_per_byte)


def collective_s(op, level, ranks, n_bytes, in_window=False):
    """Return the seconds of a collective for each number of bytes over one level.

    Local. By the table, where it was measured; of a level that knows measured messages alone, as a ring of them; else by
    the fastest algorithm.

    Parameters
    ----------
    op : {"allreduce", "reduce_scatter", "allgather"}
    level : Level
    ranks : int
    n_bytes : float or ndarray
        Of the whole vector.
    in_window : bool
        Whether the tensors lie in a window of shared memory.
    """
    measured = level.measured(op, in_window)
    if measured and ranks > 1:
        return measured.time_s(ranks, n_bytes)
    if ranks == 1 or level.points:
        return ring_s(level, ranks, n_bytes, op)
    adding_s = n_bytes * (ranks - 1) / ranks * level.gamma_s_per_byte if op != "allgather" else 0.0
    return np.minimum.reduce([time_s(op, name, level, ranks, n_bytes) for name in FORMULAS[op]]) + adding_s


def time_s(op, algorithm, level, ranks, n_bytes):
    """Return the seconds of an algorithm; what adding takes is left out, which is about the same for all. Local."""
    rounds, share = FORMULAS[op][algorithm](ranks)
    return rounds * level.message_s(share * n_bytes / rounds)


def _log(p):
    return (p - 1).bit_length()


def _is_power(p):
    return p & (p - 1) == 0

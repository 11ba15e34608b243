"""Dynamic program: what a table of measured times need not cost, because another size or operation does the same."""

import math

from mpillm.schedules.algorithm import COMPOSED, PADDED, PIECES, WHOLE, Algorithm

_GAIN = 0.8  # what is done instead copies and calls more than once: it must be clearly faster


def repair(measured):
    """Return what to take for every operation and size.

    Local. The guidelines of Träff, Gropp and Thakur (2010) turned into choices: an allreduce need not take longer than
    a reduce-scatter and an allgather, a message not longer than a padded one or than its pieces,

    .. math:: T(n) = \\min(t(n), \\min_{m > n} t(m), \\min_{m < n} \\lceil n / m \\rceil\\, t(m), t_{RS}(n) + t_{AG}(n))

    with the last also within the two before. Nesting these any deeper gains nothing: pieces of pieces are more pieces,
    and a piece padded to :math:`m` bytes could have been as long.

    Parameters
    ----------
    measured : dict of str to dict of int to (str, float)
        For every operation the sizes in bytes, each with the fastest algorithm and its seconds.

    Returns
    -------
    dict of str to dict of int to str
        The text of an :class:`~mpillm.schedules.algorithm.Algorithm`: as measured, or a repaired one.
    """
    found = {}
    for op, sizes in measured.items():
        plain = {n_bytes: _whole_or_composed(op, n_bytes, measured) for n_bytes in sizes}
        found[op] = {n_bytes: _padded_or_split(op, n_bytes, plain) for n_bytes in sizes}
    return found


def _whole_or_composed(op, n_bytes, measured):
    name, seconds = measured[op][n_bytes]
    halves = [measured.get(half, {}).get(n_bytes, (None, math.inf))[1] for half in ("reduce_scatter", "allgather")]
    is_better = op == "allreduce" and sum(halves) < _GAIN * seconds
    return (COMPOSED, sum(halves)) if is_better else (name, seconds)


def _padded_or_split(op, n_bytes, plain):
    name, seconds = plain[n_bytes]
    others = [(math.ceil(n_bytes / other) * time, str(Algorithm(PADDED if other > n_bytes else PIECES, other)))
              for other, (_, time) in plain.items() if other != n_bytes and op in WHOLE]
    least, instead = min(others, default=(math.inf, name))
    return instead if least < _GAIN * seconds else name

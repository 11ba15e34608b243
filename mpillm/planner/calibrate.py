"""Linear programs that fit a cost model to what was measured: rates to iterations, memory to runs that fitted or not.

Rows are training iterations of GPT-shaped models (two-matrix feed-forward, 1F1B, full recompute). What a row costs is
a sum of *features*, each in seconds at a nominal rate, times coefficients that the fit finds. Within one node, where
rows are many and repeat well:

==================  =================================================================================================
layer               one layer's products, attention's too, times the slots of the pipeline; a coefficient for every degree
                    of tensor, rows and hidden size: a table of efficiencies, interpolated in the logarithm of the latter
                    two
launch              a constant for every layer and slot, without which a table from small layers would have large ones slow
head                the products of the output head
optimiser           bytes of parameters that a rank updates
message             bytes and calls between pipeline stages
gradients           bytes reduced over data ranks, and calls
waiting             what stages lose to each other
stage, step         constants of every stage, of every step
==================  =================================================================================================

Across nodes, where rows are few and runs of one kind differ by a fifth and more:

==================  =================================================================================================
products            one layer's products in whole waves of tiles, and attention's, times the slots of the pipeline
activations         bytes of whole activations, which every tensor rank normalises, adds and exchanges
launch              a constant for every layer and slot
head                the products of the output head, in whole waves
tensor across       bytes that tensor ranks exchange between nodes
gradients           bytes reduced over data ranks
shared node         products where several tensor groups share a node, times the nodes: these runs are slower the
                    more nodes there are
==================  =================================================================================================
"""

import csv
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_array, csr_array, eye_array

from mpillm.errors import ConfigError, DataError

COLUMNS = ("gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq", "tensor", "data", "pipeline")
MEASURED = "iteration_ms"
VOCAB_SIZE = 50257
GPUS_PER_NODE = 8
# Nominal rates of one NVIDIA A100 SXM (data sheet 2020): dense float16 products, memory, NVLink one way; and the share
# of a 100 GB/s node that one of eight GPUs has.
FLOPS, MEMORY, LINK, NETWORK = 312e12, 2.0e12, 300e9, 12.5e9
CALL_S = 1e-3
FORWARDS = 4  # whose worth of products a microbatch takes: forward, again, and a backward of two (Narayanan et al. 2021)
# Its multiprocessors, and the tiles that its products are cut into; all multiprocessors work through a wave of tiles
# together (NVIDIA, Matrix Multiplication Background User's Guide, 2023).
MULTIPROCESSORS, TILES = 108, ((128, 256), (256, 128))


@dataclass(frozen=True)
class Calibration:
    """What a fit found: for one node (``False``) and several (``True``) the table's nodes and the coefficients."""

    grids: dict
    coefficients: dict

    def predict_s(self, rows):
        """Return the seconds of every row, as read by :func:`read_rows`. Local.

        Raises
        ------
        ConfigError
            If a row is of a kind, one node or several, of which none was measured.
        """
        predicted = np.zeros(len(rows["gpus"]))
        for across, chosen in _regimes(rows):
            if across not in self.coefficients:
                where = "several nodes" if across else "one node"
                raise ConfigError(f"rows of {where} (gpus {'>' if across else '<='} {GPUS_PER_NODE}) are to be "
                                  "predicted, but none of them was measured: add some to --measured")
            features = _features(_take(rows, chosen), across, self.grids[across])
            predicted[chosen] = sum(self.coefficients[across][name] * seconds for name, seconds in features.items())
        return predicted


def read_rows(path, is_measured):
    """Read rows from CSV with the columns :data:`COLUMNS` and, if ``is_measured``, ``iteration_ms``.

    Local. Other columns are left aside. Returns a dict of name to float64 array.

    Raises
    ------
    DataError
        Naming file, line and column of what is missing or not a positive number.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    names = set(found[0]) if found else set()
    columns = COLUMNS + ((MEASURED,) if is_measured or MEASURED in names else ())
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path}: {'has no rows' if not found else 'lacks the columns ' + ', '.join(missing)}; "
                        f"it needs a header and rows of {', '.join(columns)}")
    return {name: np.array([_number(path, line, name, row[name]) for line, row in enumerate(found, 2)])
            for name in columns}


def _number(path, line, name, text):
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise DataError(f"{path}, line {line}: {name} = {text!r}: it must be a positive number")
    return value


def calibrate(rows):
    """Fit the cost model to measured iterations.

    Local. One linear program for rows of one node and one for those of several.

    Parameters
    ----------
    rows : dict of str to ndarray
        As :func:`read_rows` gives, with ``iteration_ms``.

    Returns
    -------
    Calibration
    """
    grids, coefficients = {}, {}
    for across, chosen in _regimes(rows):
        kind = _take(rows, chosen)
        grids[across] = {} if across else {
            "tensor": sorted(set(kind["tensor"])), "rows": _doublings(kind["micro_batch"] * kind["seq"]),
            "hidden": _doublings(kind["hidden"])}
        features = _features(kind, across, grids[across])
        least = [float(name == "tensor across") for name in features]  # no wire is faster than its nominal rate
        values = fit_rates(np.stack(list(features.values()), 1), kind[MEASURED] / 1e3, least)
        coefficients[across] = dict(zip(features, values.tolist()))
    return Calibration(grids, coefficients)


def fit_rates(features_s, measured_s, least=0.0):
    """Return coefficients, at least ``least``, of the smallest sum of absolute relative errors.

    Local. ``min sum u`` subject to ``-u <= (X c) / t - 1 <= u``: least absolute deviations, which outliers do not pull
    (Charnes, Cooper and Ferguson 1955), as a linear program with a variable for every column and every row.

    Parameters
    ----------
    features_s : ndarray ``[rows, features]``
    measured_s : ndarray ``[rows]``
    least : float or sequence of float
    """
    relative = csr_array(features_s / measured_s[:, None])
    n, k = relative.shape
    bounds = [(low, None) for low in np.broadcast_to(least, k)] + [(0, None)] * n
    limits = block_array([[relative, -eye_array(n)], [-relative, -eye_array(n)]]).tocsr()
    found = linprog(np.r_[np.zeros(k), np.ones(n)], A_ub=limits, b_ub=np.r_[np.ones(n), -np.ones(n)], bounds=bounds,
                    method="highs")
    return found.x[:k]


def fit_memory(features_bytes, fitted, capacity_bytes, margin_bytes=0.0, least=0.0):
    """Return coefficients with which the rows that fitted into memory stay below the capacity, the others above.

    Local. ``min sum u`` with ``X c <= C - margin + u`` for rows that fitted, ``X c >= C + margin - u`` for those that
    did not, ``c >= least``: what a byte of parameter, state or activation costs at the least (the soft-margin program
    of Bennett and Mangasarian 1992, with physical bounds).

    Parameters
    ----------
    features_bytes : ndarray ``[rows, features]``
    fitted : sequence of bool
    """
    sign = np.where(fitted, 1.0, -1.0)
    n, k = features_bytes.shape
    signed = csr_array(features_bytes * sign[:, None] / capacity_bytes)
    bounds = [(low, None) for low in np.broadcast_to(least, k)] + [(0, None)] * n
    limits = block_array([[signed, -eye_array(n)]]).tocsr()
    found = linprog(np.r_[np.zeros(k), np.ones(n)], A_ub=limits, b_ub=sign - margin_bytes / capacity_bytes,
                    bounds=bounds, method="highs")
    return found.x[:k]


def _regimes(rows):
    """Return for one node, for several, which rows are of it."""
    across = rows["gpus"] > GPUS_PER_NODE
    return [(kind, np.flatnonzero(across == kind)) for kind in (False, True) if (across == kind).any()]


def _take(rows, chosen):
    return {name: values[chosen] for name, values in rows.items()}


def _doublings(values):
    """Return the powers of two that span the values."""
    low, high = (int(np.floor(np.log2(values.min()) + 1e-9)), int(np.ceil(np.log2(values.max()) - 1e-9)))
    return [2.0 ** k for k in range(low, high + 1)]


def _hats(values, nodes):
    """Return for every node how much each value belongs to it: linear in the logarithm, held beyond the ends."""
    at = np.log2(nodes)
    return [np.interp(np.log2(values), at, share) for share in np.eye(len(nodes))]


def _features(rows, across, grid):
    """Return the features of every row, in seconds at nominal rates, by name."""
    h, t, d, p, tokens = (rows[name] for name in ("hidden", "tensor", "data", "pipeline", "seq"))
    tokens = tokens * rows["micro_batch"]
    microbatches = np.maximum(1, np.ceil(rows["global_batch"] / (d * rows["micro_batch"])))
    layers = rows["layers"] / p
    slots = (microbatches + p - 1) * layers
    attention = FORWARDS * 4 * tokens * rows["seq"] * h / t  # of all positions: no kernel left out those that nobody sees
    parameters = 12 * rows["layers"] * h * h / (t * p) + VOCAB_SIZE * h / t
    reduced = 2 * (d - 1) / d * parameters * 2
    if across:
        products = slots * (_layer_flops(h, t, tokens) + attention) / FLOPS
        return {
            "products": products,
            "activations": slots * tokens * h * 2 / MEMORY,
            "launch": slots * CALL_S,
            "head": microbatches * 3 * _in_waves(tokens, VOCAB_SIZE / t, h) / FLOPS,
            "tensor across": (t > GPUS_PER_NODE) * slots * 6 * 2 * tokens * h * 2 * (t - 1) / t
            / (NETWORK * GPUS_PER_NODE),
            "gradients": reduced / NETWORK,
            "shared node": (t > 1) * (t < GPUS_PER_NODE) * products * rows["gpus"] / GPUS_PER_NODE,
        }
    products = slots * (FORWARDS * 24 * tokens * h * h / t + attention) / FLOPS
    nearest = np.array([max((g for g in grid["tensor"] if g <= one), default=grid["tensor"][0]) for one in t])
    found = {}
    for degree in grid["tensor"]:
        for rows_node, by_rows in zip(grid["rows"], _hats(tokens, grid["rows"])):
            for hidden_node, by_hidden in zip(grid["hidden"], _hats(h, grid["hidden"])):
                cell = f"layer tensor={degree:g} rows={rows_node:g} hidden={hidden_node:g}"
                found[cell] = products * (nearest == degree) * by_rows * by_hidden
    return found | {
        "launch": slots * CALL_S,
        "head": microbatches * 3 * 2 * tokens * h * VOCAB_SIZE / t / FLOPS,
        "message bytes": (p > 1) * slots / layers * 4 * tokens * h / NETWORK,
        "message calls": (p > 1) * slots / layers * CALL_S,
        "optimiser": parameters * 16 / MEMORY,
        "gradients bytes": reduced / LINK,
        "gradients calls": (d > 1) * layers * CALL_S,
        "waiting": products / slots * layers * (p - 1),
        "stage": (p > 1) * p * CALL_S,
        "step": np.full_like(h, CALL_S),
    }


def _layer_flops(h, t, tokens):
    """Return what one layer's products take of the multiprocessors: forward twice, and both halves of the backward."""
    total = 0.0
    for inner, outer in ((h, 3 * h / t), (h / t, h), (h, 4 * h / t), (4 * h / t, h)):
        total = total + (2 * _in_waves(tokens, outer, inner) + _in_waves(tokens, inner, outer)
                         + _in_waves(inner, outer, tokens))
    return total


def _in_waves(rows, columns, inner):
    """Return the FLOPs of a product, its last wave of tiles counted as a whole one."""
    return np.minimum.reduce([
        np.ceil(np.ceil(rows / high) * np.ceil(columns / wide) / MULTIPROCESSORS) * MULTIPROCESSORS * high * wide
        * 2 * inner for high, wide in TILES])

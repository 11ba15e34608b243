"""Sums of several tensors in a fixed order: the tree of :mod:`mpillm.schedules.tree`."""

import numpy as np
import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.schedules.tree import split, tree_sum

COMBINE = {"sum": torch.add, "max": torch.maximum}
COMBINE_ARRAYS = {"sum": np.add, "max": np.maximum}


def combine_tree(parts, op="sum", out=None):
    """Combine tensors along the fixed tree; sums of half types in float32, rounded once at the end.

    The result goes to ``out`` if it is given, which may be one of ``parts``. With ``out`` all may be arrays as well.
    """
    if isinstance(out, np.ndarray):
        return _combine(parts, COMBINE_ARRAYS[op], out)
    if op == "sum" and parts[0].dtype in HALF_TYPES:
        total = tree_sum([part.float() for part in parts], torch.add)
        return total.to(parts[0].dtype) if out is None else out.copy_(total)
    if len(parts) == 1:
        return parts[0] if out is None else out.copy_(parts[0])
    return _combine(parts, COMBINE[op], out)


def _combine(parts, combine, out):
    """Combine two parts or more."""
    if len(parts) == 2:
        return combine(*parts, out=out)
    middle = split(len(parts), 0, len(parts))
    left, right = tree_sum(parts[:middle], combine, len(parts)), tree_sum(parts[middle:], combine, len(parts), middle)
    return combine(left, right, out=out)

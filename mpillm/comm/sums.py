"""Sums of several tensors in a fixed order: the tree of :mod:`mpillm.schedules.tree`."""

import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.schedules.tree import split, tree_sum

COMBINE = {"sum": torch.add, "max": torch.maximum}


def combine_tree(parts, op="sum", out=None):
    """Combine tensors along the fixed tree; sums of half types in float32, rounded once at the end.

    The result goes to ``out`` if it is given, which may be one of ``parts``.
    """
    if op == "sum" and parts[0].dtype in HALF_TYPES:
        total = tree_sum([part.float() for part in parts], torch.add)
        return total.to(parts[0].dtype) if out is None else out.copy_(total)
    if len(parts) == 1:
        return parts[0] if out is None else out.copy_(parts[0])
    middle = split(len(parts), 0, len(parts))
    combine = COMBINE[op]
    left, right = tree_sum(parts[:middle], combine, len(parts)), tree_sum(parts[middle:], combine, len(parts), middle)
    return combine(left, right, out=out)

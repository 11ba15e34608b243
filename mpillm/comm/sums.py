"""Sums of several tensors in a fixed order: the tree of :mod:`mpillm.schedules.tree`."""

import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.schedules.tree import tree_sum

COMBINE = {"sum": torch.add, "max": torch.maximum}


def combine_tree(parts, op="sum"):
    """Combine tensors along the fixed tree; sums of half types in float32, rounded once at the end."""
    if op == "sum" and parts[0].dtype in HALF_TYPES:
        return tree_sum([part.float() for part in parts], torch.add).to(parts[0].dtype)
    return tree_sum(parts, COMBINE[op])

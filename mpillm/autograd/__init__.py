"""Movements between ranks as linear operators with adjoints: the only way activations cross ranks."""

from mpillm.autograd.adjoint import check_adjoint
from mpillm.autograd.regions import (
    allgather_to,
    copy_to,
    gather_from,
    reduce_from,
    reduce_scatter_from,
    scatter_to,
)

__all__ = [
    "allgather_to", "check_adjoint", "copy_to", "gather_from", "reduce_from", "reduce_scatter_from", "scatter_to",
]

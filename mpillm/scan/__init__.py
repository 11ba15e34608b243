"""Computations in sequence, made parallel over ranks: scans of associative operators, chains, dynamic programs."""

from mpillm.scan.operators import (
    ADD,
    AFFINE,
    AFFINE_DENSE,
    LOG_ADD,
    LOG_PLUS,
    MAX_PLUS,
    MAXIMUM,
    SOFTMAX,
    Operator,
    companion,
    softmax_partials,
)
from mpillm.scan.prefix import exclusive_scan, reduce, scan

__all__ = [
    "ADD", "AFFINE", "AFFINE_DENSE", "LOG_ADD", "LOG_PLUS", "MAXIMUM", "MAX_PLUS", "Operator", "SOFTMAX", "companion",
    "exclusive_scan", "reduce", "scan", "softmax_partials",
]

"""Computations in sequence, made parallel over ranks: scans of associative operators, chains, dynamic programs."""

from mpillm.scan.crf import crf_log_likelihoods, crf_log_partition, crf_marginals, crf_path_score
from mpillm.scan.decoding import viterbi
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
from mpillm.scan.parsing import best_trees, tree_log_partition, tree_marginals
from mpillm.scan.prefix import exclusive_scan, reduce, scan
from mpillm.scan.segments import best_segmentation, segmentation_log_partition

__all__ = [
    "ADD", "AFFINE", "AFFINE_DENSE", "LOG_ADD", "LOG_PLUS", "MAXIMUM", "MAX_PLUS", "Operator", "SOFTMAX",
    "best_segmentation", "best_trees", "companion", "crf_log_likelihoods", "crf_log_partition", "crf_marginals",
    "crf_path_score", "exclusive_scan", "reduce", "scan", "segmentation_log_partition", "softmax_partials",
    "tree_log_partition", "tree_marginals", "viterbi",
]

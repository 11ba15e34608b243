"""The transformer and its tensor-parallel layers."""

from mpillm.nn.attention import Attention
from mpillm.nn.embedding import VocabularyEmbedding
from mpillm.nn.linear import ColumnParallelLinear, RowParallelLinear
from mpillm.nn.loss import VocabularyHead
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import Layer, TransformerStage

__all__ = [
    "Attention", "ColumnParallelLinear", "Layer", "RowParallelLinear", "TensorSplit", "TransformerStage",
    "VocabularyEmbedding", "VocabularyHead",
]

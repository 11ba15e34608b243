"""The transformer and its tensor-parallel layers."""

from mpillm.nn.attention import Attention
from mpillm.nn.embedding import Embedding
from mpillm.nn.feed_forward import FeedForward
from mpillm.nn.linear import ColumnParallelLinear, RowParallelLinear
from mpillm.nn.loss import ChoiceHead
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import Layer, TransformerStage
from mpillm.nn.values import ValueHead

__all__ = [
    "Attention", "ChoiceHead", "ColumnParallelLinear", "Embedding", "FeedForward", "Layer", "RowParallelLinear", "TensorSplit",
    "TransformerStage", "ValueHead",
]

"""Runs a pipeline schedule: stages on ranks, activations between them."""

from mpillm.pipeline.runner import PipelineRunner
from mpillm.pipeline.stage import Microbatch, Stage

__all__ = ["Microbatch", "PipelineRunner", "Stage"]

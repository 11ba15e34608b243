"""Hugging Face weights in and out, those of GGUF files in; a family of models is a table of names."""

from mpillm.hf.new_run import from_gguf, from_hf
from mpillm.hf.writing import to_hf

__all__ = ["from_gguf", "from_hf", "to_hf"]

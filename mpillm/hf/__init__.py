"""Hugging Face weights in and out; a family of models is a table of names."""

from mpillm.hf.reading import from_hf
from mpillm.hf.writing import to_hf

__all__ = ["from_hf", "to_hf"]

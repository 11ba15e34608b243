"""Where scripts find :class:`Generator`; it lives in :mod:`mpillm.inference.generator`."""

from mpillm.inference.generator import Generator

__all__ = ["Generator"]

"""Holds a layout against the serial model in float64."""

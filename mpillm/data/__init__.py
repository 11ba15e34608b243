"""Texts and tokens: knows files, not models. No MPI, no torch."""

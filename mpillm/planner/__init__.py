"""Pure: chooses. No MPI, no torch."""

"""Watches a run and ends it in good order: hangs, slow ranks, flipped bits, requests to stop. Computes nothing."""

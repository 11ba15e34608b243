"""Uses trained weights: continues rows of tokens, on any layout. Never trains."""

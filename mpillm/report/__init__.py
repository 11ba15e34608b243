"""Records and draws what a run did."""

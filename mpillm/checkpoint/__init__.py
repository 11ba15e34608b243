"""What a run saves and goes on from: knows shards of tensors, not training."""

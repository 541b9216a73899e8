"""What models are computed from: layers, rope, batches, caches, and the forward pass of any architecture."""

"""The parts that models are made of: layers, rope, batches, caches, and the forward pass of any architecture."""

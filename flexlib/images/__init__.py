"""Pixels: contrast transfer, stacks, batches, the prepared set."""

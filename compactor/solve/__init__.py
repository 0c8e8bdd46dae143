"""Knows tensors only: which keys to keep, how many per head, their biases and their values."""

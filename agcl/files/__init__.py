"""Tensor files and training checkpoints."""

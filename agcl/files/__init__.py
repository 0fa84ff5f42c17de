"""Tensor files and training checkpoints on disk."""

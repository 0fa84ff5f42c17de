"""Hugging Face models: loading, forward passes and adapters."""

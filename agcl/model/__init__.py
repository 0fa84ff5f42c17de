"""Hugging Face models: loading, forward passes and adapters."""

import warnings

# PEFT still reads this attribute by its old name, which users can do nothing about.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)

"""Loading, forwarding and adapting Hugging Face models."""

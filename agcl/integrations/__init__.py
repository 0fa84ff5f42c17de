"""agcl inside other trainers."""

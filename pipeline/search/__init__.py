"""Many configs as trials that share stages."""

"""Collectives and sharding over workers."""

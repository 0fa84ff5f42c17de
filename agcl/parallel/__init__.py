"""Collectives and sharding over ranks."""

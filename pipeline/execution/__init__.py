"""Runs sessions of stages on Ray."""

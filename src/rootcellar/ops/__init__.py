"""Compute: array functions compiled by XLA, and the attention backends."""

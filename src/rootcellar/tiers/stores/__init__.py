"""Stores: a module for each kind, and :func:`open_store` for all."""

from rootcellar.tiers.stores.registry import open_store

__all__ = ["open_store"]

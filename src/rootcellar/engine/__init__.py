"""Wire: the engine, the only package that knows all four rooms."""

from rootcellar.engine.engine import Engine

__all__ = ["Engine"]

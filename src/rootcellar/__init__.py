"""rootcellar: an LLM inference engine in Python and JAX whose heart is its KV cache.

``rootcellar.Engine`` is the engine. ``rootcellar.cache`` is its KV cache, usable by itself with nothing but numpy: for
its sake, importing this package imports no JAX, and the engine is loaded when its name is first used.
"""

from typing import TYPE_CHECKING, Any

from rootcellar.errors import (
    CacheBroken,
    ConfigError,
    EngineError,
    ModelError,
    RequestError,
    RequestTooLarge,
    RootcellarError,
)

if TYPE_CHECKING:
    from rootcellar.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "CacheBroken",
    "ConfigError",
    "Engine",
    "EngineError",
    "ModelError",
    "RequestError",
    "RequestTooLarge",
    "RootcellarError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from rootcellar.engine import Engine

        globals()[name] = Engine
        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

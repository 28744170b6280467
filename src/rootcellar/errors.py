"""Everything rootcellar raises on purpose.

    RootcellarError
    ├── ConfigError            a setting is wrong; the message names it and what would be right
    ├── ModelError             a model folder, config or tensor is missing or not understood
    ├── RequestError           one request is wrong; the engine goes on
    │   └── RequestTooLarge    it can never fit; the message names the setting to change
    ├── EngineError            the engine cannot do this now (shut down, work pending, a failed step)
    │   ├── GenerationFailed   answers ended without being the model's own; carries the results
    │   ├── QueueFull          too many requests wait; try again later
    │   └── CacheBusy          the cache cannot do this while leases or copies are live
    └── CacheBroken            an invariant of the cache does not hold; carries the evidence

``RequestError`` and ``ConfigError`` are also ``ValueError``: callers who know nothing of us still catch them.
"""

from typing import Any


class RootcellarError(Exception):
    """The root of all errors raised on purpose."""


class ConfigError(RootcellarError, ValueError):
    """A setting is wrong. The message says which, what was given and what would be right."""


class ModelError(RootcellarError):
    """A model's folder, config, tokenizer or tensors are missing or not understood."""


class RequestError(RootcellarError, ValueError):
    """A request is wrong. Nothing was scheduled and the engine goes on."""


class RequestTooLarge(RequestError):
    """A request can never fit. The message names the setting that would let it."""


class EngineError(RootcellarError, RuntimeError):
    """The engine cannot do this now."""


class GenerationFailed(EngineError):
    """Answers ended early for a reason that their caller did not give: a failed step, no memory, a grammar, a shutdown.

    ``results``: what there was of every answer of the call, failed or not, as ``generate`` would have returned it.
    """

    def __init__(self, message: str, results: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.results = results


class QueueFull(EngineError):
    """As many requests wait as ``max_queued_requests`` allows. Nothing was started; try again later."""


class CacheBusy(EngineError):
    """The cache cannot do this while leases or copies are live. The message says how many."""


class CacheBroken(RootcellarError, AssertionError):
    """An invariant of the cache does not hold; the message is the evidence."""

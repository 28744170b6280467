"""Prompts in the cache, for people: why one hits as far as it does, and keeping one for a time.

The cache counts time in ticks; here a pin has seconds. Everything runs on the engine's thread between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rootcellar.cache import Key
from rootcellar.engine.loop import Loop
from rootcellar.errors import RequestError, RequestTooLarge

# More ticks than any server lives: the clock here decides.
_FOREVER = 2**40
# What pins may hold of the cache: requests must still find room.
_MOST = 0.5


@dataclass
class _Pin:
    key: Key
    ends: float
    tokens: int


class Prefixes:
    """Explain and pin prompts of one engine; give token ids."""

    def __init__(self, loop: Loop, total_tokens: int) -> None:
        """``total_tokens``: what the KV cache holds."""
        self._loop = loop
        self._cache = loop.scheduler.cache
        self._limit = int(total_tokens * _MOST)
        self._pins: dict[Key, _Pin] = {}

    def explain(self, input_ids: Sequence[int], extra_key: str = "") -> dict[str, Any]:
        """Why a request for these tokens would hit as far as it would. Changes nothing, not even recency.

        Returns:
            ``{"text", "prompt_tokens", "cached_tokens", "reasons", ...}``: the fields of
            ``rootcellar.cache.Explanation``; the last token of a prompt is computed in any case and does not count.
        """

        def read() -> dict[str, Any]:
            key = self._key(input_ids, extra_key)
            found = self._cache.explain(key[: len(key) - 1])
            fields = asdict(found)
            reaches = {tier.name.lower(): tokens for tier, tokens in found.reaches.items()}
            return {
                **fields,
                "reaches": reaches,
                "text": str(found),
                "prompt_tokens": len(key),
                "cached_tokens": reaches["device"],
            }

        return self._loop.call(read)

    def pin(self, input_ids: Sequence[int], seconds: float, extra_key: str = "") -> dict[str, Any]:
        """Keep what is cached of these tokens for so many seconds. Pinning it again counts from then.

        A pin ends early when its prefix can never be a hit again: new weights, a flush, a release of the memory.

        Returns:
            ``{"pinned_tokens", "prompt_tokens", "seconds", "pins"}``; whole pages are pinned, so a few tokens less than
            there are, and 0 when nothing is cached.

        Raises:
            RequestTooLarge: pins would hold more than half of the cache.
        """

        def keep() -> dict[str, Any]:
            key = self._key(input_ids, extra_key)
            before = self._pins.get(key)
            self._pins[key] = _Pin(key, time.perf_counter() + seconds, 0)
            self._renew()
            pin = self._pins.get(key)
            total = sum(each.tokens for each in self._pins.values())
            if total > self._limit:
                self._restore(key, before)
                raise RequestTooLarge(
                    f"pins would hold {total} tokens, and may hold {self._limit}, half of the KV cache: unpin others "
                    "or raise max_total_tokens"
                )
            if pin is not None:
                self._loop.at(pin.ends, self._expire)
            tokens = pin.tokens if pin is not None else 0
            return {"pinned_tokens": tokens, "prompt_tokens": len(key), "seconds": seconds, "pins": len(self._pins)}

        return self._loop.call(keep)

    def unpin(self, input_ids: Sequence[int], extra_key: str = "") -> bool:
        """Undo :meth:`pin` of exactly these tokens; False when there was none."""

        def undo() -> bool:
            key = self._key(input_ids, extra_key)
            found = key in self._pins
            self._restore(key, None)
            return found

        return self._loop.call(undo)

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def _key(self, input_ids: Sequence[int], extra_key: str) -> Key:
        if not len(input_ids):
            raise RequestError("the prompt is empty: give at least one token")
        return self._loop.scheduler.key(input_ids, extra_key)

    def _restore(self, key: Key, pin: _Pin | None) -> None:
        """Put ``pin`` in the place of ``key``'s, and let go of what nobody pins any more."""
        present = self._pins.get(key)
        if present is not None:
            self._cache.unpin(key)
            del self._pins[key]
        if pin is not None:
            self._pins[key] = pin
        self._renew()

    def _renew(self) -> None:
        """Pin all anew: the cache's ``unpin`` undoes a prefix's pins with it. Nothing can leave in between."""
        for pin in self._pins.values():
            self._cache.unpin(pin.key)
        for pin in self._pins.values():
            pin.tokens = self._cache.pin(pin.key, _FOREVER)
        self._pins = {key: pin for key, pin in self._pins.items() if pin.tokens}

    def _expire(self) -> None:
        now = time.perf_counter()
        over = [key for key, pin in self._pins.items() if pin.ends <= now]
        for key in over:
            self._restore(key, None)

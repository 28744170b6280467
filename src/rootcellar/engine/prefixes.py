"""Prompts in the cache, for people: why one hits as far as it does, and keeping one for a time.

The cache counts time in ticks; here a pin has seconds. Everything runs on the engine's thread between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rootcellar.cache import Key, digests
from rootcellar.engine.build import Parts
from rootcellar.engine.identity import read_namespace, tenant_in
from rootcellar.engine.loop import Loop
from rootcellar.errors import RequestError, RequestTooLarge

# More ticks than any server lives: the clock here decides.
_FOREVER = 2**40
# What pins may hold of the cache: requests must still find room.
_MOST = 0.5


@dataclass
class _Pin:
    tenant: str
    key: Key
    ends: float
    tokens: int


class Prefixes:
    """Explain and pin prompts of one engine; give token ids."""

    def __init__(self, loop: Loop, parts: Parts) -> None:
        """Those that ``loop`` computes over ``parts``."""
        self._loop = loop
        self._cache = loop.scheduler.cache
        self._config = parts.config
        self._fingerprint = parts.fingerprint
        self._limit = int(parts.total_tokens * _MOST)
        self._pins: dict[tuple[str, Key], _Pin] = {}

    def explain(
        self,
        input_ids: Sequence[int],
        extra_key: str = "",
        *,
        cache_salt: str = "",
        tenant: str = "",
        others: bool = True,
    ) -> dict[str, Any]:
        """Why a request for these tokens would hit as far as it would. Changes nothing, not even recency.

        ``others``: another tenant's namespace may be named as one that has more of them.

        Returns:
            ``{"text", "prompt_tokens", "cached_tokens", "reasons", ...}``: the fields of
            ``rootcellar.cache.Explanation``; the last token of a prompt is computed in any case and does not count.
        """

        where = self._read(input_ids, tenant, cache_salt, extra_key)

        def read() -> dict[str, Any]:
            key = self._loop.scheduler.key(input_ids, where)
            found = self._cache.explain(key[: len(key) - 1], lambda name: others or tenant_in(name) == tenant)
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

    def pin(
        self,
        input_ids: Sequence[int],
        seconds: float,
        extra_key: str = "",
        *,
        cache_salt: str = "",
        tenant: str = "",
        share: float = 1.0,
    ) -> dict[str, Any]:
        """Keep what is cached of these tokens for so many seconds. Pinning it again counts from then.

        ``share``: the tenant's pins may hold this part of what pins may hold.
        A pin ends early when its prefix can never be a hit again: new weights, a flush, a release of the memory.

        Returns:
            ``{"pinned_tokens", "prompt_tokens", "seconds", "pins"}``; whole pages are pinned, so a few tokens less than
            there are, and 0 when nothing is cached.

        Raises:
            RequestTooLarge: pins would hold more than half of the cache, or the tenant's more than its share of that.
        """
        where = self._read(input_ids, tenant, cache_salt, extra_key)

        def keep() -> dict[str, Any]:
            name = tenant, self._loop.scheduler.key(input_ids, where)
            before = self._pins.get(name)
            self._pins[name] = _Pin(*name, time.perf_counter() + seconds, 0)
            self._renew()
            pin = self._pins.get(name)
            own = [each for each in self._pins.values() if each.tenant == tenant]
            total, mine = (sum(each.tokens for each in pins) for pins in (self._pins.values(), own))
            limit = int(self._limit * share)
            if total > self._limit or mine > limit:
                self._restore(name, before)
                held, may = (mine, limit) if mine > limit else (total, self._limit)
                raise RequestTooLarge(
                    f"pins would hold {held} tokens, and may hold {may} (all of them half of the KV cache): unpin "
                    "others or raise max_total_tokens"
                )
            if pin is not None:
                self._loop.at(pin.ends, self._expire)
            tokens = pin.tokens if pin is not None else 0
            return {"pinned_tokens": tokens, "prompt_tokens": len(input_ids), "seconds": seconds, "pins": len(own)}

        return self._loop.call(keep)

    def unpin(self, input_ids: Sequence[int], extra_key: str = "", *, cache_salt: str = "", tenant: str = "") -> bool:
        """Undo the tenant's :meth:`pin` of exactly these tokens; False when there was none."""
        where = self._read(input_ids, tenant, cache_salt, extra_key)

        def undo() -> bool:
            name = tenant, self._loop.scheduler.key(input_ids, where)
            found = name in self._pins
            self._restore(name, None)
            return found

        return self._loop.call(undo)

    def names(
        self, input_ids: Sequence[int], extra_key: str = "", *, cache_salt: str = "", tenant: str = ""
    ) -> list[str]:
        """What the whole pages of these tokens are called, to stores, peers and readers of KV events, in hex digits.

        Two engines give a page one name exactly when its bytes are the same: see ``engine/identity.py``.
        """
        where = self._read(input_ids, tenant, cache_salt, extra_key)
        key = self._loop.call(lambda: self._loop.scheduler.key(input_ids, where))
        return [digest.hex() for digest in digests(key, self._config.page_size, self._fingerprint)]

    def _read(self, input_ids: Sequence[int], tenant: str, cache_salt: str, extra_key: str) -> str:
        """The namespace that is meant, checked as for a request."""
        ids = input_ids if isinstance(input_ids, Sequence | np.ndarray) else ()
        if not len(ids) or isinstance(ids, str) or np.asarray(ids).dtype.kind not in "iu":
            raise RequestError("input_ids must be a list of at least one token id")
        return read_namespace(self._config, tenant, cache_salt, extra_key)

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def _restore(self, name: tuple[str, Key], pin: _Pin | None) -> None:
        """Put ``pin`` in the place of ``name``'s, and let go of what nobody pins any more."""
        if name in self._pins:
            self._cache.unpin(name[1])
            del self._pins[name]
        if pin is not None:
            self._pins[name] = pin
        self._renew()

    def _renew(self) -> None:
        """Pin all anew: the cache's ``unpin`` undoes a prefix's pins with it. Nothing can leave in between."""
        for pin in self._pins.values():
            self._cache.unpin(pin.key)
        for pin in self._pins.values():
            pin.tokens = self._cache.pin(pin.key, _FOREVER)
        self._pins = {name: pin for name, pin in self._pins.items() if pin.tokens}

    def _expire(self) -> None:
        now = time.perf_counter()
        over = [name for name, pin in self._pins.items() if pin.ends <= now]
        for name in over:
            self._restore(name, None)

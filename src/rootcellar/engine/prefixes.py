"""Prompts in the cache, for people: why one hits as far as it does, and keeping one for a time.

Everything is read and changed on the engine's thread, between two steps; ``pins.py`` is what is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rootcellar.cache import Tier, digests
from rootcellar.engine.build import Parts
from rootcellar.engine.commands import Hint, Pin, Unpin
from rootcellar.engine.hints import check_hints
from rootcellar.engine.identity import read_namespace, tenant_in
from rootcellar.engine.loop import Loop
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.misses import told, told_habit


class Prefixes:
    """Explain and pin prompts of one engine; give token ids."""

    def __init__(self, loop: Loop, parts: Parts) -> None:
        """Those that ``loop`` computes over ``parts``."""
        self._loop = loop
        self._scheduler = loop.machine.scheduler
        self._config = parts.config
        self._fingerprint = parts.fingerprint
        self._tokenizer = parts.tokenizer
        self._explainer = loop.machine.recorder.explainer

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
            ``rootcellar.cache.Explanation``; ``load_decisions`` say of each farther tier that has more whether that
            would be loaded or computed, with the figures (what only a store knows is not asked for). The last token of
            a prompt is computed in any case and does not count.
        """

        where = self._read(input_ids, tenant, cache_salt, extra_key)

        def read() -> dict[str, Any]:
            key = self._scheduler.key(input_ids, where)
            found = self._scheduler.cache.explain(key[: len(key) - 1], lambda name: others or tenant_in(name) == tenant)
            fields = asdict(found)
            reaches = {tier.name.lower(): tokens for tier, tokens in found.reaches.items()}
            weighed = [
                self._scheduler.loads.weigh(tier, found.reaches[nearer], found.reaches[tier]).fields()
                for nearer, tier in ((Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.STORAGE))
                if found.reaches[tier] > found.reaches[nearer]
            ]
            return {
                **fields,
                "load_decisions": weighed,
                "reaches": reaches,
                "text": str(found),
                "prompt_tokens": len(key),
                "cached_tokens": reaches["device"],
            }

        return self._loop.call(read)

    def explained(self, name: str, tenant: str | None = None) -> dict[str, Any] | None:
        """Why the newest request that goes by ``name`` computed what it did; None: it is not known, or not any more.

        It is known from its first token on, as long as it is among the newest ``RECENT``. ``tenant``: only its own.

        Returns:
            ``{"rid", "cause", "position", "prompt_tokens", "cached_tokens", "price_tokens", "price_seconds", "before",
            "got", "instead", "than", "detail", "remedy", "text"}``: the cause is one of ``rootcellar.misses.Cause``;
            the prompt left the cache at token ``position``, ``before`` and ``got`` are the text around it, ``instead``
            that of the earlier request ``than``; the price is what would have come from the cache else.
        """
        found = self._explainer.find(name, tenant)
        return None if found is None else told(found, self._text_of)

    def report(self, tenant: str | None = None, most: int = 10) -> dict[str, Any]:
        """What the prompts of the last hour computed again: the costliest causes, each with an example.

        ``seconds`` is less than an hour's where so many came that not all are remembered.

        Returns:
            ``{"seconds", "requests", "price_tokens", "causes": [{"cause", "requests", "price_tokens", "price_seconds",
            "remedy", "example"}, ...]}``; an example is as :meth:`explained` gives it.
        """
        seconds, requests, tokens, habits = self._explainer.report(tenant, self._loop.machine.clock.now(), most)
        causes = [told_habit(habit, self._text_of) for habit in habits]
        return {"seconds": seconds, "requests": requests, "price_tokens": tokens, "causes": causes}

    def _text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids; the ids themselves where there is no tokenizer."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return self._tokenizer.decode(ids, skip_special_tokens=False)

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
        ends = self._loop.machine.clock.now() + seconds
        tokens, pins = self._loop.run(Pin(_ids(input_ids), where, tenant, ends, share))
        return {"pinned_tokens": tokens, "prompt_tokens": len(input_ids), "seconds": seconds, "pins": pins}

    def keep(
        self,
        input_ids: Sequence[int],
        seconds: float,
        extra_key: str = "",
        *,
        cache_salt: str = "",
        tenant: str = "",
        share: float = 1.0,
    ) -> int:
        """:meth:`pin` of a conversation that grows: what it begins with, and was kept no longer, is let go.

        Keeping the same again ends no sooner than was promised. Returns the tokens that are kept, 0 where there is no
        room for them: then what was kept stays.
        """
        where = self._read(input_ids, tenant, cache_salt, extra_key)
        ends = self._loop.machine.clock.now() + seconds
        try:
            tokens, _ = self._loop.run(Pin(_ids(input_ids), where, tenant, ends, share, "kept"))
        except RequestTooLarge:
            return 0
        return tokens

    def hint(
        self,
        input_ids: Sequence[int],
        hints: Mapping[str, Any],
        extra_key: str = "",
        *,
        cache_salt: str = "",
        tenant: str = "",
        share: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Say what will become of a prompt, and hear of each hint whether it is granted, clipped, deferred or refused.

        Args:
            input_ids: the prompt's tokens, as far as is known of it.
            hints: ``pin`` (seconds: keep it so long), ``retain`` (seconds: the same, but it gives way to requests that
                find no room, what is wanted last first, and to the tenant's pins; it is refused where others ask for
                the room much sooner), ``next_turn`` (seconds until its next turn: retained until that came, or till a
                little later, or brought from the store before), ``demote`` (true: keep it no longer, copy it to farther
                tiers, and let it leave the device first), ``prefetch`` (true: let come to host memory what the store
                has of it). 0 seconds undo.
            extra_key, cache_salt, tenant: as for ``Engine.generate``.
            share: the tenant's pins may hold this part of what pins may hold.

        Returns:
            ``[{"hint", "answer", "why", "tokens", "seconds"}, ...]``.

        Raises:
            RequestError: a hint is unknown, or its value wrong.
        """
        where = self._read(input_ids, tenant, cache_salt, extra_key)
        machine, checked = self._loop.machine, check_hints(hints)
        longest = machine.recorder.demand.longest
        replies = self._loop.run(Hint(_ids(input_ids), where, tenant, checked, share, machine.clock.now(), longest))
        return [reply.fields() for reply in replies]

    def unpin(self, input_ids: Sequence[int], extra_key: str = "", *, cache_salt: str = "", tenant: str = "") -> bool:
        """Undo the tenant's :meth:`pin` of exactly these tokens; False when there was none."""
        where = self._read(input_ids, tenant, cache_salt, extra_key)
        return self._loop.run(Unpin(_ids(input_ids), where, tenant))

    def names(
        self, input_ids: Sequence[int], extra_key: str = "", *, cache_salt: str = "", tenant: str = ""
    ) -> list[str]:
        """What the whole pages of these tokens are called, to stores, peers and readers of KV events, in hex digits.

        Two engines give a page one name exactly when its bytes are the same: see ``engine/identity.py``.
        """
        where = self._read(input_ids, tenant, cache_salt, extra_key)
        key = self._loop.call(lambda: self._scheduler.key(input_ids, where))
        return [digest.hex() for digest in digests(key, self._config.page_size, self._fingerprint)]

    def _read(self, input_ids: Sequence[int], tenant: str, cache_salt: str, extra_key: str) -> str:
        """The namespace that is meant, checked as for a request."""
        ids = input_ids if isinstance(input_ids, Sequence | np.ndarray) else ()
        if not len(ids) or isinstance(ids, str) or np.asarray(ids).dtype.kind not in "iu":
            raise RequestError("input_ids must be a list of at least one token id")
        return read_namespace(self._config, tenant, cache_salt, extra_key)


def _ids(input_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, input_ids))

"""The causes there are, what was noted of a request when it began, and what is concluded from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rootcellar.cache import Eviction, Key
from rootcellar.misses.price import UNKNOWN, PrefillCost, Spent


class Cause(StrEnum):
    """Why tokens of a prompt were computed: a closed list."""

    NOTHING = "nothing"
    FIRST_SEEN = "first_seen"
    EVICTED = "evicted"
    FORGOTTEN = "forgotten"
    OTHER_NAMESPACE = "other_namespace"
    PROMPT_CHANGED = "prompt_changed"
    CHANGING_VALUE = "changing_value"
    REORDERED = "reordered"
    PAGE_ROUNDING = "page_rounding"
    IMAGE_DIFFERS = "image_differs"
    STATE_GONE = "state_gone"
    LOADING_SLOWER = "loading_slower"
    STORE_LOST = "store_lost"
    LOGPROBS = "logprobs"


REMEDIES = {
    Cause.NOTHING: "Nothing: all whole pages of the prompt came from the cache.",
    Cause.FIRST_SEEN: "Nothing: this was not asked before, as far as is remembered.",
    Cause.EVICTED: "Pin the prefix (/cache/pin), or give the cache more room (max_total_tokens, mem_fraction_static, "
    "enable_hierarchical_cache).",
    Cause.FORGOTTEN: "Release memory with preserve, and do not flush: what was cached was thrown away.",
    Cause.OTHER_NAMESPACE: "Send the same cache_salt and extra_key for what may be shared; new weights share nothing.",
    Cause.PROMPT_CHANGED: "Put what changes behind what stays: all after the first changed token is computed anew.",
    Cause.CHANGING_VALUE: "Move the value that changes (a date, an id, a header) to the prompt's end, or leave it out.",
    Cause.REORDERED: "Send the parts (tools, documents) in one order each time, for example sorted by name.",
    Cause.PAGE_ROUNDING: "Only whole pages are shared: a smaller page_size shares more of a short prefix.",
    Cause.IMAGE_DIFFERS: "Put images behind the text that stays, and send the same bytes for the same image.",
    Cause.STATE_GONE: "Give the kind that lacks it more room, or leave states more often (mamba_track_interval).",
    Cause.LOADING_SLOWER: "A faster tier, or hicache_storage_prefetch_policy=wait_complete, if the estimate is wrong.",
    Cause.STORE_LOST: "Look at the store: it had the pages and did not give them back in time, or whole.",
    Cause.LOGPROBS: "Ask for the prompt's logprobs only where they are needed: a larger logprob_start_len.",
}
"""What would help, by cause."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was noted of one request when its prompt began to be computed.

    Attributes:
        rid, tenant: its name, and on whose behalf.
        at: when, in seconds of whoever notes it.
        key: its prompt, which never changes again, and the namespace with the weights in front of a slash.
        cached: tokens that were taken from the cache.
        wanted: tokens that might have been: all but the last, or those before the first whose logprob is wanted.
        page_size: tokens in a page.
        reaches: what each tier could give (nearer ones included), in tokens, from the device on.
        branch: the longest prefix that the tree knew, in whole pages; where that is beyond the reaches, a window's
            entries or a state were gone.
        evicted: what is remembered of the entry that the tree lacked at ``branch``; ``evicted_at``: when that was.
        evicted_for: for which request, in words; empty where that is not known.
        slower: tokens up to which a farther tier would have given more, that were computed because that is sooner.
        lost: tokens up to which a farther tier had promised more and failed.
        flushes: how often all was forgotten before.
        cost: what tokens take to be computed, as far as is known.
        spent: what those of its own took.
        opened: the cache's tick when it began: what was computed by others in the same step, or later, was not there.
    """

    rid: str
    tenant: str
    at: float
    key: Key
    cached: int
    wanted: int
    page_size: int
    reaches: tuple[int, ...]
    branch: int
    evicted: Eviction | None = None
    evicted_at: float | None = None
    evicted_for: str = ""
    slower: int = 0
    lost: int = 0
    flushes: int = 0
    cost: PrefillCost = UNKNOWN
    spent: tuple[Spent, ...] = ()
    opened: int = 0


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a request computed tokens that had been computed before.

    Attributes:
        cause: see ``Cause``.
        position: the token at which the prompt left what could be taken from the cache.
        tokens: the price: so many more would have come from the cache, had it not been for the cause.
        seconds: what computing them took, estimated where it was not measured; None where nothing is known.
        head: the first tokens of the prompt; empty where it parts soon.
        before, got, instead: token ids in front of the position, from it on, and those that an earlier prompt has there
            (empty: none has others).
        than: the earlier request that is compared with; empty: none.
        detail: what else is known, in words.
    """

    rid: str
    tenant: str
    at: float
    prompt_tokens: int
    cached_tokens: int
    cause: Cause
    position: int
    tokens: int
    seconds: float | None
    head: tuple[int, ...] = ()
    before: Sequence[int] = ()
    got: Sequence[int] = ()
    instead: Sequence[int] = ()
    than: str = ""
    detail: str = ""

    @property
    def remedy(self) -> str:
        """What would help."""
        return REMEDIES[self.cause]

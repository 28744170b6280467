"""What both cores say of the same things: errors and the looks of hits and leases, worded in one place."""

from __future__ import annotations

from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.errors import CacheBroken, CacheBusy, ConfigError, RequestError, RequestTooLarge


def lease(row: int, cached: int, length: int, lost: bool, waits: int) -> str:
    """A lease; ``waits`` copies are under way for it."""
    state = "lost" if lost else "ready" if not waits else f"waits for {waits} copies"
    return f"Lease(row={row}, cached={cached}, length={length}, {state})"


def hit(key: Key, reaches: tuple[int, int, int, int], branch: int) -> str:
    """A hit; ``reaches`` by tier, in tokens like ``branch``."""
    return f"Hit({key!r}, reaches={reaches}, branch={branch})"


def key_too_long(tokens: int, max_length: int) -> RequestTooLarge:
    """A key that no row holds."""
    return RequestTooLarge(
        f"the key has {tokens} tokens, a page table row holds max_length={max_length}; raise max_length"
    )


def gives_too_much(tokens: int, length: int, committed: int) -> RequestError:
    """A lease asked to give back slots that are others' too."""
    return RequestError(
        f"{tokens} tokens cannot be given back of {length}, of which {committed} are committed and others' too; close "
        "the lease to give it all back"
    )


def row_full(length: int, tokens: int, max_length: int) -> RequestTooLarge:
    """A row without room for ``tokens`` more."""
    return RequestTooLarge(
        f"{length} + {tokens} tokens do not fit a page table row of max_length={max_length}; raise max_length"
    )


def commit_too_long(tokens: int, namespace: str, length: int, of: str) -> RequestError:
    """A key to commit that is longer than its lease, or of another namespace (``of`` is the lease's)."""
    return RequestError(
        f"commit of {tokens} tokens in namespace {namespace!r}: the lease has slots for {length} "
        f"tokens in {of!r}; grow the lease first and commit only what was computed"
    )


def closed(of: str) -> RequestError:
    """A lease (in words) that is not open in this cache."""
    return RequestError(f"{of} is closed already; a lease serves until it is closed, and is closed once")


def busy(what: str, leases: int, copies: int) -> CacheBusy:
    """``what`` cannot be done while leases live or copies are under way."""
    return CacheBusy(
        f"{what} with {leases} live leases and {copies} copies under way; close the leases (finish or abort) and "
        "report the copies first"
    )


def nothing_filed(arena: str, evictable: int) -> CacheBroken:
    """An arena whose order of leaving lacks what its counts promise."""
    return CacheBroken(f"{arena}: {evictable} pages are counted evictable, none is filed")


def uneven(what: str) -> ValueError:
    """A batch whose lists differ in length."""
    return ValueError(f"give as many {what} as leases")


def not_written(tier: int) -> ConfigError:
    """A tier that nothing is ever written to, which was to be opened or closed to that."""
    return ConfigError(f"nothing is written to {Tier(tier).name}: name HOST or STORAGE, and give it room in capacity")


def no_paged_kind(kind: str) -> KeyError:
    """A kind that is not there, or has states and no pages."""
    return KeyError(f"{kind}: no paged kind has this name")


def no_shelf(kind: str) -> KeyError:
    """A kind that is not there, or not on the tier that was asked about."""
    return KeyError(f"{kind}: no such kind on this tier")

"""From what was noted of a request, and the prompts before it, to the cause of what it computed again."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from rootcellar.misses.aligning import WINDOW, Stretch, in_order, runs
from rootcellar.misses.causes import Cause, Facts, Miss
from rootcellar.misses.past import Earlier, Past

# Token ids shown on either side of the place where a prompt left the cache.
SHOWN = 24
_HEAD = 4
# Where a prompt parts before, what it begins with may be a part of what changes.
_HEADLESS = 16
# More tokens in the place of others are no value that changes: somebody wrote something else.
_VALUE = 32
# Of what follows, so much must be alike, or nobody changed a prompt: it is another one.
_MOSTLY = 0.5
# Earlier prompts that are compared to the end: those that begin most alike, and the newest.
_COMPARED = 4
_PLACEHOLDER = 1 << 62  # ids from here on stand for what is no text


@dataclass(frozen=True, slots=True)
class _Found:
    """A cause; ``reach``: tokens that the cache would have given without it, ``alike``: those that show it."""

    cause: Cause
    position: int
    reach: int
    than: Earlier | None = None
    detail: str = ""
    alike: int = 0


def judge(facts: Facts, past: Past) -> Miss:
    """Why the request computed what it did; ``past`` has the prompts before it. O(tokens of those that are alike)."""
    tokens = facts.key.tokens
    alike = [(n, prompt) for n, prompt in past.closest(facts.tenant, tokens) if prompt.tick < facts.opened]
    own = [(n, prompt) for n, prompt in alike if prompt.namespace == facts.key.namespace]
    seen, nearest = max(own, key=lambda each: each[0], default=(0, None))
    found = _not_taken(facts, own)
    if found is None or found.cause is Cause.STATE_GONE:
        # Without a state where prompts part there is nothing to take before the change either: the change cost all.
        found = max((each for each in (found, _never_had(facts, alike, own, seen)) if each), key=_alike, default=None)
    found = found or _rest(facts, seen, nearest)
    price = max(0, found.reach - facts.cached)
    at, than = found.position, found.than
    return Miss(
        rid=facts.rid,
        tenant=facts.tenant,
        at=facts.at,
        prompt_tokens=len(tokens),
        cached_tokens=facts.cached,
        cause=found.cause,
        position=at,
        tokens=price,
        seconds=facts.cost.price(facts.cached, facts.cached + price, facts.spent),
        head=tuple(tokens[:_HEAD].tolist()) if at >= _HEADLESS else (),
        before=_ids(tokens[max(0, at - SHOWN) : at]),
        got=_ids(tokens[at : at + SHOWN]),
        instead=() if than is None else _ids(than.tokens[at : at + SHOWN]),
        than="" if than is None else than.rid,
        detail=found.detail,
    )


def _ids(tokens: NDArray[np.int64]) -> Sequence[int]:
    return array("q", tokens.tobytes())  # many misses are kept: numbers of Python's would take four times as much


def _alike(found: _Found) -> int:
    return found.alike or found.reach


def _whole(facts: Facts, tokens: int) -> int:
    return tokens - tokens % facts.page_size


def _not_taken(facts: Facts, own: Sequence[tuple[int, Earlier]]) -> _Found | None:
    """What the cache knew, or should have known, of this very prompt, and did not give."""
    cached, farthest = facts.cached, max(facts.reaches, default=0)
    if facts.lost > cached:
        return _Found(Cause.STORE_LOST, cached, facts.lost, detail="a copy to the device failed")
    if max(facts.slower, farthest) > cached:
        why = "computing was estimated to be sooner" if facts.slower > cached else "it did not come in time"
        return _Found(Cause.LOADING_SLOWER, cached, max(facts.slower, farthest), detail=why)
    if facts.branch > max(farthest, cached):
        return _Found(Cause.STATE_GONE, cached, facts.branch, detail="a window's entries, or a state, were gone")
    since = max((n for n, prompt in own if prompt.flushes == facts.flushes), default=0)
    if (known := _whole(facts, min(max(since, facts.branch), facts.wanted))) > cached:
        return _Found(Cause.EVICTED, cached, known, detail=_eviction(facts))
    before, prompt = max(own, key=lambda each: each[0], default=(0, None))
    if (known := _whole(facts, min(before, facts.wanted))) > cached and prompt is not None:
        return _Found(Cause.FORGOTTEN, cached, known, detail=f"it was cached for {prompt.rid}, before a flush")
    return None


def _eviction(facts: Facts) -> str:
    gone = facts.evicted
    if gone is None:
        return "when is not remembered"
    ago = "" if facts.evicted_at is None else f" {max(0.0, facts.at - facts.evicted_at):.1f} s before"
    by = f" for {facts.evicted_for}" if facts.evicted_for else ""
    return f"{gone.tokens} tokens of {gone.kind} left {gone.tier.name}{ago}{by}"


def _never_had(
    facts: Facts,
    alike: Sequence[tuple[int, Earlier]],
    own: Sequence[tuple[int, Earlier]],
    seen: int,
) -> _Found | None:
    """What the cache had of a prompt that is this one but for its namespace, or for some of its tokens."""
    others = [(n, prompt) for n, prompt in alike if prompt.namespace != facts.key.namespace]
    best, prompt = max(others, key=lambda each: each[0], default=(0, None))
    found: list[_Found] = []
    if prompt is not None and (reach := _whole(facts, min(best, facts.wanted))) > facts.cached:
        names = _differ(facts.key.namespace, prompt.namespace)
        detail = f"{prompt.rid} had another {names}"
        found.append(_Found(Cause.OTHER_NAMESPACE, facts.cached, reach, prompt, detail))
    if facts.wanted - seen >= WINDOW:
        likest = sorted(own, key=lambda each: -each[0])[:_COMPARED]
        compared = {id(prompt): (n, prompt) for n, prompt in [*likest, *own[:_COMPARED]]}
        changes = (_change(facts, n, prompt) for n, prompt in compared.values())
        # What begins alike for longer than all that another has alike is no change of that.
        found += [each for each in changes if each and each.reach > facts.cached and each.alike >= seen + WINDOW]
    return max(found, key=_alike, default=None)


def _differ(ours: str, theirs: str) -> str:
    """Which parts of two namespaces are not the same, in words."""
    (weights, _, fields), (other_weights, _, other_fields) = ours.rpartition("/"), theirs.rpartition("/")
    mine, other = (dict(parse_qsl(each, errors="surrogatepass")) for each in (fields, other_fields))
    names = [name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
    return " and ".join((["weights"] if weights != other_weights else []) + names)


def _is_image(facts: Facts, at: int, other: Earlier) -> bool:
    tokens = facts.key.tokens
    return at < min(len(tokens), len(other.tokens)) and min(tokens[at], other.tokens[at]) >= _PLACEHOLDER


def _change(facts: Facts, seen: int, other: Earlier) -> _Found | None:
    """What the prompt has in common with another behind the place where they part, and what became of the rest."""
    tokens = facts.key.tokens
    least = max(WINDOW, facts.page_size)
    found = runs(other.tokens, tokens, seen)
    if sum(run.length for run in found) < least:
        return None
    ordered = in_order(found)
    kept = sum(run.length for run in ordered)
    total = sum(run.length for run in found)
    mostly = _MOSTLY * (min(len(tokens), len(other.tokens)) - seen)
    if total - kept >= WINDOW and not _is_image(facts, seen, other):
        if total < mostly:
            return None
        reach = _whole(facts, min(seen + total, facts.wanted))
        detail = f"{total} tokens of {other.rid} in another order"
        return _Found(Cause.REORDERED, seen, reach, other, detail, seen + total)
    values, end = _values(ordered, seen)
    cause = Cause.CHANGING_VALUE
    if sum(run.length for run in values) < least:
        values, cause = ordered, Cause.PROMPT_CHANGED
        end = values[-1]
        if kept < mostly:
            return None
    if _is_image(facts, seen, other):
        cause, end = Cause.IMAGE_DIFFERS, ordered[-1]
    # With the earlier words in their place the prompt would be so long.
    length = len(tokens) + end.old - end.new
    reach = _whole(facts, min(end.old + end.length, length - 1))
    detail = f"{max(0, end.old + end.length - seen - kept)} tokens differ from {other.rid}"
    return _Found(cause, seen, reach, other, detail, seen + kept)


def _values(ordered: Sequence[Stretch], seen: int) -> tuple[list[Stretch], Stretch]:
    """The first runs that follow each other with no more than a value between, and the last of them."""
    kept: list[Stretch] = []
    old = new = seen
    for run in ordered:
        if max(run.old - old, run.new - new) > _VALUE:
            break
        kept.append(run)
        old, new = run.old + run.length, run.new + run.length
    return kept, kept[-1] if kept else ordered[-1]


def _rest(facts: Facts, seen: int, nearest: Earlier | None) -> _Found:
    """All that was known was taken, as far as whole pages go."""
    last = len(facts.key) - 1
    if facts.wanted < last and (reach := _whole(facts, min(seen, last))) > facts.cached >= _whole(facts, facts.wanted):
        return _Found(Cause.LOGPROBS, facts.cached, reach, detail=f"logprobs were asked for from token {facts.wanted}")
    if nearest is not None and _is_image(facts, seen, nearest):
        return _Found(Cause.IMAGE_DIFFERS, seen, facts.cached, nearest)
    known = min(seen, facts.wanted)
    if known > facts.cached and (seen >= WINDOW or facts.wanted - seen < facts.page_size):
        return _Found(Cause.PAGE_ROUNDING, facts.cached, known, nearest)
    if facts.cached >= _whole(facts, facts.wanted):
        return _Found(Cause.NOTHING, facts.cached, facts.cached)
    return _Found(Cause.FIRST_SEEN, max(known, facts.cached), facts.cached, nearest)

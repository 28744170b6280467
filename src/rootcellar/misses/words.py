"""Misses and habits as plain values with words, for whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rootcellar.misses.causes import Cause, Miss
from rootcellar.misses.report import Habit

TextOf = Callable[[Sequence[int]], str]
"""The text of token ids."""

_HAPPENED = {
    Cause.NOTHING: "nothing was computed that was cached",
    Cause.FIRST_SEEN: "what follows was not asked before, as far as is remembered",
    Cause.EVICTED: "what follows was evicted",
    Cause.FORGOTTEN: "what follows was thrown away by a flush",
    Cause.OTHER_NAMESPACE: "what follows is cached for another salt, key or version of the weights",
    Cause.PROMPT_CHANGED: "the text changed there",
    Cause.CHANGING_VALUE: "a value changed there",
    Cause.REORDERED: "what follows is known in another order",
    Cause.PAGE_ROUNDING: "what follows does not fill a page",
    Cause.IMAGE_DIFFERS: "the image there is another one",
    Cause.STATE_GONE: "a window's entries or a recurrent state that resuming further needs were gone",
    Cause.LOADING_SLOWER: "what follows was on a farther tier, and computing it was sooner",
    Cause.STORE_LOST: "a farther tier lost what follows",
    Cause.LOGPROBS: "logprobs of the tokens that follow were asked for",
}


def told(miss: Miss, text_of: TextOf | None) -> dict[str, Any]:
    """A miss; ``text_of`` None: token ids stay what they are."""
    shown = {"before": list(miss.before), "got": list(miss.got), "instead": list(miss.instead)}
    seconds = "" if miss.seconds is None else f", about {miss.seconds:.3g} s"
    price = f" That cost {miss.tokens} tokens{seconds}." if miss.tokens else ""
    sentence = (
        f"{miss.cached_tokens} of {miss.prompt_tokens} tokens came from the cache. "
        f"At token {miss.position} {_HAPPENED[miss.cause]}{f' ({miss.detail})' if miss.detail else ''}.{price}"
    )
    return {
        "rid": miss.rid,
        "cause": miss.cause.value,
        "position": miss.position,
        "prompt_tokens": miss.prompt_tokens,
        "cached_tokens": miss.cached_tokens,
        "price_tokens": miss.tokens,
        "price_seconds": miss.seconds,
        **{name: ids if text_of is None else text_of(ids) for name, ids in shown.items()},
        "than": miss.than,
        "detail": miss.detail,
        "remedy": miss.remedy,
        "text": sentence,
    }


def told_habit(habit: Habit, text_of: TextOf | None) -> dict[str, Any]:
    """A habit, with its example."""
    return {
        "cause": habit.cause.value,
        "requests": habit.requests,
        "price_tokens": habit.tokens,
        "price_seconds": habit.seconds,
        "remedy": habit.example.remedy,
        "example": told(habit.example, text_of),
    }

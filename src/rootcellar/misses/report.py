"""The costliest causes of many misses, each with an example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rootcellar.misses.causes import Cause, Miss

# Causes that happen in a prompt: of prompts that begin alike, and (for some) at the same place, it is the same habit.
_IN_PROMPT = {Cause.PROMPT_CHANGED, Cause.CHANGING_VALUE, Cause.REORDERED, Cause.IMAGE_DIFFERS}
_PLACED = {Cause.PROMPT_CHANGED, Cause.CHANGING_VALUE}
# A value that changes parts from the one before at one of its first tokens.
_NEAR = 32


@dataclass(frozen=True, slots=True)
class Habit:
    """One cause, at one place of prompts where it has one: what all its requests together paid, and the costliest."""

    cause: Cause
    requests: int
    tokens: int
    seconds: float | None
    example: Miss


def costliest(misses: Iterable[Miss], most: int = 10) -> list[Habit]:
    """The ``most`` habits that cost the most tokens, the costliest first; what cost nothing is left out."""
    groups: dict[tuple[Cause, tuple[int, ...]], list[Miss]] = {}
    for miss in misses:
        if miss.tokens:
            head = miss.head if miss.cause in _IN_PROMPT else ()
            groups.setdefault((miss.cause, head), []).append(miss)
    found: list[Habit] = []
    for (cause, _), group in groups.items():
        found += [_habit(cause, each) for each in (_places(group) if cause in _PLACED else [group])]
    return sorted(found, key=lambda habit: -habit.tokens)[:most]


def _places(misses: list[Miss]) -> list[list[Miss]]:
    """``misses`` by the places where they happened."""
    found: list[list[Miss]] = []
    for miss in sorted(misses, key=lambda miss: miss.position):
        if found and miss.position - found[-1][-1].position <= _NEAR:
            found[-1].append(miss)
        else:
            found.append([miss])
    return found


def _habit(cause: Cause, misses: list[Miss]) -> Habit:
    seconds = [miss.seconds for miss in misses if miss.seconds is not None]
    return Habit(
        cause,
        len(misses),
        sum(miss.tokens for miss in misses),
        sum(seconds) if seconds else None,
        max(misses, key=lambda miss: (miss.tokens, miss.at)),
    )

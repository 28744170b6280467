"""Stop strings in a text that grows, found in one pass whatever their number (Aho and Corasick, 1975).

The stop string that is completed first ends the answer; of several that end at the same character, the longest does. So
it does not matter how the text was cut into tokens.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass


class Automaton:
    """Which stop strings end at a character, and how much of one may have begun. Immutable.

    Its states are the beginnings of the stop strings: for each, what follows, the longest other state that ends it,
    the longest stop string that ends it (None: none), and the characters of it that may still become one.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]
        self._found: list[str | None] = [None]
        self.pending = [0]
        depths = [0]
        for stop in stops:
            state = 0
            for character in stop:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._shorter.append(0)
                    self._found.append(None)
                    self.pending.append(0)
                    depths.append(depths[state] + 1)
                state = self._next[state][character]
            self._found[state] = stop
        self.longest = max(depths)
        level = deque(self._next[0].values())
        while level:  # shorter states first
            state = level.popleft()
            shorter = self._shorter[state]
            self._found[state] = self._found[state] or self._found[shorter]
            self.pending[state] = depths[state] if self._next[state] else self.pending[shorter]
            for character, following in self._next[state].items():
                self._shorter[following] = self.step(shorter, character)
                level.append(following)

    def step(self, state: int, character: str) -> int:
        """The longest state that ends with ``character`` after ``state``; constant time, amortised over a text."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def found(self, state: int) -> str | None:
        """The longest stop string that ends here."""
        return self._found[state]


@functools.lru_cache(maxsize=16)
def automaton(stops: tuple[str, ...]) -> Automaton:
    """The automaton of these stop strings; the latest are kept."""
    return Automaton(stops)


@dataclass(frozen=True)
class Match:
    """A stop string, and the characters of the text that is shown: up to its beginning, and up to its end."""

    stop: str
    start: int
    end: int


class Search:
    """Where one answer is in its stop strings.

    Special tokens that the text leaves out are read too where a stop string speaks of them: they match, unseen.

    Attributes:
        spoken_of: the special tokens to read, by id.
        held: how many of the last characters shown may be the beginning of a stop string.
    """

    def __init__(self, stops: tuple[str, ...], skipped: Mapping[int, str]) -> None:
        """``skipped``: the special tokens that the text leaves out, by id."""
        self._automaton = automaton(stops)
        self._state = 0
        self._shown = 0
        self.spoken_of = {id: text for id, text in skipped.items() if any(text in stop for stop in stops)}
        self._latest: deque[bool] = deque(maxlen=self._automaton.longest)

    @property
    def held(self) -> int:
        """See above."""
        return self._shown_of(self._automaton.pending[self._state])

    def read(self, text: str, *, shown: bool = True, counts: bool = True) -> Match | None:
        """Go on with ``text``; the first stop string that it completes.

        ``shown``: it is part of the text that is shown. ``counts``: what it completes ends the answer.
        """
        step, found = self._automaton.step, self._automaton.found
        for character in text:
            self._state = step(self._state, character)
            self._shown += shown
            if self.spoken_of:
                self._latest.append(shown)
            stop = found(self._state)
            if stop is not None and counts:
                return Match(stop, self._shown - self._shown_of(len(stop)), self._shown)
        return None

    def _shown_of(self, last: int) -> int:
        """How many of the ``last`` characters read were shown."""
        if not self.spoken_of or not last:
            return last
        return sum(list(self._latest)[-last:])

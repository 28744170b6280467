"""From the text of one answer, as it comes, to what it says: thoughts, text for the user, calls of tools."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

from rootcellar.text.speech.incoming import Called, Incoming, Passed, Said, Steps, Thought, Utterance


class Parser:
    """Reads one answer. The events of all calls together are the same wherever the text was cut, but for where texts
    are cut themselves.
    """

    def __init__(
        self, read: Callable[[Incoming], Steps[None]], dropped: Iterable[str] = (), most_calls: int = 0
    ) -> None:
        """``dropped``: special tokens that are not shown. ``most_calls``: later ones are left out; 0: none is."""
        self._source = Incoming()
        self._steps = read(self._source)
        self._sieve = _Sieve(dropped)
        self._tidy = _Tidy(most_calls)

    def add(self, text: str) -> list[Utterance]:
        """What ``text``, which comes next, adds."""
        self._source.add(self._sieve.add(text))
        return self._read()

    def end(self) -> list[Utterance]:
        """What was held back, now that nothing comes."""
        self._source.add(self._sieve.end())
        self._source.ended = True
        return [*self._read(), *self._tidy.end()]

    def _read(self) -> list[Utterance]:
        next(self._steps, None)
        found, self._source.events = self._source.events, []
        return joined(event for each in found for event in self._tidy.add(each))


def joined(events: Iterable[Utterance]) -> list[Utterance]:
    """``events`` with neighbours of one kind in one, but for calls."""
    found: list[Utterance] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(last, Said | Thought | Passed) and isinstance(event, type(last)):
            found[-1] = type(last)(last.text + event.text)
        else:
            found.append(event)
    return found


class _Tidy:
    """Leaves out white space around calls and thoughts, where templates put their own: what was said is rendered to
    the same tokens in the next turn.
    """

    def __init__(self, most_calls: int) -> None:
        self._space = ""
        self._kind: type[Utterance] | None = None
        self._fresh = False
        self._calls = 0
        self._most = most_calls

    def add(self, event: Utterance) -> list[Utterance]:
        """``event`` as it is told."""
        if isinstance(event, Called):
            self._calls += 1
        if isinstance(event, Called | Passed):
            self._space, self._kind = "", Called
            return [event] if self._told() else []
        if self._kind is not type(event):
            # White space at the beginning of an answer is its own.
            self._fresh = self._kind is not None or isinstance(event, Thought)
            self._space, self._kind = "", type(event)
        text = event.text.lstrip() if self._fresh else self._space + event.text
        self._fresh = self._fresh and not text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return [type(event)(shown)] if shown else []

    def end(self) -> list[Utterance]:
        """White space at the end of a text that nothing follows."""
        return [Said(self._space)] if self._space and self._kind is Said else []

    def _told(self) -> bool:
        return not self._most or self._calls <= self._most


class _Sieve:
    """Leaves special tokens out of a text, wherever it is cut."""

    def __init__(self, dropped: Iterable[str]) -> None:
        self._pattern, self._longest, self._beginnings = _sieve(tuple(dropped))
        self._held = ""

    def add(self, text: str) -> str:
        """``text`` without them; the end may be held back."""
        if not self._longest:
            return text
        text = self._held + text
        rest = max((found.end() for found in self._pattern.finditer(text)), default=0)
        lengths = range(min(self._longest - 1, len(text) - rest), 0, -1)
        held = next((n for n in lengths if text[-n:] in self._beginnings), 0)
        self._held = text[len(text) - held :]
        return self._pattern.sub("", text[: len(text) - held])

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


@functools.lru_cache(8)
def _sieve(dropped: tuple[str, ...]) -> tuple[re.Pattern[str], int, frozenset[str]]:
    """What finds any of these texts, the length of the longest, and what any of them may begin with."""
    pattern = re.compile("|".join(map(re.escape, sorted(dropped, key=len, reverse=True))) or r"(?!)")
    beginnings = frozenset(text[:n] for text in dropped for n in range(1, len(text)))
    return pattern, max(map(len, dropped), default=0), beginnings

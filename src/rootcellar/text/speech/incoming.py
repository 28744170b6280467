"""What an answer says as it comes in: events, and the text that parsers read them from, however it is cut.

A parser is a generator over an :class:`Incoming`. It reads as if all text were there, and yields where more is needed;
so what it finds does not depend on where the text was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text that the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Passed:
    """More of the arguments of the newest call: a piece of their JSON text."""

    text: str


Utterance = Said | Thought | Called | Passed


class NotACall(Exception):
    """What was read is no call; it is shown as it was written."""


class Incoming:
    """The text of one answer, as far as it is there.

    Attributes:
        events: what was found and not handed over yet.
        ended: no more text comes.
    """

    def __init__(self) -> None:
        self.events: list[Utterance] = []
        self.ended = False
        self._text = ""
        self._at = 0  # what comes before was taken: cutting it off each time would copy all that is left
        self._taken: list[str] | None = None  # what an attempt has read
        self._called = False

    @property
    def _left(self) -> int:
        return len(self._text) - self._at

    def add(self, text: str) -> None:
        """More text has come."""
        self._text, self._at = self._text[self._at :] + text, 0

    def push(self, text: str) -> None:
        """Let ``text``, which was taken last, be read again."""
        assert self._text.endswith(text, 0, self._at)
        self._at -= len(text)
        if self._taken is not None:
            assert self._taken[-1] == text
            self._taken.pop()

    def _take(self, n: int) -> str:
        text = self._text[self._at : self._at + n]
        self._at += len(text)
        if self._taken is not None:
            self._taken.append(text)
        return text

    def peek(self) -> Steps[str]:
        """The next character, which stays; empty at the end."""
        while not self._left and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def take(self) -> Steps[str]:
        """The next character; ``NotACall`` at the end."""
        if not (yield from self.peek()):
            raise NotACall
        return self._take(1)

    def space(self) -> Steps[None]:
        """Pass over white space."""
        while (yield from self.peek()).isspace():
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._take(found.end() - self._at)

    def one_of(self, texts: Iterable[str]) -> Steps[str]:
        """Take whichever of ``texts`` comes next, the longest that does; empty: none, and nothing is taken."""
        left = sorted(texts, key=len, reverse=True)
        while True:
            for text in left:
                if self._text.startswith(text, self._at):
                    self._take(len(text))
                    return text
                if self._left < len(text) and text.startswith(self._text[self._at :]) and not self.ended:
                    break  # it may still come
            else:
                return ""
            yield

    def expect(self, text: str) -> Steps[None]:
        """Take ``text``, which must come next (``NotACall``)."""
        if not (yield from self.one_of((text,))):
            raise NotACall

    def until(self, marks: Iterable[str], event: Callable[[str], Utterance] | None = None) -> Steps[tuple[str, str]]:
        """The text before the first of ``marks``, and that, which is taken; empty: none came. No two marks overlap.

        ``event``: the text is told as such events, as soon as it is known to be none of the marks, and not returned.
        """
        kept: list[str] = []
        marks = tuple(marks)
        first = re.compile("|".join(map(re.escape, marks)) or r"(?!)")  # one search, or each looks through all of it
        while True:
            found = first.search(self._text, self._at)
            length, mark = (found.start() - self._at, found[0]) if found else (self._left, "")
            if not found and not self.ended:
                length -= max((self._begun(each) for each in marks), default=0)
            text = self._take(length)
            if text and event is None:
                kept.append(text)
            elif text and event is not None:
                self.events.append(event(text))
            if found or self.ended:
                return "".join(kept), self._take(len(mark))
            yield

    def value(self, event: Callable[[str], Utterance] | None = None) -> Steps[str]:
        """The text of the JSON value that comes next, told as ``event`` while it comes; ``NotACall``: none comes."""
        yield from self.space()
        kept: list[str] = []
        depth, quoted, escaped, scalar = 0, False, False, False
        while (yield from self.peek()):
            end, done = self._at, False
            while end < len(self._text):
                character = self._text[end]
                if scalar and (character in ",]}" or character.isspace()):
                    done = True
                    break
                end += 1
                if escaped:
                    escaped = False
                elif quoted:
                    escaped, quoted = character == "\\", character != '"'
                    done = not quoted and not depth
                elif character in "]},:" and not depth:
                    raise NotACall
                elif character == '"':
                    quoted = True
                elif character in "[{":
                    depth += 1
                elif character in "]}":
                    depth -= 1
                    done = not depth
                elif not depth:
                    scalar = True
                if done:
                    break
            piece = self._take(end - self._at)
            kept.append(piece)
            if event is not None and piece:
                self.events.append(event(piece))
            if done:
                return "".join(kept)
        if not scalar:
            raise NotACall
        return "".join(kept)

    def word(self) -> Steps[str]:
        """The JSON string that comes next; ``NotACall``: none comes."""
        yield from self.space()
        if (yield from self.peek()) != '"':
            raise NotACall
        text = yield from self.value()
        try:
            word = str(json.loads(text, strict=False))
            word.encode()  # ValueError: half of a surrogate pair, which nobody can be sent
            return word
        except ValueError:
            raise NotACall from None

    def _begun(self, mark: str) -> int:
        """How much of the end of the text may be the beginning of ``mark``."""
        lengths = range(min(len(mark) - 1, self._left), 0, -1)
        return next((n for n in lengths if self._text.endswith(mark[:n])), 0)

    def call(self, name: str) -> None:
        """Tell that a call begins."""
        self.events.append(Called(name))
        self._called = True

    def attempt(self, opened: str, steps: Steps[None]) -> Steps[bool]:
        """Read a call; whether it was one. What is none is told as text, behind what ``opened`` it.

        A call that breaks off after its name was told keeps what there is of its arguments.
        """
        self._taken, self._called = [opened], False
        try:
            yield from steps
        except NotACall:
            if not self._called:
                self.events.append(Said("".join(self._taken)))
        self._taken = None
        return self._called

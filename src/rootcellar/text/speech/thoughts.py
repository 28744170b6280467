"""What a model thinks before it speaks, between two marks."""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.text.speech.incoming import Incoming, Steps, Thought


@dataclass(frozen=True)
class Thinking:
    """How a model marks its thoughts.

    ``always``: an answer begins with them even where neither it nor the prompt has ``begins``. ``breaks``: what ends
    them too, where the model forgets ``ends``.
    """

    begins: str = "<think>"
    ends: str = "</think>"
    always: bool = False
    breaks: tuple[str, ...] = ()

    def begun(self, prompt: str) -> bool:
        """Whether a prompt ends where the model is thinking already."""
        tail = prompt[-200:].rstrip()
        return tail.endswith(self.begins) or (self.always and not tail.endswith(self.ends))

    def read(self, source: Incoming, begun: bool) -> Steps[None]:
        """Tell the thoughts at the beginning of an answer, if it has some."""
        yield from source.space()
        if not (yield from source.one_of((self.begins,))) and not begun:
            return
        mark = (yield from source.until((self.ends, *self.breaks), Thought))[1]
        if mark in self.breaks:
            source.push(mark)

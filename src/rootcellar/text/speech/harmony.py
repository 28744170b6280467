"""gpt-oss's harmony: messages of channels; what is on ``analysis`` is thought, what goes to a function is a call.

(https://github.com/openai/harmony is the library; it reads token ids of its own vocabulary, which it downloads.)
"""

from __future__ import annotations

import re

from rootcellar.text.speech.incoming import Incoming, Passed, Said, Steps, Thought

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
# What a message may begin with behind `<|start|>assistant`, with which prompts end.
_BEGINS = ("<|channel|>", " to=", "<|start|>", "<|message|>", "<|constrain|>")
MARKS = ("<|channel|>", "<|start|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")


def harmony(source: Incoming, calls: bool, thoughts: bool) -> Steps[None]:
    """``calls``: some may be; else what goes to a function is text. ``thoughts``: they are told apart from text."""
    while (yield from source.peek()):
        head = yield from source.one_of(_BEGINS)
        event: type[Said | Thought | Passed] = Said
        if head:
            header, mark = head, head
            if head != "<|message|>":
                rest, mark = yield from source.until(("<|message|>",))
                header += rest
            if not mark:
                return  # it broke off before it said anything
            channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
            if recipient is not None and calls:
                source.call(recipient[1])
                event = Passed
            elif channel is not None and channel[1] == "analysis" and thoughts:
                event = Thought
        mark = (yield from source.until(_ENDS, event))[1]
        if mark == "<|start|>":
            source.push(mark)

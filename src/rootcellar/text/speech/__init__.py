"""What a model's answer says: its thoughts, its text, its calls of tools. One file for each way to write calls."""

from rootcellar.text.speech.formats import CALLS, THOUGHTS, CallFormat, Frame, calls_of, reader, thoughts_of
from rootcellar.text.speech.incoming import Called, Passed, Said, Thought, Utterance
from rootcellar.text.speech.parser import Parser
from rootcellar.text.speech.tools import Tools

__all__ = [
    "CALLS",
    "THOUGHTS",
    "CallFormat",
    "Called",
    "Frame",
    "Parser",
    "Passed",
    "Said",
    "Thought",
    "Tools",
    "Utterance",
    "calls_of",
    "reader",
    "thoughts_of",
]

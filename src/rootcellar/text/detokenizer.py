"""The text of token ids, piece by piece, and where in a text each token lies."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Text of a growing list of token ids, piece by piece (``Tokenizer.detokenizer``).

    The pieces and what ``finish`` gives together are the text that all ids add to what came before. No piece ends
    inside a UTF-8 character or where a later token could still change it. A token costs O(1) amortised.
    """

    def add(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete; "" while there is none."""
        ...

    def finish(self) -> str:
        """The text held back, unfinished characters as U+FFFD. Nothing may be added afterwards."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies (GPT-2's alphabet: Qwen, Llama 3): text is the UTF-8 of the tokens' joined bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int]) -> str:
        """See :class:`Detokenizer`."""
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def finish(self) -> str:
        """See :class:`Detokenizer`."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For other vocabularies (SentencePiece: Llama 2, Mistral), whose decoders look at a token's neighbours.

    New tokens are decoded behind those of the piece before, which are known to read alike with and without them. A run
    of byte tokens (``<0xE6>``) is held to its end: its decoder gives characters only when the whole run is UTF-8.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        kept: Callable[[int], bool],
        is_byte: Callable[[int], bool],
        after: Sequence[int] = (),
    ):
        """``kept``: whether an id is part of the text; ``after``: the last tokens of what comes before the text."""
        self._decode, self._kept, self._is_byte = decode, kept, is_byte
        # A word that is whole: what comes behind it changes nothing of it. Bytes may be half a character.
        self._context: list[int] = [id for id in after if kept(id) and not is_byte(id)][-1:]
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """See :class:`Detokenizer`."""
        self._waiting += filter(self._kept, ids)
        if not self._waiting or self._is_byte(self._waiting[-1]):
            return ""
        return self.finish()

    def finish(self) -> str:
        """See :class:`Detokenizer`."""
        text = self._decode(self._context + self._waiting).removeprefix(self._decode(self._context))
        if text:
            self._context = self._waiting
            self._waiting = []
        return text


class Placed(Protocol):
    """What :class:`Offsets` knows of a tokenizer."""

    skipped: Mapping[int, str]

    def detokenizer(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> Detokenizer:
        """See ``Tokenizer``."""
        ...

    def token_text(self, id: int) -> str:
        """See ``Tokenizer``."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """See ``Tokenizer``."""
        ...


class Offsets:
    """Where each token begins in a text that a prompt and its answer make together, in characters.

    A special token takes its place in a prompt that has it written in it, and none where the tokenizer has put it
    around the prompt or the text leaves it out. The pieces of one character begin where it does.
    """

    def __init__(self, tokenizer: Placed, skip_special_tokens: bool) -> None:
        """``skip_special_tokens``: the answer's text leaves special tokens out."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._at = 0
        self._answer: Detokenizer | None = None

    def prompt(self, ids: Sequence[int], text: str) -> list[int]:
        """Of the prompt's tokens, before any of the answer; ``text`` is the prompt as it is shown."""
        content = text.encode()
        at = 0
        places = []
        for id in ids:
            at, length = _found(content, self._tokenizer.token_bytes(id), at, id in self._tokenizer.skipped)
            places.append(at)
            at += length
        self._at = len(text)
        return _in_characters(places, text)

    def answer(self, ids: Sequence[int], after: Sequence[int]) -> list[int]:
        """Of more tokens of the answer; ``after``: the prompt's tokens."""
        if self._answer is None:
            self._answer = self._tokenizer.detokenizer(self._skip, after[-AFTER:])
        offsets = []
        for id in ids:
            piece = self._answer.add([id])
            offsets.append(self._at + _held_back(piece, self._tokenizer.token_text(id)))
            self._at += len(piece)
        return offsets


AFTER = 16
"""Tokens of a prompt that say how its answer begins."""
# Bytes of a text that may belong to no token: what a normalizer has changed, white space beside special tokens.
_BETWEEN = 64


def _found(content: bytes, piece: bytes, at: int, special: bool) -> tuple[int, int]:
    """Where ``piece`` begins in ``content``, from ``at`` on, and its length there."""
    if content.startswith(piece, at):
        return at, len(piece)
    if special:
        return at, 0
    bare = piece.removeprefix(b" ")
    if content.startswith(bare, at):
        return at, len(bare)
    later = content.find(piece, at, at + _BETWEEN + len(piece))
    return (later, len(piece)) if later >= 0 else (at, 0)


def _in_characters(places: Sequence[int], text: str) -> list[int]:
    """Ascending places in the UTF-8 of ``text`` as characters; a place within a character is that character's."""
    found = []
    ends = itertools.accumulate(len(character.encode()) for character in text)
    end, characters = next(ends, None), 0
    for place in places:
        while end is not None and end <= place:
            end, characters = next(ends, None), characters + 1
        found.append(characters)
    return found


def _held_back(piece: str, own: str) -> int:
    """Characters of ``piece`` before the token's ``own`` text: those of bytes before it, which end with it."""
    return len(piece) - len(own) if own and piece.endswith(own) else 0

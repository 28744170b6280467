"""Special tokens that a user has written stay text.

A chat's prompt is one text, in which the template's own markers (``<|im_end|>``) are special tokens. A message that
holds the same characters must not become them: its writer could end their turn and speak as the system. So

- while the template runs, a marker in a message is a single private character, the same for the template as any letter;
- the tokenizer that reads the result is a copy to which special tokens go by secret names. What the template wrote is
  given those names, what messages hold is not, and so is tokenized as any other text is.

Where no message holds a marker, nothing of this happens. The ids of all else are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

# Unicode's last two planes are for private use: one for secret names, one for what hides a marker.
_NAMING = range(0xF0000, 0xFFFFE)
_HIDING = range(0x100000, 0x10FFFE)
_NAME_LENGTH = 12
_WITHOUT_TEXT = frozenset((int, float, bool, type(None)))


class Arguments(dict[str, Any]):
    """The arguments of a tool call: an object to templates that take it apart, and its text to those that write it."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self._written = text  # a public name would hide an argument of that name from templates

    def __str__(self) -> str:
        return self._written

    def __add__(self, other: str) -> str:
        return self._written + other

    def __radd__(self, other: str) -> str:
        return other + self._written


def each_text(value: Any) -> Iterator[str]:
    """Every string inside of plain values, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if isinstance(value, Arguments):
            yield str(value)
        for name, item in value.items():
            yield from each_text(name)
            yield from each_text(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            if type(item) not in _WITHOUT_TEXT:  # a body may have hundreds of thousands of numbers
                yield from each_text(item)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with every string changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Arguments):
        return Arguments({change(k): map_texts(v, change) for k, v in value.items()}, change(str(value)))
    if isinstance(value, Mapping):
        return {map_texts(name, change): map_texts(item, change) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [map_texts(item, change) for item in value]
    return value


class Markers:
    """Texts of special tokens, found in messages and hidden from a template.

    Two sets: ``special`` tokens, and others that the template ``written`` for this model writes, such as ``<think>``.
    Those of the second set are left alone in what the assistant said, where they are the model's own. Where two begin
    at one place the longest is meant, as for tokenizers.
    """

    def __init__(self, special: Iterable[str], written: Iterable[str]) -> None:
        special = tuple(special)
        self.texts = frozenset((*special, *written))
        self._all = _any_of(self.texts)
        self._special = _any_of(special)

    def within(self, messages: Sequence[Any], others: Any) -> bool:
        """Whether a message, or anything else that came with it, holds one."""
        return any(
            pattern.search(text) for pattern, value in self._looked_at(messages, others) for text in each_text(value)
        )

    def hide(self, messages: Sequence[Any], others: Any) -> tuple[list[Any], Any, dict[str, str]]:
        """Both with a character in the place of each marker, and which marker each character stands for."""
        looked_at = self._looked_at(messages, others)
        found = {match for pattern, value in looked_at for text in each_text(value) for match in pattern.findall(text)}
        used = {character for _, value in looked_at for text in each_text(value) for character in text}
        free = (chr(code) for code in _HIDING if chr(code) not in used)
        hidden = dict(zip(sorted(found), free, strict=False))
        *changed, rest = (
            map_texts(value, lambda text, pattern=pattern: pattern.sub(lambda match: hidden[match[0]], text))  # type: ignore[misc]
            for pattern, value in looked_at
        )
        return changed, rest, {character: text for text, character in hidden.items()}

    def _looked_at(self, messages: Sequence[Any], others: Any) -> list[tuple[re.Pattern[str], Any]]:
        own = [isinstance(each, Mapping) and each.get("role") == "assistant" for each in messages]
        patterns = [self._special if assistant else self._all for assistant in own]
        return [*zip(patterns, messages, strict=True), (self._all, others)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def show(text: str, hidden: Mapping[str, str]) -> str:
    """``text`` with the markers that ``Markers.hide`` took out of messages, also where a template has escaped them."""
    escaped = {json.dumps(character)[1:-1]: json.dumps(marker)[1:-1] for character, marker in hidden.items()}
    return _replaced(text, {**hidden, **escaped})


def _replaced(text: str, names: Mapping[str, str]) -> str:
    return _any_of(names).sub(lambda match: names[match[0]], text)


class SecretNames:
    """A copy of a tokenizer that knows some of its added tokens by names that nobody can guess."""

    def __init__(self, tokenizer: FastTokenizer, secret: Collection[str]) -> None:
        """``secret``: the texts of those tokens."""
        added = tokenizer.get_added_tokens_decoder()
        texts = [token.content for token in added.values()]
        self._names = {text: _secret() if text in secret else text for text in texts}
        self._hidden = frozenset(secret)
        content = json.loads(tokenizer.to_str())
        content["post_processor"] = None  # what it puts around a text is no part of a chat
        for token in content["added_tokens"]:
            token["content"] = self._names[token["content"]]
        content["model"] = self._renamed(content["model"])
        self._copy = FastTokenizer.from_str(json.dumps(content))
        # Tokens that the model's own vocabulary lacks are numbered anew.
        ids = {self._copy.token_to_id(self._names[token.content]): id for id, token in added.items()}
        self._ids = {theirs: ours for theirs, ours in ids.items() if theirs != ours}

    def _renamed(self, model: dict[str, Any]) -> dict[str, Any]:
        """The model with the new names, so that no text is an added token by way of the vocabulary either."""
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary = {self._names.get(token, token): id for token, id in vocabulary.items()}
        else:
            vocabulary = [[self._names.get(token, token), score] for token, score in vocabulary]
        changed = {**model, "vocab": vocabulary}
        if isinstance(model.get("unk_token"), str):
            changed["unk_token"] = self._names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            changed["merges"] = [pair for pair in model["merges"] if not self._hidden.intersection(_merged(pair))]
        return changed

    def encode(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        """Token ids of a rendered chat, in which ``hidden`` characters stand for markers that users wrote."""
        named = _replaced(text, self._names)
        ids: list[int] = self._copy.encode_batch_fast([show(named, hidden)], add_special_tokens=False)[0].ids
        return [self._ids.get(id, id) for id in ids] if self._ids else ids


def _merged(merge: str | list[str]) -> tuple[str, str, str]:
    """The two parts of a merge, and the whole."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _secret() -> str:
    return "".join(chr(secrets.choice(_NAMING)) for _ in range(_NAME_LENGTH))

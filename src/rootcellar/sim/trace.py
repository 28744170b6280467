"""Traces of requests: what was asked, without the words."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootcellar.cache import Key

BLOCK = 512  # tokens that one id of a Mooncake trace stands for
_LONGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: ids of its prompt's blocks (equal ids at equal prefixes are equal tokens), lengths in tokens."""

    hash_ids: tuple[int, ...]
    input_length: int
    output_length: int = 0

    def key(self, block: int = BLOCK) -> Key:
        """The prompt as token ids: block ``b`` is ``b * block, b * block + 1, ...``, the last one cut to length."""
        ids = np.asarray(self.hash_ids, np.int64)
        tokens = (ids[:, None] * block + np.arange(block, dtype=np.int64)).ravel()
        return Key(tokens[: self.input_length])


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of a trace that cannot be used, and why."""

    line: int
    reason: str


def parse(lines: Iterable[str], block: int = BLOCK) -> tuple[list[TraceRequest], list[BadLine]]:
    """Read a trace in Mooncake's format: a JSON object a line with ``input_length``, ``output_length``, ``hash_ids``.

    All that matters of an id is which others it equals (some traces have hashes of 64 bits): they are numbered in the
    order in which they appear. Lines are numbered from 1; blank ones are passed over. Nothing is raised for a bad line:
    it is in the second list.
    """
    requests: list[TraceRequest] = []
    bad: list[BadLine] = []
    numbers: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(json.loads(line), block, numbers))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            bad.append(BadLine(number, reason))
    return requests, bad


def _request(fields: Any, block: int, numbers: dict[int, int]) -> TraceRequest:
    if not isinstance(fields, dict):
        raise TypeError(f"is a JSON {type(fields).__name__}, not an object")
    length = _length("input_length", fields["input_length"], 1)
    output = _length("output_length", fields.get("output_length", 0), 0)
    ids = fields["hash_ids"]
    if not isinstance(ids, list):
        raise ValueError(f"hash_ids is {reprlib.repr(ids)}, not a list of block ids")
    if len(ids) != -(-length // block):
        raise ValueError(f"{length} tokens are {-(-length // block)} blocks of {block}, hash_ids has {len(ids)}")
    whole = [_whole(f"hash_ids[{i}]", value) for i, value in enumerate(ids)]
    return TraceRequest(tuple(numbers.setdefault(value, len(numbers)) for value in whole), length, output)


def _length(name: str, value: Any, least: int) -> int:
    tokens = _whole(name, value)
    if not least <= tokens <= _LONGEST:
        raise ValueError(f"{name} is {value!r}: a number of tokens is from {least} to {_LONGEST}")
    return tokens


def _whole(name: str, value: Any) -> int:
    """A whole number; some tools write ``1200.0``. From 2^53 on a float may stand for several of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    raise ValueError(f"{name} is {reprlib.repr(value)}, not a whole number")

"""Traces of requests: what was asked, without the words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootcellar.cache import Key

BLOCK = 512  # tokens that one id of a Mooncake trace stands for


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

    Lines are numbered from 1; blank ones are passed over. Nothing is raised for a bad line: it is in the second list.
    """
    requests: list[TraceRequest] = []
    bad: list[BadLine] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(json.loads(line), block))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            bad.append(BadLine(number, reason))
    return requests, bad


def _request(fields: Any, block: int) -> TraceRequest:
    if not isinstance(fields, dict):
        raise TypeError(f"is a JSON {type(fields).__name__}, not an object")
    length, output = fields["input_length"], fields.get("output_length", 0)
    ids = fields["hash_ids"]
    for name, value in (("input_length", length), ("output_length", output)):
        if not isinstance(value, int) or isinstance(value, bool) or value < (name == "input_length"):
            raise ValueError(f"{name} is {value!r}, not a number of tokens")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 2**62 // block for i in ids):
        raise ValueError("hash_ids is not a list of block ids")
    if len(ids) != -(-length // block):
        raise ValueError(f"{length} tokens are {-(-length // block)} blocks of {block}, hash_ids has {len(ids)}")
    return TraceRequest(tuple(ids), length, output)

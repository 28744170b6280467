"""Traces of requests: what was asked, without the words."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import Key

BLOCK = 512  # tokens that one id of a Mooncake trace stands for
_LONGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: ids of its prompt's blocks (equal ids at equal prefixes are equal tokens), lengths in tokens.

    ``output_ids``: ids of the blocks of prompt and answer, from the prompt's first that is not whole on, where they are
    known; the answer's newest token, which is never cached, is not in them. ``timestamp``: milliseconds, if known.
    """

    hash_ids: tuple[int, ...]
    input_length: int
    output_length: int = 0
    output_ids: tuple[int, ...] = ()
    timestamp: float | None = None

    def key(self, block: int = BLOCK) -> Key:
        """The prompt as token ids: block ``b`` is ``b * block, b * block + 1, ...``, the last one cut to length."""
        return Key(_tokens(self.hash_ids, block)[: self.input_length])

    def whole(self, block: int = BLOCK) -> Key:
        """Prompt and answer as far as they are cached in the end; the prompt alone where the answer is not known."""
        if not self.output_ids:
            return self.key(block)
        ids = self.hash_ids[: self.input_length // block] + self.output_ids
        return Key(_tokens(ids, block)[: self.input_length + max(0, self.output_length - 1)])


def _tokens(hash_ids: tuple[int, ...], block: int) -> NDArray[np.int64]:
    ids = np.asarray(hash_ids, np.int64)
    return (ids[:, None] * block + np.arange(block, dtype=np.int64)).ravel()


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of a trace that cannot be used, and why."""

    line: int
    reason: str


def parse(lines: Iterable[str], block: int = BLOCK) -> tuple[list[TraceRequest], list[BadLine]]:
    """Read a trace in Mooncake's format: a JSON object a line with ``input_length``, ``output_length``, ``hash_ids``.

    All that matters of an id is which others it equals (some traces have hashes of 64 bits): they are numbered in the
    order in which they appear. ``output_hash_ids`` are as ``TraceRequest.output_ids``: what ``record_trace`` writes.
    With a ``timestamp`` each, they are put in its order. Lines are numbered from 1; blank ones are passed over. Nothing
    is raised for a bad line: it is in the second list.
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
    times = [request.timestamp for request in requests if request.timestamp is not None]
    if len(times) == len(requests) and times != sorted(times):
        requests.sort(key=lambda request: request.timestamp or 0)
    return requests, bad


def _request(fields: Any, block: int, numbers: dict[int, int]) -> TraceRequest:
    if not isinstance(fields, dict):
        raise TypeError(f"is a JSON {type(fields).__name__}, not an object")
    length = token_count("input_length", fields["input_length"], 1)
    output = token_count("output_length", fields.get("output_length", 0), 0)
    ids = fields["hash_ids"]
    if not isinstance(ids, list):
        raise ValueError(f"hash_ids is {reprlib.repr(ids)}, not a list of block ids")
    if len(ids) != -(-length // block):
        raise ValueError(f"{length} tokens are {-(-length // block)} blocks of {block}, hash_ids has {len(ids)}")
    found, after = _numbered("hash_ids", ids, numbers), fields.get("output_hash_ids", [])
    if after and (not isinstance(after, list) or len(after) != -(-(length % block + max(0, output - 1)) // block)):
        raise ValueError("output_hash_ids has another number of blocks than the prompt's rest and the answer")
    answer = _numbered("output_hash_ids", after, numbers)
    return TraceRequest(found, length, output, answer, _moment(fields.get("timestamp")))


def _moment(value: Any) -> float | None:
    """A time; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _numbered(name: str, ids: list[Any], numbers: dict[int, int]) -> tuple[int, ...]:
    whole = [_whole(f"{name}[{i}]", value) for i, value in enumerate(ids)]
    return tuple(numbers.setdefault(value, len(numbers)) for value in whole)


def token_count(name: str, value: Any, least: int) -> int:
    """A number of tokens that a trace may have. Raises ``ValueError``, which says of what."""
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

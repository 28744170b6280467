"""Large answers, written beside the event loop and in pieces, so that nobody else waits for them.

orjson holds the interpreter for as long as one call takes: a list of 60,000 logprobs would stop every other client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import orjson

from rootcellar.server.answer import Result, on_thread

T = TypeVar("T")
_OPTIONS = orjson.OPT_NON_STR_KEYS
# Logprobs that are written on the event loop, in about a millisecond.
_FEW = 1_000
# Entries of a list that are written at once.
PIECE = 128


async def written(logprobs: int, write: Callable[[], T]) -> T:
    """What ``write`` gives, which writes so many logprobs: on a thread where that takes long."""
    return await on_thread(write) if logprobs > _FEW else write()


def logprobs_of(results: Sequence[Result]) -> int:
    """How many logprobs there are in ``results``, those of the likeliest tokens included."""
    total = 0
    for result in results:
        meta = result["meta_info"]
        for part in ("output", "input"):
            tokens = meta.get(f"{part}_token_logprobs", ())
            rows = meta.get(f"{part}_top_logprobs", ())
            total += len(tokens) * (1 + (len(rows[-1] or ()) if rows else 0))
    return total


def dumps(content: Any) -> bytes:
    """``content`` as JSON, its long lists piece by piece."""
    return orjson.dumps(_cut(content), option=_OPTIONS)


def _cut(value: Any) -> Any:
    match value:
        case dict():
            return {key: _cut(each) for key, each in value.items()}
        case list() if len(value) > PIECE:
            return as_list([entries(value[i : i + PIECE]) for i in range(0, len(value), PIECE)])
        case list() if value and isinstance(value[0], dict):
            return [_cut(each) for each in value]
        case _:
            return value


def entries(values: Sequence[Any]) -> bytes:
    """``values`` as they stand between the brackets of a list."""
    return orjson.dumps(values, option=_OPTIONS)[1:-1]


def as_list(pieces: Sequence[bytes]) -> orjson.Fragment:
    """A list of the ``entries`` of each of ``pieces``."""
    return orjson.Fragment(b"[" + b",".join(piece for piece in pieces if piece) + b"]")

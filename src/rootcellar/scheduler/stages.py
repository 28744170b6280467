"""Where a request is in its life, and where it may go from there.

    TOKENIZE ─▶ PREFILL_WAITING ─▶ LOADING ─▶ PREFILL_CHUNKED_FORWARD ─▶ PREFILL_FORWARD ─▶ DECODE_LOOP ─▶ FINISHED

A request that loses its memory, or the bytes that it waited for, goes back to PREFILL_WAITING. Where prefill and decode
are apart, the prefill side begins with PREFILL_BOOTSTRAP and ends with PREFILL_TRANSFER_KV_CACHE; the decode side waits
for bytes in stages of its own (DECODE_BOOTSTRAP, DECODE_WAITING, DECODE_TRANSFERRED), loads them, and computes what did
not come.
Names are SGLang's where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from rootcellar.errors import EngineError


class Stage(StrEnum):
    """Where a request is in its life; TOKENIZE is before the scheduler knows of it."""

    TOKENIZE = "TOKENIZE"
    PREFILL_BOOTSTRAP = "PREFILL_BOOTSTRAP"
    """The decode side is not known yet."""
    PREFILL_WAITING = "PREFILL_WAITING"
    """It waits for a row and for memory."""
    LOADING = "LOADING"
    """It has both, and what is cached of it comes from a farther tier."""
    PREFILL_FORWARD = "PREFILL_FORWARD"
    """The last of its prompt is computed."""
    PREFILL_CHUNKED_FORWARD = "PREFILL_CHUNKED_FORWARD"
    """A part of its prompt is computed."""
    PREFILL_TRANSFER_KV_CACHE = "PREFILL_TRANSFER_KV_CACHE"
    """What the decode side lacks is sent."""
    DECODE_BOOTSTRAP = "DECODE_BOOTSTRAP"
    """The prefill side is not known yet."""
    DECODE_WAITING = "DECODE_WAITING"
    """The prefill side computes and sends."""
    DECODE_TRANSFERRED = "DECODE_TRANSFERRED"
    """All that was sent is there."""
    DECODE_LOOP = "DECODE_LOOP"
    """Its answer is computed."""
    FINISHED = "FINISHED"


FORWARD = frozenset({Stage.PREFILL_FORWARD, Stage.PREFILL_CHUNKED_FORWARD, Stage.DECODE_LOOP})
"""Those in which a request is computed."""
_LOST = {Stage.PREFILL_WAITING, Stage.FINISHED}

NEXT: Mapping[Stage, frozenset[Stage]] = {
    stage: frozenset(then)
    for stage, then in {
        Stage.TOKENIZE: {Stage.PREFILL_BOOTSTRAP, Stage.DECODE_BOOTSTRAP, *_LOST},
        Stage.PREFILL_BOOTSTRAP: _LOST,
        Stage.PREFILL_WAITING: {Stage.LOADING, *FORWARD, Stage.FINISHED},
        Stage.LOADING: {*FORWARD, *_LOST},
        Stage.PREFILL_CHUNKED_FORWARD: {*FORWARD, *_LOST},
        Stage.PREFILL_FORWARD: {Stage.PREFILL_TRANSFER_KV_CACHE, Stage.DECODE_LOOP, *_LOST},
        Stage.PREFILL_TRANSFER_KV_CACHE: _LOST,
        Stage.DECODE_BOOTSTRAP: {Stage.DECODE_WAITING, *_LOST},
        Stage.DECODE_WAITING: {Stage.DECODE_TRANSFERRED, *_LOST},
        Stage.DECODE_TRANSFERRED: {Stage.LOADING, *FORWARD, *_LOST},
        Stage.DECODE_LOOP: {Stage.PREFILL_TRANSFER_KV_CACHE, *_LOST},
        Stage.FINISHED: set(),
    }.items()
}
"""From each stage, those that may come next; a stage may also go on."""


def advance_stage(rid: str, now: Stage, then: Stage) -> Stage:
    """``then``, where request ``rid`` may go there from ``now``; ``EngineError`` where it may not."""
    if then is not now and then not in NEXT[now]:
        may = ", ".join(sorted(NEXT[now])) or "nowhere"
        raise EngineError(f"request {rid} is in stage {now} and cannot go to {then}: only to {may}")
    return then

"""What happened lately, request by request and step by step, and the same as a Chrome trace.

A timeline holds the newest requests that ended and the newest steps, in rings of fixed length. Load what
:func:`chrome_trace` gives into https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rootcellar.cache import Key
from rootcellar.engine.output import Tracker

REQUESTS = 1024
STEPS = 4096
# Prompts remembered after their requests ended, to say who shares a part of the tree: so many, of so many tokens.
KEYS = 64
KEY_TOKENS = 262_144


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. ``stages``: name and begin of each, in seconds; ``end`` is None while it lives."""

    rid: str
    stages: tuple[tuple[str, float], ...]
    end: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    retractions: int
    finish: str | None
    tenant: str = ""

    @classmethod
    def of(cls, tracker: Tracker, end: float | None) -> RequestRecord:
        """What a request's tracker knows now."""
        request = tracker.request
        return cls(
            request.rid,
            tuple(tracker.stages),
            end,
            request.prompt_length,
            request.cached or 0,
            request.generated,
            request.retractions,
            None if request.finish is None else request.finish.type,
            request.tenant,
        )


class StepRecord(NamedTuple):
    """One step: when it began, when the device began with it, when its tokens were there, when all was followed up.

    The device may have begun before: while the host was busy with the step before. ``kind``: "prefill", "decode", or
    "encode" for a turn of the encoder between two steps, which has neither requests nor tokens of its own.
    """

    began: float
    dispatched: float
    computed: float
    ended: float
    kind: str
    requests: int
    tokens: int


class Timeline:
    """The rings. Written and read on the engine's thread."""

    def __init__(self) -> None:
        self.requests: deque[RequestRecord] = deque(maxlen=REQUESTS)
        self.steps: deque[StepRecord] = deque(maxlen=STEPS)
        self.keys: deque[tuple[RequestRecord, Key]] = deque()
        self._key_tokens = 0

    def ended(self, record: RequestRecord, key: Key) -> None:
        """A request ended; ``key`` is that of all its tokens and must not change any more."""
        self.requests.append(record)
        self.keys.append((record, key))
        self._key_tokens += len(key)
        while len(self.keys) > KEYS or self._key_tokens > KEY_TOKENS:
            self._key_tokens -= len(self.keys.popleft()[1])


def chrome_trace(
    requests: Iterable[RequestRecord], steps: Sequence[StepRecord], *, now: float, started: float, wall: float = 0.0
) -> dict[str, Any]:
    """Requests and steps in Chrome's trace event format (JSON object form, complete events).

    Requests that do not overlap share a lane, so there are as many lanes as were alive at once. Each request is a slice
    that encloses its stages. Each step is a slice, and the device's part of it one in a lane of its own.

    Args:
        requests: alive or ended.
        steps: in order.
        now: what has not ended yet ends here.
        started: time zero of the trace.
        wall: what a clock on the wall showed then, in seconds, so that traces of several nodes can be put together.
    """
    events: list[dict[str, Any]] = [_name(1, "requests"), _name(2, "engine"), _name(2, "steps", thread=1)]
    events.append(_name(2, "device", thread=2))

    def slice_(pid: int, tid: int, name: str, begin: float, end: float, **args: Any) -> None:
        ts, until = round((begin - started) * 1e6), round((end - started) * 1e6)
        where = {"pid": pid, "tid": tid, "ts": ts, "dur": until - ts}
        events.append({"ph": "X", "name": name, "cat": "request" if pid == 1 else "step", **where, "args": args})

    free_at: list[float] = []
    for record in sorted(requests, key=lambda r: r.stages[0][1]):
        begin, end = record.stages[0][1], now if record.end is None else record.end
        lane = next((i for i, free in enumerate(free_at) if free <= begin), len(free_at))
        free_at[lane : lane + 1] = [end]
        args = {k: v for k, v in asdict(record).items() if k not in ("stages", "end") and (k, v) != ("tenant", "")}
        slice_(1, lane + 1, record.rid, begin, end, **args)
        ends = [at for _, at in record.stages[1:]] + [end]
        for (name, at), until in zip(record.stages, ends, strict=True):
            if name != "FINISHED":
                slice_(1, lane + 1, name, at, until, rid=record.rid)
    events += [_name(1, f"lane {i + 1}", thread=i + 1) for i in range(len(free_at))]
    for step in steps:
        slice_(2, 1, step.kind, step.began, step.ended, requests=step.requests, tokens=step.tokens)
        slice_(2, 2, step.kind, step.dispatched, step.computed)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"started_at": wall}}


def _name(pid: int, name: str, thread: int | None = None) -> dict[str, Any]:
    kind = "process_name" if thread is None else "thread_name"
    return {"ph": "M", "name": kind, "pid": pid, "tid": thread or 0, "args": {"name": name}}

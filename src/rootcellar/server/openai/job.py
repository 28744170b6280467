"""One request to OpenAI's routes: from the engine's results to the answer, whole or in pieces."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import Request
from starlette.responses import Response

from rootcellar.server.answer import EventStream, Result, Stream, begin, event_of, whole
from rootcellar.server.errors import json_bytes
from rootcellar.server.explaining import explanations, wants_explanation
from rootcellar.server.hinting import check as check_hints_of
from rootcellar.server.hinting import taken
from rootcellar.server.openai.choices import Sent, extension, finish, usage
from rootcellar.server.openai.extras import Extras
from rootcellar.server.openai.protocol import Sampling, StreamOptions
from rootcellar.server.state import ServerState
from rootcellar.server.writing import dumps, logprobs_of, written


@dataclass(kw_only=True)
class OpenAIJob(ABC):
    """What one request asks of the engine, and how its answer is written; each route says what its choices hold.

    Attributes:
        arguments: of ``Engine.generate``.
        n: answers to each prompt; ``answers``: to all of them together.
        top: how many of the likeliest tokens are shown beside each; None: no logprobs at all.
        extras: what else was asked for.
    """

    object_name: ClassVar[str]
    event_name: ClassVar[str]
    in_choices: ClassVar[bool]
    """Whether what is told of prompts and of the cache stands in choices, or beside them: a completion may have several
    prompts. SGLang's benchmark looks into the first choice of each of a completion's events, so there must be one."""

    id: str
    model: str
    n: int
    answers: int
    top: int | None
    extras: Extras
    arguments: dict[str, Any]
    _created: int = field(default_factory=lambda: int(time.time()), init=False)
    _sent: dict[int, Sent] = field(default_factory=dict, init=False)
    _more: dict[str, Any] = field(default_factory=dict, init=False)
    """What was asked for of the cache, beside where tokens came from."""

    @abstractmethod
    async def choice(self, i: int, result: Result) -> dict[str, Any]:
        """What choice ``i`` of a whole answer holds."""

    @abstractmethod
    async def delta(self, i: int, result: Result, first: bool) -> dict[str, Any]:
        """What choice ``i`` of an event holds, of what is new in ``result``: empty when nothing is."""

    @abstractmethod
    def logprobs(self, i: int, result: Result, top: int) -> dict[str, Any] | None:
        """Logprobs of choice ``i`` that were not sent before, with ``top`` of the likeliest; None: none."""

    async def answer(self, request: Request, state: ServerState, body: Sampling) -> Response:
        """Ask the engine, and answer as ``body`` wants it."""
        check_hints_of(request, state, body.cache_hints, self.arguments, self.n)
        asked = wants_explanation(request, state, body.explain), body.cache_hints
        if body.stream:
            stream = await begin(request, state, **self.arguments)
            look = functools.partial(self._look, request, state, *asked) if any(asked) else None
            return EventStream(stream, self._events(stream, body.stream_options or StreamOptions(), look))
        results = await whole(request, state, **self.arguments)
        await self._look(request, state, *asked, results)
        contents = [await self.choice(i, result) for i, result in enumerate(results)]

        def write() -> bytes:
            choices = [self._choice(i, contents[i], result) for i, result in enumerate(results)]
            head = self._head(self.object_name)
            self._tell_prompts(head, choices, results)
            return dumps({**head, "choices": choices, **self._used(results)})

        return json_bytes(await written(logprobs_of(results), write))

    def _tell_prompts(self, head: dict[str, Any], choices: list[dict[str, Any]], results: list[Result]) -> None:
        """Write what was asked for of the prompts of these choices where it belongs."""
        for choice, result in zip(choices, results, strict=True):
            (choice if self.in_choices else head).update(self.extras.of_prompt(choice["index"] // self.n, result))

    async def _look(
        self, request: Request, state: ServerState, explain: bool, hints: dict[str, Any] | None, results: list[Result]
    ) -> None:
        """Find out why each prompt computed what it did, and take the hints on a conversation."""
        if explain:
            self._more["explanations"] = await explanations(request, state, results[:: self.n])
        if hints is not None:
            self._more["cache_hints"] = await taken(request, state, hints, self.arguments, results[0])

    async def _events(
        self, stream: Stream, options: StreamOptions, look: Callable[[list[Result]], Awaitable[None]] | None
    ) -> AsyncGenerator[bytes]:
        """The answer in pieces: what is new, then why it ended, then what it used. ``look``: done at the end."""
        head = self._head(self.event_name)
        newest: dict[int, Result] = {}
        left = self.answers
        told: set[int] = set()
        async for result in stream.results():
            i = result.get("index", 0)
            first = i not in newest
            delta = await self.delta(i, result, first)
            newest[i] = result
            new = logprobs_of([result]) if first else 0  # a stream's later events have few
            choice = await written(new, functools.partial(self._choice, i, delta, result))
            if not (any(delta.values()) or choice["logprobs"] or choice["finish_reason"] or choice.get("token_ids")):
                continue
            event = {**head, "choices": [choice]}
            about = i if self.in_choices else 0
            if about not in told:
                told.add(about)
                self._tell_prompts(event, [choice], [result])
            if options.continuous_usage_stats:
                event["usage"] = usage([result], 1)
            left -= choice["finish_reason"] is not None
            if not left and self.extras.cached_details and self.in_choices and not options.include_usage:
                event["sglext"] = self._used([newest[i] for i in sorted(newest)])["sglext"]
            yield event_of(event)
        results = [newest[i] for i in sorted(newest)]
        if look is not None:
            await look(results)
        used = self._used(results)
        if options.include_usage:
            yield event_of({**head, "choices": [], **used})
        elif look is not None or (self.extras.cached_details and not self.in_choices):
            yield event_of({**head, "choices": [], "sglext": used["sglext"]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model}

    def _used(self, results: list[Result]) -> dict[str, Any]:
        return {"usage": usage(results, self.n), "sglext": {**extension(results, self.n), **self._more}}

    def _choice(self, i: int, content: dict[str, Any], result: Result) -> dict[str, Any]:
        logprobs = None if self.top is None else self.logprobs(i, result, self.top)
        choice = {"index": i, **content, "logprobs": logprobs, **self.finish(i, result)}
        if self.extras.token_ids:
            choice["token_ids"] = self.sent(i).token_ids(result)
        return choice

    def finish(self, i: int, result: Result) -> dict[str, Any]:  # noqa: ARG002
        """Why choice ``i`` ended."""
        return finish(result)

    def sent(self, i: int) -> Sent:
        """How much of choice ``i`` was sent."""
        return self._sent.setdefault(i, Sent())

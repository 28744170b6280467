"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.answer import EventStream, Result, Stream, begin, event_of, whole
from rootcellar.server.errors import invalid, json_response
from rootcellar.server.openai.choices import Sent, extension, finish, usage
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.protocol import CompletionRequest, StreamOptions
from rootcellar.server.parsing import OrjsonRoute
from rootcellar.server.prompts import Prompts, read_prompts, texts_of
from rootcellar.server.state import State, state_of

router = APIRouter(route_class=OrjsonRoute, tags=["OpenAI"])


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    state = state_of(request)
    state.require_model(body.model)
    with openai_names(max_new_tokens="max_tokens"):
        job = await _Job.of(body, state)
        if body.stream:
            stream = await begin(request, state, **job.arguments)
            await job.read_back(state)
            return EventStream(stream, job.events(stream, body.stream_options or StreamOptions()))
        results = await whole(request, state, **job.arguments)
        await job.read_back(state)
    return json_response(job.answer(results))


@dataclass
class _Job:
    """One request: what it asks of the engine, and how its answer is written."""

    id: str
    model: str
    created: int
    n: int
    echo: bool
    top: int | None
    prompts: Prompts
    arguments: dict[str, Any]
    echoes: list[str] = field(default_factory=list)
    """The prompts as text, for ``echo``."""
    _sent: dict[int, Sent] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    @classmethod
    async def of(cls, body: CompletionRequest, state: State) -> _Job:
        n = body.n or 1
        if body.suffix:
            raise invalid("suffix is not supported: this server continues a prompt and inserts nothing", "suffix")
        if body.best_of is not None and body.best_of != n:
            raise invalid("best_of is not supported: leave it out, or equal to n", "best_of")
        if body.logprobs is not None and not 0 <= body.logprobs <= 20:
            raise invalid("logprobs must be from 0 to 20", "logprobs")
        top, echo = body.logprobs, bool(body.echo)
        texts, ids = _split(body.prompt)
        prompts = await read_prompts(state, texts, ids, n)
        name = body.name("cmpl")
        arguments = {
            "input_ids": prompts.input_ids,
            "sampling_params": body.sampling_params(16 if body.max_tokens is None else body.max_tokens),
            "rid": name if prompts.one else [f"{name}-{i}" for i in range(len(prompts.ids))],
            "return_logprob": top is not None,
            "logprob_start_len": 0 if echo and top is not None else -1,
            "top_logprobs_num": top or 0,
            "priority": body.priority or 0,
            "extra_key": body.namespace(),
        }
        return cls(name, state.model_name, int(time.time()), n, echo, top, prompts, arguments)

    async def read_back(self, state: State) -> None:
        """Have the prompts as text, if the answer repeats them; the engine has taken them by now."""
        if self.echo:
            self.echoes = await texts_of(state, self.prompts)

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for i, result in enumerate(results):
            text = (self.echoes[i // self.n] if self.echo else "") + result["text"]
            choices.append({"index": i, "text": text, "logprobs": self._new_logprobs(i, result), **finish(result)})
        return {
            **self._head(),
            "choices": choices,
            "usage": usage(results, self.n),
            "sglext": extension(results, self.n),
        }

    async def events(self, stream: Stream, options: StreamOptions) -> AsyncGenerator[bytes]:
        """The answer in pieces."""
        newest: dict[int, Result] = {}
        async for result in stream.results():
            i = result.get("index", 0)
            first = i not in newest
            newest[i] = result
            text = self._sent_of(i).text(result)
            if self.echo and first:
                text = self.echoes[i // self.n] + text
            done = result["meta_info"]["finish_reason"] is not None
            logprobs = self._new_logprobs(i, result)
            if not (text or done or logprobs):
                continue
            event = {**self._head(), "choices": [{"index": i, "text": text, "logprobs": logprobs, **finish(result)}]}
            if options.continuous_usage_stats:
                event["usage"] = usage([result], 1)
            yield event_of(event)
        if options.include_usage:
            results = [newest[i] for i in sorted(newest)]
            end = {"choices": [], "usage": usage(results, self.n), "sglext": extension(results, self.n)}
            yield event_of({**self._head(), **end})

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _sent_of(self, i: int) -> Sent:
        return self._sent.setdefault(i, Sent())

    def _new_logprobs(self, i: int, result: Result) -> dict[str, Any] | None:
        """Logprobs that were not sent before; None when there are none or none were asked for."""
        if self.top is None:
            return None
        sent = self._sent_of(i)
        first = sent.tokens == 0 and i not in self._offsets
        tokens, others = sent.logprobs(result, self.top)
        if self.echo and first:
            meta = result["meta_info"]
            tokens = meta["input_token_logprobs"] + tokens
            others = (meta["input_top_logprobs"] if self.top else [[] for _ in meta["input_token_logprobs"]]) + others
        if not tokens:
            return None
        at = self._offsets.get(i, 0)
        texts = [text for _, _, text in tokens]
        offsets = []
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[i] = at
        return {
            "tokens": texts,
            "token_logprobs": [value for value, _, _ in tokens],
            "top_logprobs": [_likeliest(token, row) for token, row in zip(tokens, others, strict=True)],
            "text_offset": offsets,
        }


def _likeliest(token: tuple[float | None, int, str], row: list[tuple[float, int, str]] | None) -> dict[str, Any] | None:
    """Logprobs by text, that of the token itself always among them; of tokens that read alike the likeliest."""
    value, _, text = token
    if value is None:  # the first token of a prompt
        return None
    found: dict[str, float] = {}
    for other, _, name in [*(row or []), (value, 0, text)]:
        found[name] = max(other, found.get(name, other))
    return found


def _split(prompt: str | list[Any]) -> tuple[str | list[str] | None, list[Any] | None]:
    """The prompt as text or as token ids."""
    if isinstance(prompt, str) or (prompt and all(isinstance(each, str) for each in prompt)):
        return prompt, None
    return None, prompt

"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.engine.tokenizer import Tokenizer
from rootcellar.errors import RequestError
from rootcellar.server.answer import EventStream, Result, Stream, begin, event_of, whole
from rootcellar.server.errors import invalid, json_response
from rootcellar.server.openai.choices import Sent, extension, finish, usage
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.protocol import ChatRequest, StreamOptions
from rootcellar.server.parsing import OrjsonRoute
from rootcellar.server.prompts import Prompts, read_prompts
from rootcellar.server.state import State, state_of

router = APIRouter(route_class=OrjsonRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    state.require_model(body.model)
    with openai_names(max_new_tokens="max_completion_tokens"):
        job = await _Job.of(body, state)
        if body.stream:
            stream = await begin(request, state, **job.arguments)
            return EventStream(stream, job.events(stream, body.stream_options or StreamOptions()))
        results = await whole(request, state, **job.arguments)
    return json_response(job.answer(results))


def chat_text(
    state: State,
    messages: list[dict[str, Any]],
    variables: dict[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt that a conversation becomes by the model's template, ``variables`` of its own included."""
    reserved = {"messages", "add_generation_prompt", "tools"}.intersection(variables or {})
    if reserved:
        raise invalid(f"chat_template_kwargs must not name {min(reserved)}", "chat_template_kwargs")
    try:
        return state.engine.chat_prompt(messages, add_generation_prompt=add_generation_prompt, **(variables or {}))
    except RequestError:
        raise
    except Exception as error:  # a template is a program, and these are its inputs
        raise invalid(f"the model's chat template fails: {type(error).__name__}: {error}", "messages") from error


async def chat_tokens(state: State, body: ChatRequest) -> Prompts:
    """The token ids of a conversation."""
    text = chat_text(state, [message.for_template() for message in body.messages], body.chat_template_kwargs)
    return await read_prompts(state, text, None, body.n or 1)


@dataclass
class _Job:
    """One request: what it asks of the engine, and how its answer is written."""

    id: str
    model: str
    created: int
    n: int
    top: int | None
    tokenizer: Tokenizer
    arguments: dict[str, Any]
    _sent: dict[int, Sent] = field(default_factory=dict)

    @classmethod
    async def of(cls, body: ChatRequest, state: State) -> _Job:
        _refuse_tools(body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        prompts = await chat_tokens(state, body)
        limit = body.limit()
        most = max(1, state.engine.longest_prompt + 1 - len(prompts.input_ids)) if limit is None else limit
        name = body.name("chatcmpl")
        arguments = {
            "input_ids": prompts.input_ids,
            "sampling_params": body.sampling_params(most),
            "rid": name,
            "return_logprob": top is not None,
            "top_logprobs_num": top or 0,
            "priority": body.priority or 0,
            "extra_key": body.namespace(),
        }
        created = int(time.time())
        return cls(name, state.model_name, created, body.n or 1, top, state.engine.tokenizer, arguments)

    def answer(self, results: list[Result]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": result["text"], "refusal": None},
                "logprobs": self._new_logprobs(i, result),
                **finish(result),
            }
            for i, result in enumerate(results)
        ]
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": usage(results, self.n), "sglext": extension(results, self.n)}

    async def events(self, stream: Stream, options: StreamOptions) -> AsyncGenerator[bytes]:
        """The answer in pieces: the role, then text, then why it ended."""
        newest: dict[int, Result] = {}
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        async for result in stream.results():
            i = result.get("index", 0)
            delta: dict[str, Any] = {} if i in newest else {"role": "assistant", "content": ""}
            newest[i] = result
            text = self._sent_of(i).text(result)
            if text:
                delta["content"] = text
            logprobs = self._new_logprobs(i, result)
            if not (delta or logprobs or result["meta_info"]["finish_reason"]):
                continue
            event = {**head, "choices": [{"index": i, "delta": delta, "logprobs": logprobs, **finish(result)}]}
            if options.continuous_usage_stats:
                event["usage"] = usage([result], 1)
            yield event_of(event)
        if options.include_usage:
            results = [newest[i] for i in sorted(newest)]
            end = {"choices": [], "usage": usage(results, self.n), "sglext": extension(results, self.n)}
            yield event_of({**head, **end})

    def _sent_of(self, i: int) -> Sent:
        return self._sent.setdefault(i, Sent())

    def _new_logprobs(self, i: int, result: Result) -> dict[str, Any] | None:
        """Logprobs that were not sent before; None when there are none or none were asked for."""
        if self.top is None:
            return None
        tokens, others = self._sent_of(i).logprobs(result, self.top)
        content = [
            {**self._entry(token), "top_logprobs": [self._entry(each) for each in row]}
            for token, row in zip(tokens, others, strict=True)
        ]
        return {"content": content} if content else None

    def _entry(self, token: tuple[float, int, str]) -> dict[str, Any]:
        value, id, text = token
        return {"token": text, "logprob": value, "bytes": list(self.tokenizer.token_bytes(id))}


def _refuse_tools(body: ChatRequest) -> None:
    """An answer that ignored them would look like a model that does not want to call."""
    for name in ("tools", "functions"):
        if getattr(body, name):
            raise invalid(f"{name} are not supported: describe them in a message, and read the answer's text", name)

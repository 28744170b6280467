"""``/v1/responses``: to ask for one, to read one that was kept, to forget it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.errors import RootcellarError
from rootcellar.server.answer import EventStream, Result, Stream, begin, named_event, require_room, whole
from rootcellar.server.callers import caller_of, paying
from rootcellar.server.errors import ApiError, invalid, json_bytes, json_response
from rootcellar.server.hinting import keep
from rootcellar.server.openai.chat import Asked, read_chat_request
from rootcellar.server.openai.choices import Sent
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.speaker import Speaker
from rootcellar.server.prompts import tokenize
from rootcellar.server.responses.answers import ItemWriter
from rootcellar.server.responses.items import Turn, chat_of, functions_of, turn_of
from rootcellar.server.responses.protocol import FunctionTool, ResponsesRequest, ResponseTool
from rootcellar.server.responses.stored import StoredResponse
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=UserRoute, tags=["OpenAI"])


@router.post("/v1/responses")
async def respond(body: ResponsesRequest, request: Request) -> Response:
    """Answer, on from an earlier answer if one is named."""
    state = state_of(request)
    state.require_model(body.model)
    require_room(request, state, "", 1)
    before: list[Turn] = []
    if body.previous_response_id is not None:
        name = body.previous_response_id
        found = state.responses.get(paying(request.scope), name)
        if found is None:
            message = f"Previous response with id {name[:100]!r} not found: it was never stored, or not for so long."
            raise invalid(message, "previous_response_id", "previous_response_not_found")
        before = orjson.loads(found.turns)
    chat, turns = chat_of(body, before)
    with openai_names(chat.form_names, max_new_tokens="max_output_tokens", response_format="text.format"):
        asked = await read_chat_request(state, chat, caller_of(request).name, prefix="resp")
        job = _Responding(request, state, body, asked, turns)
        if not body.stream:
            return await job.answer()
        stream = await begin(request, state, **job.asked.arguments)
        return EventStream(stream, job.events(stream), failed=_failed, end=b"")


@router.get("/v1/responses/{response_id}")
async def read(response_id: str, request: Request) -> Response:
    """An answer that was kept."""
    return json_bytes(_kept(request, response_id).told)


@router.delete("/v1/responses/{response_id}")
async def forget(response_id: str, request: Request) -> Response:
    """Forget an answer that was kept."""
    _kept(request, response_id)
    state_of(request).responses.drop(paying(request.scope), response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


def _kept(request: Request, name: str) -> StoredResponse:
    found = state_of(request).responses.get(paying(request.scope), name)
    if found is None:
        raise ApiError(404, f"Response with id {name[:100]!r} not found.", "response_id", "response_not_found")
    return found


def _failed(error: ApiError) -> bytes:
    told = error.body()["error"]
    return named_event({"type": "error", **{name: told[name] for name in ("code", "message", "param")}})


@dataclass
class _Responding:
    """One request. ``turns``: of the conversation up to it, without instructions."""

    request: Request
    state: ServerState
    body: ResponsesRequest
    asked: Asked
    turns: list[Turn]
    _created: int = field(default_factory=lambda: int(time.time()))

    def _writer(self) -> ItemWriter:
        spaces = {name: space for name, (space, _) in functions_of(self.body).items() if space is not None}
        return ItemWriter(Speaker(self.asked.reading), spaces)

    async def answer(self) -> Response:
        """The whole answer."""
        (result,) = await whole(self.request, self.state, **self.asked.arguments)
        writer = self._writer()
        for _ in writer.write(writer.speaker.events(result["text"], ended=True)):
            pass
        return json_response(await self._end(writer, result))

    async def events(self, stream: Stream) -> AsyncGenerator[bytes]:
        """The answer as it is made."""
        writer, sent = self._writer(), Sent()
        told = self._told([], "in_progress")
        yield writer.event("response.created", response=told)
        yield writer.event("response.in_progress", response=told)
        async for result in stream.results():
            ended = result["meta_info"]["finish_reason"] is not None
            for each in writer.write(writer.speaker.events(sent.text(result), ended=ended)):
                yield each
            if ended:
                for each in writer.close(_status(result)):
                    yield each
                told = await self._end(writer, result)
                yield writer.event(f"response.{told['status']}", response=told)

    async def _end(self, writer: ItemWriter, result: Result) -> dict[str, Any]:
        """The whole response; it is kept, and so is its conversation in the cache, unless its client wants neither."""
        status = _status(result)
        for _ in writer.close(status):
            pass
        meta = result["meta_info"]
        thought = await self._tokens_of_thoughts(writer.speaker, meta["completion_tokens"])
        told = self._told(writer.items, status)
        told["usage"] = {
            "input_tokens": meta["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": meta["cached_tokens"], "cache_write_tokens": 0},
            "output_tokens": meta["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": meta["prompt_tokens"] + meta["completion_tokens"],
        }
        if self.body.store is not False and self.state.responses.put(
            paying(self.request.scope), self.asked.id, [*self.turns, turn_of(writer.speaker)], told
        ):
            await self._pin(result)
        return told

    async def _pin(self, result: Result) -> None:
        """Keep the conversation in the cache for whoever goes on from this response."""
        if seconds := self.state.config.response_pin:
            ids = [*self.asked.prompts.input_ids, *result["output_ids"]]
            await keep(self.request, self.state, ids, seconds, self.asked.arguments)

    async def _tokens_of_thoughts(self, speaker: Speaker, tokens: int) -> int:
        """How many of an answer's ``tokens`` are thoughts."""
        thought = speaker.thought
        if not thought:
            return 0
        try:
            (ids,) = await tokenize(self.state, [thought], False)
        except RootcellarError:  # too many prompts wait to be read: no answer is lost for a figure, which then is near
            said = len(speaker.text) + sum(len(call.arguments) for call in speaker.calls)
            return tokens * len(thought) // (len(thought) + said)
        return min(len(ids), tokens)

    def _told(self, output: list[dict[str, Any]], status: str) -> dict[str, Any]:
        body, sampling = self.body, self.asked.arguments["sampling_params"]
        form = None if body.text is None or body.text.format is None else body.text.format
        return {
            "id": self.asked.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.state.model_name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "store": body.store is not False,
            "temperature": sampling.get("temperature", 1.0),
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": _plain(body.tool_choice) or "auto",
            "tools": [_shown(tool) for tool in body.tools or ()],
            "top_p": sampling.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
        }


def _shown(tool: ResponseTool) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(tool)
    return {"strict": None, "parameters": None, **plain} if isinstance(tool, FunctionTool) else plain


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else value.model_dump(exclude_none=True)


def _status(result: Result) -> str:
    return "incomplete" if result["meta_info"]["finish_reason"]["type"] == "length" else "completed"

"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.errors import RequestError
from rootcellar.server.answer import EventStream, Stream, begin, named_event, require_room, whole
from rootcellar.server.anthropic import answers
from rootcellar.server.anthropic.blocks import Mark, chat_of
from rootcellar.server.anthropic.errors import AnthropicRoute, event
from rootcellar.server.anthropic.protocol import CountRequest, MessagesRequest
from rootcellar.server.callers import caller_of
from rootcellar.server.errors import json_response
from rootcellar.server.hinting import keep
from rootcellar.server.openai.chat import Asked, chat_tokens, for_template, prompt_tokens, read_chat_request
from rootcellar.server.openai.choices import Sent
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.parts import images_of
from rootcellar.server.openai.protocol import ChatRequest
from rootcellar.server.openai.speaker import Speaker
from rootcellar.server.prompts import rendered
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=AnthropicRoute, tags=["Anthropic"])


@router.post("/v1/messages")
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    state.require_model(body.model)
    require_room(request, state, "", 1)
    chat, marks = chat_of(body)
    with openai_names(chat.form_names, max_new_tokens="max_tokens"):
        asked = await read_chat_request(state, chat, caller_of(request).name, prefix="msg")
        keeps = await _keeps(state, chat, asked, marks)
        job = _Messages(request, state, asked, keeps)
        if not body.stream:
            return await job.answer()
        stream = await begin(request, state, **asked.arguments)
        return EventStream(stream, job.events(stream), failed=event, end=b"")


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """How many tokens the prompt has."""
    state = state_of(request)
    state.require_model(body.model)
    chat, _ = chat_of(body)
    prompts = await chat_tokens(state, chat)
    sources = images_of(chat.messages)
    pictures = await state.images.read(sources, caller_of(request).name) if sources else []
    return json_response({"input_tokens": prompt_tokens(state, prompts, pictures)})


async def _keeps(state: ServerState, chat: ChatRequest, asked: Asked, marks: list[Mark]) -> list[tuple[int, float]]:
    """How many tokens of the prompt are to be kept, and for how many seconds: the longest for each time."""
    last = {mark.seconds: mark.messages for mark in sorted(marks, key=lambda mark: mark.messages)}
    ids = asked.prompts.input_ids
    if state.engine.image_token in ids:  # what stands for an image in the cache is no token: what comes before is kept
        ids = ids[: ids.index(state.engine.image_token)]
    turns, options = for_template(chat.messages, chat)
    found = []
    for seconds, count in last.items():
        if count == len(turns):
            found.append((len(ids), seconds))
            continue
        # What a template writes of the beginning is what two conversations with that beginning have in common.
        other = [*turns[:count], {"role": "user", "content": "."}]
        try:
            start = (await rendered(state, other, **{**options, "continue_final_message": False})).ids
        except RequestError:  # a template that wants no such conversation
            continue
        differs = (i for i, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b)
        found.append((next(differs, min(len(ids), len(start))), seconds))
    return found


@dataclass
class _Messages:
    """One request. ``keeps``: tokens of the prompt to keep, and for how many seconds."""

    request: Request
    state: ServerState
    asked: Asked
    keeps: list[tuple[int, float]]

    async def answer(self) -> Response:
        """The whole answer."""
        (result,) = await whole(self.request, self.state, **self.asked.arguments)
        await self._keep()
        speaker = Speaker(self.asked.reading, "toolu_")
        writer = answers.BlockWriter(speaker)
        for _ in itertools.chain(writer.write(speaker.events(result["text"], ended=True)), writer.close()):
            pass
        head = answers.message(self.asked.id, self.state.model_name, writer.content)
        return json_response({**head, **answers.stop(result, speaker), "usage": answers.usage(result, self._kept)})

    async def events(self, stream: Stream) -> AsyncGenerator[bytes]:
        """The answer as it is made."""
        speaker = Speaker(self.asked.reading, "toolu_")
        writer, sent = answers.BlockWriter(speaker), Sent()
        begun = False
        async for result in stream.results():
            if not begun:
                begun = True
                head = answers.message(self.asked.id, self.state.model_name, [])
                told = {"stop_reason": None, "stop_sequence": None, "usage": answers.usage(result, self._kept)}
                yield named_event({"type": "message_start", "message": {**head, **told}})
            ended = result["meta_info"]["finish_reason"] is not None
            for each in writer.write(speaker.events(sent.text(result), ended=ended)):
                yield each
            if ended:
                for each in writer.close():
                    yield each
                used = answers.usage(result, self._kept)
                yield named_event({"type": "message_delta", "delta": answers.stop(result, speaker), "usage": used})
        await self._keep()
        yield named_event({"type": "message_stop"})

    @property
    def _kept(self) -> int:
        return max((tokens for tokens, _ in self.keeps), default=0)

    async def _keep(self) -> None:
        """Keep of the prompt what is to be kept, as far as there is room."""
        for tokens, seconds in self.keeps:
            ids = self.asked.prompts.input_ids[:tokens]
            await keep(self.request, self.state, ids, seconds, self.asked.arguments)

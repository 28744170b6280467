"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.media import Picture
from rootcellar.server.answer import Result, require_room
from rootcellar.server.callers import caller_of
from rootcellar.server.errors import invalid
from rootcellar.server.openai.extras import Extras
from rootcellar.server.openai.job import OpenAIJob
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.parts import images_of
from rootcellar.server.openai.protocol import ChatMessage, ChatRequest, Rendering, message_for_template
from rootcellar.server.openai.speaker import Speaker
from rootcellar.server.prompts import Prompts, read_chat
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of
from rootcellar.server.tools import Listening, listening
from rootcellar.server.tools import for_template as tools_for_template
from rootcellar.text import Tokenizer

router = APIRouter(route_class=UserRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    state.require_model(body.model)
    require_room(request, state, "", body.n or 1)
    with openai_names(body.form_names, max_new_tokens="max_completion_tokens", min_new_tokens="min_tokens"):
        job = await _Chat.of(body, state, caller_of(request).name)
        return await job.answer(request, state, body)


# What ``chat_template_kwargs`` cannot name: fields of their own, and what is refused.
_RESERVED = {"messages", "add_generation_prompt", "continue_final_message", "reasoning_effort", "tools", "documents"}


def for_template(messages: list[ChatMessage], how: Rendering) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a conversation, and how they are rendered, as ``read_chat`` takes them."""
    variables = dict(how.chat_template_kwargs or {})
    reserved = _RESERVED.intersection(variables)
    if reserved:
        raise invalid(f"chat_template_kwargs must not name {min(reserved)}", "chat_template_kwargs")
    going_on = bool(how.continue_final_message)
    if going_on and how.add_generation_prompt:
        raise invalid(
            "continue_final_message and add_generation_prompt exclude each other: the one goes on with the last "
            "message, the other begins a new one",
            "continue_final_message",
        )
    if going_on and messages[-1].get("content") is None:
        raise invalid("continue_final_message needs a last message whose content is a text", "continue_final_message")
    if how.reasoning_effort is not None:
        variables["reasoning_effort"] = how.reasoning_effort
    options = {
        "add_generation_prompt": how.add_generation_prompt,
        "continue_final_message": going_on,
        "variables": variables,
        "tools": tools_for_template(how.tools),
    }
    return [message_for_template(message) for message in messages], options


async def chat_tokens(state: ServerState, body: ChatRequest) -> Prompts:
    """The token ids of a conversation."""
    messages, options = for_template(body.messages, body)
    return await read_chat(state, messages, n=body.n or 1, **options)


def answer_limit(state: ServerState, body: ChatRequest, tokens: int) -> int:
    """Most tokens of the answer to a chat of so many: what was asked for, or else what is left of the context."""
    limit = body.limit()
    return max(1, state.engine.longest_prompt + 1 - tokens) if limit is None else limit


def chat_listening(state: ServerState, body: ChatRequest, prompts: Prompts) -> Listening:
    """How the answers to a chat are read."""
    return listening(
        state.formats,
        body.tools,
        body.tool_choice,
        prompt=(prompts.texts or [""])[0],
        parallel=body.parallel_tool_calls is not False,
        thoughts=body.separate_reasoning is not False,
        show_thoughts=body.include_reasoning is not False,
        skips_special=body.skip_special_tokens is not False,
        has_form=bool(body.grammar()),
    )


@dataclass(frozen=True)
class Asked:
    """A conversation as the engine is asked for its answer, whoever's form it came in.

    ``id``: the request's name; ``arguments`` of ``Engine.generate``; ``reading``: how its answers are read.
    """

    id: str
    prompts: Prompts
    arguments: dict[str, Any]
    reading: Listening


def prompt_tokens(state: ServerState, prompts: Prompts, pictures: Sequence[Picture]) -> int:
    """How many tokens the prompt of a chat has as it is computed, what stands for its prepared pictures included."""
    encoder = state.engine.encoder
    sizes = [] if encoder is None else [encoder.size(picture.pixels) for picture in pictures]
    return len(prompts.input_ids) + sum(sizes) - len(sizes)


async def read_chat_request(
    state: ServerState, body: ChatRequest, tenant: str, top: int | None = None, prefix: str = "chatcmpl"
) -> Asked:
    """Read what ``tenant`` sent; ``top`` as for ``Sampling.arguments``, ``prefix`` as for ``Sampling.name``."""
    prompts = await chat_tokens(state, body)
    sources = images_of(body.messages)
    pictures = await state.images.read(sources, tenant) if sources else []
    most = body.limit() or answer_limit(state, body, prompt_tokens(state, prompts, pictures))
    name = body.name(prefix)
    arguments = {"input_ids": prompts.input_ids, "rid": name, **body.arguments(most, top, state.sampling)}
    if pictures:
        arguments["image_data"] = pictures
    how = chat_listening(state, body, prompts)
    arguments["sampling_params"] |= how.sampling
    return Asked(name, prompts, arguments, how)


@dataclass(kw_only=True)
class _Chat(OpenAIJob):
    object_name = "chat.completion"
    event_name = "chat.completion.chunk"
    in_choices = False

    tokenizer: Tokenizer
    echo: str
    """What every answer begins with."""
    reading: Listening
    _speakers: dict[int, Speaker] = field(default_factory=dict, init=False)

    @classmethod
    async def of(cls, body: ChatRequest, state: ServerState, tenant: str) -> _Chat:
        """Read ``body``, which ``tenant`` sent."""
        top = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        asked = await read_chat_request(state, body, tenant, top)
        prompts = asked.prompts
        last = body.messages[-1]
        shown = (message_for_template(last)["content"] or "") if body.echo and last["role"] == "assistant" else ""
        return cls(
            id=asked.id,
            model=state.model_name,
            n=body.n or 1,
            answers=body.n or 1,
            top=top,
            extras=Extras.of(body, prompts, prompt_ids=bool(body.return_prompt_token_ids)),
            arguments=asked.arguments,
            tokenizer=state.engine.tokenizer,
            echo=shown,
            reading=asked.reading,
        )

    async def choice(self, i: int, result: Result) -> dict[str, Any]:
        speaker = self._speaker(i)
        speaker.hear(self.sent(i).text(result), ended=True)
        return {"message": {**speaker.message(self.echo), "refusal": None}}

    async def delta(self, i: int, result: Result, first: bool) -> dict[str, Any]:
        """The role, then what is new."""
        speaker = self._speaker(i)
        ended = result["meta_info"]["finish_reason"] is not None
        delta = {"role": "assistant", "content": ""} if first else {}
        new = speaker.hear(self.sent(i).text(result), ended=ended)
        if first and self.echo:
            new["content"] = self.echo + new.get("content", "")
        return {"delta": delta | new}

    def finish(self, i: int, result: Result) -> dict[str, Any]:
        told = super().finish(i, result)
        return {**told, "finish_reason": "tool_calls"} if self._calls(i) and told["finish_reason"] == "stop" else told

    def _calls(self, i: int) -> bool:
        return i in self._speakers and bool(self._speakers[i].calls)

    def _speaker(self, i: int) -> Speaker:
        return self._speakers.setdefault(i, Speaker(self.reading))

    def logprobs(self, i: int, result: Result, top: int) -> dict[str, Any] | None:
        content = [
            {**self._entry(token), "top_logprobs": [self._entry(each) for each in row]}
            for token, row in zip(*self.sent(i).logprobs(result, top), strict=True)
        ]
        return {"content": content} if content else None

    def _entry(self, token: tuple[float, int, str]) -> dict[str, Any]:
        value, id, text = token
        return {"token": text, "logprob": value, "bytes": list(self.tokenizer.token_bytes(id))}

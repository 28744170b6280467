"""``POST /v1/chat/completions``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.engine.tokenizer import Tokenizer
from rootcellar.errors import RequestError
from rootcellar.server.answer import Result
from rootcellar.server.errors import invalid
from rootcellar.server.openai.job import Job
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.protocol import ChatRequest
from rootcellar.server.prompts import Prompts, read_prompts
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import State, state_of

router = APIRouter(route_class=UserRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    state.require_model(body.model)
    with openai_names(max_new_tokens="max_completion_tokens", min_new_tokens="min_tokens"):
        job = await _Chat.of(body, state)
        return await job.answer(request, state, body)


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


@dataclass(kw_only=True)
class _Chat(Job):
    object_name = "chat.completion"
    event_name = "chat.completion.chunk"

    tokenizer: Tokenizer

    @classmethod
    async def of(cls, body: ChatRequest, state: State) -> _Chat:
        _refuse_tools(body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        prompts = await chat_tokens(state, body)
        limit = body.limit()
        most = max(1, state.engine.longest_prompt + 1 - len(prompts.input_ids)) if limit is None else limit
        name = body.name("chatcmpl")
        return cls(
            id=name,
            model=state.model_name,
            n=body.n or 1,
            top=top,
            arguments={"input_ids": prompts.input_ids, "rid": name, **body.arguments(most, top)},
            tokenizer=state.engine.tokenizer,
        )

    async def choice(self, i: int, text: str) -> dict[str, Any]:  # noqa: ARG002
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    async def delta(self, i: int, text: str, first: bool) -> dict[str, Any]:  # noqa: ARG002
        """The role, then text."""
        delta = {"role": "assistant", "content": ""} if first else {}
        return {"delta": {**delta, "content": text} if text else delta}

    def logprobs(self, i: int, result: Result, top: int) -> dict[str, Any] | None:
        content = [
            {**self._entry(token), "top_logprobs": [self._entry(each) for each in row]}
            for token, row in zip(*self.sent(i).logprobs(result, top), strict=True)
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

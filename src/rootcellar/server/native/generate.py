"""``POST /generate``, and text to tokens and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.answer import EventStream, Result, Stream, begin, event_of, on_thread, whole
from rootcellar.server.errors import invalid, json_response
from rootcellar.server.fields import IGNORED, REFUSED
from rootcellar.server.native.protocol import GenerateRequest
from rootcellar.server.openai.chat import chat_text
from rootcellar.server.openai.protocol import Messages, Rendering
from rootcellar.server.parsing import Body
from rootcellar.server.prompts import read_prompts
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import state_of

router = APIRouter(route_class=UserRoute, tags=["SGLang"])


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue one prompt or several; with ``stream``, each event holds all text so far."""
    state = state_of(request)
    state.require_model(body.model)
    arguments = body.arguments()
    params = arguments["sampling_params"]
    n = max((_count(each) for each in (params if isinstance(params, list) else [params])), default=1)
    prompts = await read_prompts(state, body.text, body.input_ids, n)
    arguments["input_ids"] = prompts.input_ids
    show = _Shown(bool(body.return_text_in_logprobs), prompts.ids if body.return_prompt_token_ids else None, n)
    if body.stream:
        stream = await begin(request, state, **arguments)
        return EventStream(stream, _events(stream, show))
    results = await whole(request, state, **arguments)
    shown = [show.of(result, i) for i, result in enumerate(results)]
    return json_response(shown[0] if prompts.one and len(shown) == 1 else shown)


def _count(params: dict[str, Any]) -> int:
    n = params.get("n", 1)
    return n if isinstance(n, int) else 1  # the engine says what is wrong with another


async def _events(stream: Stream, show: _Shown) -> AsyncGenerator[bytes]:
    async for result in stream.results():
        yield event_of(show.of(result, result.get("index", 0)))


@dataclass(frozen=True)
class _Shown:
    """How SGLang shows a result: with each token's text, and with the prompt's token ids, where they are wanted."""

    texts: bool
    prompts: list[list[int]] | None
    n: int

    def of(self, result: Result, i: int) -> Result:
        """Result ``i`` of a request."""
        if self.prompts is not None:
            result = {**result, "prompt_token_ids": self.prompts[i // self.n]}
        meta = result["meta_info"]
        if self.texts or "output_token_logprobs" not in meta:
            return result
        plain = dict(meta)
        for name in ("output_token_logprobs", "input_token_logprobs"):
            if name in meta:
                plain[name] = [(value, token, None) for value, token, _ in meta[name]]
        for name in ("output_top_logprobs", "input_top_logprobs"):
            if name in meta:
                plain[name] = [row and [(value, token, None) for value, token, _ in row] for row in meta[name]]
        return {**result, "meta_info": plain}


class TokenizeRequest(Rendering):
    """What to tokenize: a text, several, or the messages of a chat."""

    ignored = IGNORED
    refused = REFUSED

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """Token ids to read."""

    model: str | None = None
    tokens: list[int] | list[list[int]]
    skip_special_tokens: bool = True


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text, of several, or of a chat."""
    state = state_of(request)
    state.require_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either a prompt (a text or a list of them) or messages, and not both", "prompt")
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    given = chat_text(state, body.messages, body) if body.messages is not None else body.prompt
    texts: list[str] = given if isinstance(given, list) else [given or ""]
    tokenizer = state.engine.tokenizer
    lists = await on_thread(lambda: [tokenizer.encode(text, special) for text in texts])
    counts = [len(ids) for ids in lists]
    content: dict[str, Any] = {"tokens": lists, "count": counts}
    if body.return_token_strs:
        content["token_strs"] = [[tokenizer.decode([id], False) for id in ids] for ids in lists]
    if not isinstance(given, list):
        content = {name: each[0] for name, each in content.items()}
    return json_response({**content, "max_model_len": state.engine.longest_prompt + 1})


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    state = state_of(request)
    state.require_model(body.model)
    tokenizer = state.engine.tokenizer
    one = not body.tokens or isinstance(body.tokens[0], int)
    lists: list[Any] = [body.tokens] if one else body.tokens
    if any(not 0 <= id < tokenizer.vocab_size for ids in lists for id in ids):
        raise invalid(f"tokens: ids of this model are 0 to {tokenizer.vocab_size - 1}", "tokens")
    texts = await on_thread(lambda: [tokenizer.decode(ids, body.skip_special_tokens) for ids in lists])
    shown = texts[0] if one else texts
    return json_response({"text": shown, "prompt": shown})  # SGLang's name, and vLLM's

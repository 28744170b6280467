"""``POST /generate``, and text to tokens and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.answer import EventStream, Result, Stream, begin, event_of, on_thread, whole
from rootcellar.server.errors import invalid, json_response
from rootcellar.server.native.protocol import GenerateRequest
from rootcellar.server.parsing import Body
from rootcellar.server.prompts import read_prompts
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import state_of

router = APIRouter(route_class=UserRoute, tags=["SGLang"])


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue one prompt or several; with ``stream``, each event holds all text so far."""
    state = state_of(request)
    arguments = body.arguments()
    params = arguments["sampling_params"]
    n = max((_count(each) for each in (params if isinstance(params, list) else [params])), default=1)
    prompts = await read_prompts(state, body.text, body.input_ids, n)
    arguments["input_ids"] = prompts.input_ids
    if body.stream:
        stream = await begin(request, state, **arguments)
        return EventStream(stream, _events(stream, bool(body.return_text_in_logprobs)))
    results = await whole(request, state, **arguments)
    shown = [_shown(result, bool(body.return_text_in_logprobs)) for result in results]
    return json_response(shown[0] if prompts.one and len(shown) == 1 else shown)


def _count(params: dict[str, Any]) -> int:
    n = params.get("n", 1)
    return n if isinstance(n, int) else 1  # the engine says what is wrong with another


async def _events(stream: Stream, texts: bool) -> AsyncGenerator[bytes]:
    async for result in stream.results():
        yield event_of(_shown(result, texts))


def _shown(result: Result, texts: bool) -> Result:
    """``result`` as SGLang shows it: without the text of each token, unless that was asked for."""
    meta = result["meta_info"]
    if texts or "output_token_logprobs" not in meta:
        return result
    plain = dict(meta)
    for name in ("output_token_logprobs", "input_token_logprobs"):
        if name in meta:
            plain[name] = [(value, token, None) for value, token, _ in meta[name]]
    for name in ("output_top_logprobs", "input_top_logprobs"):
        if name in meta:
            plain[name] = [row and [(value, token, None) for value, token, _ in row] for row in meta[name]]
    return {**result, "meta_info": plain}


class TokenizeRequest(Body):
    """Texts to tokenize."""

    prompt: str | list[str]
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """Token ids to read."""

    tokens: list[int] | list[list[int]]
    skip_special_tokens: bool = True


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text or of several."""
    state = state_of(request)
    tokenizer = state.engine.tokenizer
    one = isinstance(body.prompt, str)
    texts: list[str] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    lists = await on_thread(lambda: [tokenizer.encode(text, body.add_special_tokens) for text in texts])
    counts = [len(ids) for ids in lists]
    content = {"tokens": lists[0] if one else lists, "count": counts[0] if one else counts}
    return json_response({**content, "max_model_len": state.engine.longest_prompt + 1})


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    tokenizer = state_of(request).engine.tokenizer
    one = not body.tokens or isinstance(body.tokens[0], int)
    lists: list[Any] = [body.tokens] if one else body.tokens
    if any(not 0 <= id < tokenizer.vocab_size for ids in lists for id in ids):
        raise invalid(f"tokens: ids of this model are 0 to {tokenizer.vocab_size - 1}", "tokens")
    texts = await on_thread(lambda: [tokenizer.decode(ids, body.skip_special_tokens) for ids in lists])
    return json_response({"text": texts[0] if one else texts})

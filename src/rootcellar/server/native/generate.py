"""``POST /generate``, and text to tokens and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from orjson import Fragment
from starlette.responses import Response

from rootcellar.server.answer import EventStream, Result, begin, event_of, on_thread, require_room, whole
from rootcellar.server.callers import caller_of
from rootcellar.server.errors import invalid, json_bytes, json_response
from rootcellar.server.explaining import explanations, wants_explanation
from rootcellar.server.fields import IGNORED, ONLY_GENERATE, REFUSED
from rootcellar.server.hinting import check as check_hints_of
from rootcellar.server.hinting import taken
from rootcellar.server.native.protocol import GenerateRequest
from rootcellar.server.openai.chat import for_template
from rootcellar.server.openai.protocol import Messages, Rendering
from rootcellar.server.parsing import Body
from rootcellar.server.prompts import detokenize as read_ids
from rootcellar.server.prompts import read_prompts, rendered, require_images
from rootcellar.server.prompts import tokenize as read_texts
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of
from rootcellar.server.writing import PIECE, as_list, dumps, entries, logprobs_of, written

router = APIRouter(route_class=UserRoute, tags=["SGLang"])


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue one prompt or several; with ``stream``, each event holds all text so far."""
    state = state_of(request)
    state.require_model(body.model)
    arguments = body.arguments()
    params = arguments["sampling_params"]
    n = max((_count(each) for each in (params if isinstance(params, list) else [params])), default=1)
    require_room(request, state, body.text if body.input_ids is None else body.input_ids, n)
    prompts = await read_prompts(state, body.text, body.input_ids, n)
    arguments["input_ids"] = prompts.input_ids
    images = body.images(len(prompts.ids), one=prompts.one)
    if any(images):
        require_images(state, "image_data")
        read = await state.images.read([each for some in images for each in some], caller_of(request).name)
        pictures = iter(read)
        listed = [[next(pictures) for _ in some] for some in images]
        arguments["image_data"] = listed[0] if prompts.one else listed
    arguments["return_text_in_logprobs"] = bool(body.return_text_in_logprobs)
    ids = prompts.ids if body.return_prompt_token_ids else None
    check_hints_of(request, state, body.cache_hints, arguments, n)
    extras = _Extras(request, state, arguments, wants_explanation(request, state, body.explain), body.cache_hints)
    if body.stream:
        stream = await begin(request, state, **arguments)
        return EventStream(stream, _events(extras.beside(stream.results()), ids, n))
    results = [await extras.to(result) for result in await whole(request, state, **arguments)]
    shown = [_shown(result, i // n, ids) for i, result in enumerate(results)]
    content = shown[0] if prompts.one and len(shown) == 1 else shown
    return json_bytes(await written(logprobs_of(results), lambda: dumps(content)))


def _count(params: dict[str, Any]) -> int:
    n = params.get("n", 1)
    return n if isinstance(n, int) else 1  # the engine says what is wrong with another


@dataclass(frozen=True)
class _Extras:
    """What stands in an answer's ``meta_info`` when it has ended, for those who ask for it."""

    request: Request
    state: ServerState
    arguments: dict[str, Any]
    explain: bool
    hints: dict[str, Any] | None

    async def to(self, result: Result) -> Result:
        """``result``, which has ended, with what was asked for."""
        meta = dict(result["meta_info"])
        if self.explain:
            meta["explanation"] = (await explanations(self.request, self.state, [result]))[0]
        if self.hints is not None:
            meta["cache_hints"] = await taken(self.request, self.state, self.hints, self.arguments, result)
        return {**result, "meta_info": meta}

    async def beside(self, results: AsyncGenerator[Result]) -> AsyncGenerator[Result]:
        """``results`` of a stream, the last of each answer with what was asked for."""
        async for result in results:
            ended = result["meta_info"]["finish_reason"] is not None
            yield await self.to(result) if ended else result


async def _events(results: AsyncGenerator[Result], ids: list[list[int]] | None, n: int) -> AsyncGenerator[bytes]:
    growing: dict[int, _Growing] = {}
    async for result in results:
        i = result.get("index", 0)
        event = _shown(result, i // n, ids)
        if "output_token_logprobs" in result["meta_info"]:
            event = await growing.setdefault(i, _Growing()).event(event)
        yield event_of(event)


def _shown(result: Result, prompt: int, ids: list[list[int]] | None) -> Result:
    """How SGLang shows a result: with the prompt's token ids, where they are wanted."""
    return result if ids is None else {**result, "prompt_token_ids": ids[prompt]}


class _Growing:
    """The logprobs of one answer in a stream, each of whose events holds all so far: each is written once.

    Those of the prompt are in the first event and in the last.
    """

    def __init__(self) -> None:
        self._written: dict[str, list[bytes]] = {}
        self._entries: dict[str, int] = {}

    async def event(self, result: Result) -> Result:
        """``result``, its logprobs written."""
        meta = result["meta_info"]
        first = not self._written
        told = {
            name: rows
            for name, rows in meta.items()
            if name.endswith("_logprobs") and (first or meta["finish_reason"] or not name.startswith("input_"))
        }
        new = logprobs_of([{"meta_info": {name: rows[self._entries.get(name, 0) :] for name, rows in told.items()}}])
        lists = await written(new, lambda: {name: self._list(name, rows) for name, rows in told.items()})
        others = {name: value for name, value in meta.items() if not name.endswith("_logprobs")}
        return {**result, "meta_info": {**others, **lists}}

    def _list(self, name: str, rows: list[Any]) -> Fragment:
        before = self._entries.get(name, 0)
        pieces = self._written.setdefault(name, [])
        pieces += [entries(rows[i : i + PIECE]) for i in range(before, len(rows), PIECE)]
        self._entries[name] = len(rows)
        return as_list(pieces)


class TokenizeRequest(Rendering):
    """What to tokenize: a text, several, or the messages of a chat."""

    ignored = IGNORED
    refused = {**REFUSED, **ONLY_GENERATE}  # noqa: RUF012

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
    tokenizer = state.engine.tokenizer
    if body.messages is not None:
        messages, options = for_template(body.messages, body)
        chat = await rendered(state, messages, **options)
        lists = await read_texts(state, [chat.text], True) if body.add_special_tokens else [chat.ids]
    else:
        texts: list[str] = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
        lists = await read_texts(state, texts, body.add_special_tokens is not False)
    counts = [len(ids) for ids in lists]
    content: dict[str, Any] = {"tokens": lists, "count": counts}
    if body.return_token_strs:
        content["token_strs"] = await on_thread(lambda: [[tokenizer.token_text(id) for id in ids] for ids in lists])
    if not isinstance(body.prompt, list):
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
    texts = await read_ids(state, lists, body.skip_special_tokens)
    shown = texts[0] if one else texts
    return json_response({"text": shown, "prompt": shown})  # SGLang's name, and vLLM's

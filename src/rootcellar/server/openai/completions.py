"""``POST /v1/completions``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.answer import Result, require_room
from rootcellar.server.errors import invalid
from rootcellar.server.openai.extras import Extras
from rootcellar.server.openai.job import OpenAIJob
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.protocol import MOST_LOGPROBS, CompletionRequest
from rootcellar.server.prompts import Prompts, read_prompts, texts_of
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of
from rootcellar.text import Offsets

router = APIRouter(route_class=UserRoute, tags=["OpenAI"])


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    state = state_of(request)
    state.require_model(body.model)
    require_room(request, state, body.prompt, body.n or 1)
    with openai_names(body.form_names, max_new_tokens="max_tokens", min_new_tokens="min_tokens"):
        job = await _Completion.of(body, state)
        return await job.answer(request, state, body)


async def completion_prompts(state: ServerState, body: CompletionRequest) -> Prompts:
    """The prompts of a completion."""
    texts, ids = _split(body.prompt)
    return await read_prompts(state, texts, ids, body.n or 1, add_special_tokens=body.add_special_tokens)


@dataclass(kw_only=True)
class _Completion(OpenAIJob):
    """``echo``: the answer begins with its prompt."""

    object_name = event_name = "text_completion"
    in_choices = True

    state: ServerState
    prompts: Prompts
    echo: bool
    skip_special_tokens: bool
    _echoes: list[str] = field(default_factory=list, init=False)
    _offsets: dict[int, Offsets] = field(default_factory=dict, init=False)

    @classmethod
    async def of(cls, body: CompletionRequest, state: ServerState) -> _Completion:
        n = body.n or 1
        if body.logprobs is not None and not 0 <= body.logprobs <= MOST_LOGPROBS:
            raise invalid(f"logprobs must be from 0 to {MOST_LOGPROBS}", "logprobs")
        top, echo = body.logprobs, bool(body.echo)
        prompts = await completion_prompts(state, body)
        name = body.name("cmpl")
        arguments = {
            "input_ids": prompts.input_ids,
            "rid": name,
            **body.arguments(body.limit(), top, state.sampling),
        }
        if echo and top is not None:
            arguments["logprob_start_len"] = 0
        return cls(
            id=name,
            model=state.model_name,
            n=n,
            answers=n * len(prompts.ids),
            top=top,
            extras=Extras.of(body, prompts),
            arguments=arguments,
            state=state,
            prompts=prompts,
            echo=echo,
            skip_special_tokens=body.skip_special_tokens is not False,
        )

    async def choice(self, i: int, result: Result) -> dict[str, Any]:
        return await self.delta(i, result, first=True)

    async def delta(self, i: int, result: Result, first: bool) -> dict[str, Any]:
        text = self.sent(i).text(result)
        if not (self.echo and first):
            return {"text": text}
        # The engine has taken the prompts by now, so their ids can be read.
        self._echoes = self._echoes or await texts_of(self.state, self.prompts)
        return {"text": self._echoes[i // self.n] + text}

    def logprobs(self, i: int, result: Result, top: int) -> dict[str, Any] | None:
        tokens, others = self.sent(i).logprobs(result, top)
        ids = self.prompts.ids[i // self.n]
        offsets = []
        if i not in self._offsets:
            self._offsets[i] = Offsets(self.state.engine.tokenizer, self.skip_special_tokens)
            if self.echo:
                offsets = self._offsets[i].prompt(ids, self._echoes[i // self.n])
        offsets += self._offsets[i].answer([id for _, id, _ in tokens], ids)
        if len(offsets) > len(tokens):
            meta = result["meta_info"]
            tokens = meta["input_token_logprobs"] + tokens
            rows = meta["input_top_logprobs"] if top else [[] for _ in meta["input_token_logprobs"]]
            others = [row and row[:top] for row in rows] + others
        if not tokens:
            return None
        return {
            "tokens": [text for _, _, text in tokens],
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

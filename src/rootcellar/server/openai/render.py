"""``POST /v1/completions/render`` and ``/v1/chat/completions/render``: what a request becomes, without computing it.

vLLM's routes and vLLM's form: routers that count on prefixes ask for a prompt's token ids before they choose a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.errors import RequestTooLarge
from rootcellar.sampling_params import SamplingParams
from rootcellar.server.errors import invalid, json_response
from rootcellar.server.openai.chat import answer_limit, chat_listening, chat_tokens
from rootcellar.server.openai.completions import completion_prompts
from rootcellar.server.openai.names import openai_names
from rootcellar.server.openai.protocol import ChatRequest, CompletionRequest, Sampling
from rootcellar.server.prompts import checked_ids
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=UserRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions/render")
async def render_chat(body: ChatRequest, request: Request) -> Response:
    """The token ids and the sampling parameters that a chat would be computed with."""
    state = state_of(request)
    state.require_model(body.model)
    with openai_names(body.form_names, max_new_tokens="max_completion_tokens", min_new_tokens="min_tokens"):
        prompts = await chat_tokens(state, body)
        limit = answer_limit(state, body, len(prompts.input_ids))
        top = (body.top_logprobs or 0) if body.logprobs else None
        bound = chat_listening(state, body, prompts).sampling
        return json_response(_rendered(state, body, body.name("chatcmpl"), prompts.input_ids, limit, top, bound))


@router.post("/v1/completions/render")
async def render_completion(body: CompletionRequest, request: Request) -> Response:
    """The same of each prompt of a completion, in a list."""
    state = state_of(request)
    state.require_model(body.model)
    with openai_names(body.form_names, max_new_tokens="max_tokens", min_new_tokens="min_tokens"):
        prompts = await completion_prompts(state, body)
        name = body.name("cmpl")
        names = [name] if len(prompts.ids) == 1 else [f"{name}-{i}" for i in range(len(prompts.ids))]
        return json_response(
            [
                _rendered(state, body, each, ids, body.limit(), body.logprobs)
                for each, ids in zip(names, prompts.ids, strict=True)
            ]
        )


def _rendered(
    state: ServerState,
    body: Sampling,
    name: str,
    ids: list[Any],
    limit: int,
    top: int | None,
    bound: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """vLLM's ``GenerateRequest``. Raises as the request itself would, but for grammars, which are not compiled."""
    if not checked_ids(state, ids):
        raise invalid("the prompt is empty: give at least one token")
    given = body.arguments(limit, top, state.sampling)["sampling_params"] | bound
    sampling = SamplingParams.from_dict(given)
    room = state.engine.longest_prompt + 1 - len(ids)
    if sampling.max_new_tokens > room:
        raise RequestTooLarge(
            f"{len(ids)} prompt tokens and max_new_tokens={sampling.max_new_tokens} are more than this server's "
            f"{state.engine.longest_prompt + 1}: lower max_new_tokens to {room}"
        )
    if body.n is not None and body.n > state.config.max_n:
        raise invalid(f"n={body.n} is more than this server allows: max_n is {state.config.max_n}", "n")
    grammar = sampling.grammar
    return {
        "request_id": name,
        "token_ids": ids,
        "features": None,  # of images; there are none
        "sampling_params": {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "logit_bias": dict(sampling.logit_bias) or None,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": sampling.ignore_eos,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "logprobs": top,
            "prompt_logprobs": body.prompt_logprobs,
            "skip_special_tokens": sampling.skip_special_tokens,
            "spaces_between_special_tokens": sampling.spaces_between_special_tokens,
            "include_stop_str_in_output": sampling.no_stop_trim,
            "structured_outputs": None if grammar is None else {_VLLM[grammar]: getattr(sampling, grammar)},
        },
        "model": state.model_name,
        "stream": bool(body.stream),
        "stream_options": body.stream_options.model_dump() if body.stream and body.stream_options else None,
        "cache_salt": body.cache_salt,
        "priority": body.priority or 0,
    }


_VLLM = {"json_schema": "json", "regex": "regex", "ebnf": "grammar", "structural_tag": "structural_tag"}

"""What vLLM's and SGLang's clients may ask for beside an answer: token ids, logprobs of the prompt, cached tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rootcellar.server.answer import Result
from rootcellar.server.openai.protocol import Sampling
from rootcellar.server.prompts import Prompts


@dataclass(frozen=True)
class Extras:
    """What one request asked for.

    Attributes:
        prompt_ids: the token ids of each prompt; None: they are not wanted.
        token_ids: those of the answers are wanted.
        prompt_logprobs: how many of the likeliest tokens are shown at each place of the prompt; None: nothing.
        cached_details: a stream says which tier the cached tokens came from, whether or not it says what it used.
    """

    prompt_ids: list[list[int]] | None = None
    token_ids: bool = False
    prompt_logprobs: int | None = None
    cached_details: bool = False

    @classmethod
    def of(cls, body: Sampling, prompts: Prompts, *, prompt_ids: bool = False) -> Extras:
        """What ``body`` asks for; ``prompt_ids``: those of the prompts in any case."""
        ids = bool(body.return_token_ids)
        return cls(
            prompt_ids=prompts.ids if ids or prompt_ids else None,
            token_ids=ids,
            prompt_logprobs=body.prompt_logprobs,
            cached_details=bool(body.return_cached_tokens_details),
        )

    def of_prompt(self, i: int, result: Result) -> dict[str, Any]:
        """What was asked for of prompt ``i``, as vLLM writes it; ``result``: one of its answers."""
        found: dict[str, Any] = {}
        if self.prompt_ids is not None:
            found["prompt_token_ids"] = self.prompt_ids[i]
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = _prompt_logprobs(result["meta_info"], self.prompt_logprobs)
        return found


def _prompt_logprobs(meta: dict[str, Any], k: int) -> list[dict[str, Any] | None]:
    """For each token of a prompt: it and the ``k`` likeliest at its place, by id. Nothing comes before the first one.

    ``rank`` counts from 1; a token that is not among the likeliest has none.
    """
    tokens = meta["input_token_logprobs"]
    rows = meta["input_top_logprobs"] if k else [[] for _ in tokens]
    found: list[dict[str, Any] | None] = []
    for (value, id, text), row in zip(tokens, rows, strict=True):
        if value is None:
            found.append(None)
            continue
        entries = {str(id): {"logprob": value, "rank": None, "decoded_token": text}}
        for rank, (other, name, shown) in enumerate(row[:k], 1):
            entries[str(name)] = {"logprob": other, "rank": rank, "decoded_token": shown}
        found.append(entries)
    return found

"""What answers to completions and to chats have in common: usage, finish reasons, what a stream has sent already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rootcellar.server.answer import Result


def usage(results: Sequence[Result], n: int) -> dict[str, Any]:
    """Tokens of all prompts (each counted once, whatever its number ``n`` of answers) and of all answers."""
    prompts = [result["meta_info"] for result in results[::n]]
    prompt = sum(meta["prompt_tokens"] for meta in prompts)
    completion = sum(result["meta_info"]["completion_tokens"] for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(meta["cached_tokens"] for meta in prompts)},
    }


def extension(results: Sequence[Result], n: int) -> dict[str, Any]:
    """SGLang's extension of an answer: which tier the cached tokens of the prompts came from."""
    tiers: dict[str, int] = {}
    for result in results[::n]:
        for tier, tokens in result["meta_info"]["cached_tokens_details"].items():
            tiers[tier] = tiers.get(tier, 0) + tokens
    return {"cached_tokens_details": tiers}


def finish(result: Result) -> dict[str, Any]:
    """``finish_reason`` of a choice, and what matched."""
    reason = result["meta_info"]["finish_reason"]
    if reason is None:
        return {"finish_reason": None}
    return {"finish_reason": reason["type"], "matched_stop": reason.get("matched")}


@dataclass
class Sent:
    """How much of one choice a stream has sent: characters, tokens as logprobs, tokens as ids."""

    characters: int = 0
    tokens: int = 0
    ids: int = 0

    def text(self, result: Result) -> str:
        """The text that is new in ``result``."""
        text: str = result["text"][self.characters :]
        self.characters += len(text)
        return text

    def token_ids(self, result: Result) -> list[int]:
        """The token ids that are new in ``result``."""
        new: list[int] = result["output_ids"][self.ids :]
        self.ids += len(new)
        return new

    def logprobs(self, result: Result, top: int) -> tuple[list[Any], list[Any]]:
        """The logprobs that are new in ``result``: of the tokens, and (``top`` > 0) of the likeliest beside each."""
        meta = result["meta_info"]
        tokens = meta["output_token_logprobs"][self.tokens :]
        # There may be more of them than are shown here: a prompt's are counted apart.
        others = [row[:top] for row in meta["output_top_logprobs"][self.tokens :]] if top else [[] for _ in tokens]
        self.tokens += len(tokens)
        return tokens, others

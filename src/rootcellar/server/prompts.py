"""From what a client sent to token ids, within the server's limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from rootcellar.errors import RequestTooLarge
from rootcellar.server.errors import invalid
from rootcellar.server.state import State

# Characters that are tokenized on the event loop; more go to a thread, so that nobody else waits.
_SHORT = 10_000


@dataclass(frozen=True)
class Prompts:
    """The prompts of one request.

    ``ids``: for each its token ids, as they were sent or tokenized; ``texts``: for each its text, where it came as one.
    ``one``: the request was for one prompt, not for a list.
    """

    ids: list[Any]
    texts: list[str] | None
    one: bool

    @property
    def input_ids(self) -> list[Any]:
        """As ``Engine.generate`` wants them."""
        return self.ids[0] if self.one else self.ids


async def read_prompts(
    state: State,
    texts: str | list[str] | None,
    ids: list[Any] | None,
    n: int = 1,
    *,
    add_special_tokens: bool = True,
) -> Prompts:
    """Tokenize texts, with or without special tokens around them, or take token ids; exactly one of them is given.

    Refuses too many prompts, too many answers (``n``) and prompts that are too long. A text that cannot be short enough
    is not tokenized: no token stands for more than ``longest_token`` characters. Ids are checked by the engine.
    """
    if (texts is None) == (ids is None):
        raise invalid("give either a text or token ids (input_ids), and not both")
    if texts == []:
        raise invalid("the list of prompts is empty: give at least one")
    if n > state.config.max_n:
        raise invalid(f"n={n} is more than this server allows: max_n is {state.config.max_n}", "n")
    one = isinstance(texts, str) or not (texts or (ids and isinstance(ids[0], list)))
    given: list[Any] = [texts if ids is None else ids] if one else (texts if ids is None else ids)  # type: ignore[assignment]
    if len(given) > state.config.max_batch_size:
        raise invalid(
            f"{len(given)} prompts in one request: send at most {state.config.max_batch_size} (max_batch_size)"
        )
    if ids is None:
        limit = state.longest_prompt * state.engine.tokenizer.longest_token
        for i, text in enumerate(given):
            if len(text) > limit:
                raise RequestTooLarge(f"prompt {i} has {len(text)} characters; none above {limit} can fit this server")
        tokens = await tokenize(state, given, add_special_tokens=add_special_tokens)
    else:
        tokens = given
    for i, each in enumerate(tokens):
        if isinstance(each, list) and len(each) > state.longest_prompt:
            raise RequestTooLarge(f"prompt {i} has {len(each)} tokens; this server takes {state.longest_prompt}")
    return Prompts(tokens, given if ids is None else None, one)


def checked_ids(state: State, ids: list[Any]) -> list[int]:
    """The token ids of one prompt, which no engine is asked to check; ``ApiError`` when one of them is none."""
    vocab = state.engine.vocab_size
    if not all(type(token) is int and 0 <= token < vocab for token in ids):
        raise invalid(f"input_ids must be integers from 0 to {vocab - 1}", "input_ids")
    return ids


async def tokenize(state: State, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text."""

    def encode() -> list[list[int]]:
        if add_special_tokens:
            return [state.engine.encode(text) for text in texts]
        return [state.engine.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    return await asyncio.to_thread(encode) if sum(map(len, texts)) > _SHORT else encode()


async def texts_of(state: State, prompts: Prompts) -> list[str]:
    """The prompts as text: what came, or the token ids decoded (they were checked before)."""
    if prompts.texts is not None:
        return prompts.texts
    return await asyncio.to_thread(lambda: [state.engine.tokenizer.decode(each) for each in prompts.ids])

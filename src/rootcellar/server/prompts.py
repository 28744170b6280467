"""From what a client sent to token ids and back, within the server's limits: the one place that tokenizes for it.

What is short is read at once, on the event loop. All else is read in a process of its own (``text/reader.py``): a
tokenizer works for seconds on a text of megabytes, a chat template may never end, and everybody else would wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from rootcellar.errors import RequestTooLarge
from rootcellar.server.errors import invalid
from rootcellar.server.state import ServerState
from rootcellar.text import Chat, TemplateTimeout
from rootcellar.text.reader import SHORT, is_short

# What a template may take of the event loop's time before it is begun anew elsewhere.
_AT_ONCE = 0.02


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
    state: ServerState,
    texts: str | list[str] | None,
    ids: list[Any] | None,
    n: int = 1,
    *,
    add_special_tokens: bool = True,
) -> Prompts:
    """Tokenize texts, with or without special tokens around them, or take token ids; exactly one of them is given.

    Refuses too many prompts, too many answers (``n``) and prompts that are too long. Ids are checked by the engine.
    """
    if (texts is None) == (ids is None):
        raise invalid("give either a text or token ids (input_ids), and not both")
    if texts == []:
        raise invalid("the list of prompts is empty: give at least one")
    one = isinstance(texts, str) or not (texts or (ids and isinstance(ids[0], list)))
    given: list[Any] = [texts if ids is None else ids] if one else (texts if ids is None else ids)  # type: ignore[assignment]
    if len(given) > state.config.max_batch_size:
        raise invalid(
            f"{len(given)} prompts in one request: send at most {state.config.max_batch_size} (max_batch_size)"
        )
    _require_answers(state, n)
    around = None if add_special_tokens else False
    tokens = await tokenize(state, given, around) if ids is None else given
    for i, each in enumerate(tokens):
        if isinstance(each, list):
            _require_room(state, each, f"prompt {i}")
    return Prompts(tokens, given if ids is None else None, one)


async def read_chat(
    state: ServerState,
    messages: Sequence[Mapping[str, Any]],
    *,
    n: int = 1,
    **options: Any,
) -> Prompts:
    """The prompt that a conversation becomes by the model's template; ``options`` as for :func:`rendered`.

    Refuses what ``read_prompts`` does.
    """
    _require_answers(state, n)
    chat = await rendered(state, messages, **options)
    _require_room(state, chat.ids, "the conversation")
    return Prompts([chat.ids], [chat.text], True)


async def rendered(state: ServerState, messages: Sequence[Mapping[str, Any]], **options: Any) -> Chat:
    """A conversation by the model's template; ``options``: those of ``Tokenizer.chat`` that say how.

    Its token ids are those of the template's text with nothing put around, and special tokens in it are the template's
    (``allow_special_tokens_in_content``).
    """
    if any(isinstance(message.get("content"), list) for message in messages):
        require_images(state, "messages")
    tokenizer = state.engine.tokenizer
    allowed = state.config.allow_special_tokens_in_content
    if _is_short(messages, options) and (allowed or not tokenizer.markers.within(messages, options)):
        try:
            return tokenizer.chat(messages, seconds=_AT_ONCE, allow_special_tokens=allowed, **options)
        except TemplateTimeout:
            pass
    return await asyncio.wrap_future(state.reader.chat(messages, allow_special_tokens=allowed, **options))


def require_images(state: ServerState, name: str) -> None:
    """``ApiError``: the model knows no images, and the field ``name`` has some."""
    if state.engine.image_token is None:
        raise invalid(f"{name}: {state.model_name} is a model that knows no images: send text", name)


def _is_short(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> bool:
    """Whether a template makes a short text of them: it may write numbers, as those of a tool's schema, too."""
    # Its bytes first: they are counted in no time, whatever there is to look for texts in.
    return len(orjson.dumps((messages, options))) <= 4 * SHORT and is_short((messages, options))


def checked_ids(state: ServerState, ids: list[Any]) -> list[int]:
    """The token ids of one prompt, which no engine is asked to check; ``ApiError`` when one of them is none."""
    vocab = state.engine.vocab_size
    if not all(type(token) is int and 0 <= token < vocab for token in ids):
        raise invalid(f"input_ids must be integers from 0 to {vocab - 1}", "input_ids")
    return ids


async def tokenize(state: ServerState, texts: list[str], add_special_tokens: bool | None = None) -> list[list[int]]:
    """Token ids of each text; ``add_special_tokens`` None: as the engine would put them around a prompt.

    Refuses, before it does anything, a text that cannot be short enough for this server (no token stands for more than
    ``longest_token`` characters), and texts that have too many characters together.
    """
    tokenizer = state.engine.tokenizer
    longest, most = state.longest_prompt * tokenizer.longest_token, state.reader.characters
    for i, text in enumerate(texts):
        if len(text) > longest:
            raise RequestTooLarge(f"prompt {i} has {len(text)} characters; none above {longest} can fit this server")
    _require_few(sum(map(len, texts)), "characters", most)
    if add_special_tokens is not None:
        return await _encode(state, texts, add_special_tokens)
    wanted = [tokenizer.wants_special_tokens(text) for text in texts]
    if len(set(wanted)) == 1:
        return await _encode(state, texts, wanted[0])
    bare = iter(await _encode(state, [text for text, each in zip(texts, wanted, strict=True) if not each], False))
    rest = iter(await _encode(state, [text for text, each in zip(texts, wanted, strict=True) if each], True))
    return [next(rest if each else bare) for each in wanted]


async def _encode(state: ServerState, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    if is_short(texts):
        return state.engine.tokenizer.encode_all(texts, add_special_tokens)
    return await asyncio.wrap_future(state.reader.encode(texts, add_special_tokens))


async def detokenize(state: ServerState, lists: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
    """The text of each list of token ids, which are checked already."""
    total = sum(map(len, lists))
    _require_few(total, "tokens", state.reader.characters)
    if total <= SHORT and len(lists) <= SHORT:
        return [state.engine.tokenizer.decode(ids, skip_special_tokens) for ids in lists]
    return await asyncio.wrap_future(state.reader.decode(lists, skip_special_tokens))


async def texts_of(state: ServerState, prompts: Prompts) -> list[str]:
    """The prompts as text: what came, or the token ids decoded (they were checked before)."""
    return prompts.texts if prompts.texts is not None else await detokenize(state, prompts.ids)


def _require_answers(state: ServerState, n: int) -> None:
    if n > state.config.max_n:
        raise invalid(f"n={n} is more than this server allows: max_n is {state.config.max_n}", "n")


def _require_room(state: ServerState, ids: list[Any], what: str) -> None:
    if len(ids) > state.longest_prompt:
        raise RequestTooLarge(f"{what} has {len(ids)} tokens; this server takes {state.longest_prompt}")


def _require_few(number: int, of: str, most: int) -> None:
    if number > most:
        raise RequestTooLarge(f"{number} {of} in one request; this server takes {most} (max_prompt_characters)")

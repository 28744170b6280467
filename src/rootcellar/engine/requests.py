"""Read what a caller gave: every prompt and parameter is checked before anything is started."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.config import EngineConfig
from rootcellar.engine.build import Parts
from rootcellar.engine.identity import names_of, read_namespace
from rootcellar.engine.output import LogprobOptions
from rootcellar.engine.pictures import ImageData, see, spread_images
from rootcellar.engine.room_fields import rooms_of
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Room, Span
from rootcellar.text import Tokenizer

# Characters above which a prompt is tokenized on a thread of its own rather than on the event loop (about 2 ms).
_LONG_TEXT = 10_000
# Priorities are compared in C++ as well, and no request may fail a step that others share.
_PRIORITIES = 2**31
# The same for the number of prompts and answers.
MANY_PROMPTS = 32
_DEFAULTS = SamplingParams()
_HANDLE = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class InputItem:
    """One sequence to generate: a prompt of ``n`` answers is ``n`` of them. ``names``: what its caller calls it."""

    ids: NDArray[np.int64]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    seed: int | None
    names: tuple[str, ...]
    logprobs: LogprobOptions | None
    priority: int
    namespace: str
    checkpoint: bool = False
    depends: str | None = None
    room: Room | None = None
    gives: bool = False
    """Whether the prompt alone is computed, for another node."""
    spans: tuple[Span, ...] = ()
    places: NDArray[np.int32] | None = None
    """Where ``ids`` have pictures, and where rotary embeddings of three axes take them to be; see ``Request``."""
    experts_from: int | None = None
    """Of tokens from here on the experts are returned; None: of none."""


@dataclass(frozen=True)
class Inputs:
    """All sequences of one call.

    ``several``: the caller gets a list. ``received``: when it came, in seconds of the engine's clock.
    ``tenant``: who asks.
    """

    items: list[InputItem]
    several: bool
    received: float
    tenant: str = ""


def read_inputs(
    parts: Parts,
    prompt: str | Sequence[str] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    *,
    received: float,
    rid: str | Sequence[str] | None = None,
    return_logprob: bool = False,
    logprob_start_len: int = -1,
    top_logprobs_num: int = 0,
    return_text_in_logprobs: bool = True,
    priority: int = 0,
    extra_key: str = "",
    cache_salt: str = "",
    tenant: str = "",
    storage_checkpoint: bool = False,
    storage_checkpoint_dependency: str | None = None,
    bootstrap_host: str | Sequence[str | None] | None = None,
    bootstrap_port: int | Sequence[int | None] | None = None,
    bootstrap_room: int | Sequence[int | None] | None = None,
    image_data: ImageData = None,
    return_routed_experts: bool = False,
    routed_experts_start_len: int = 0,
    require_room: Callable[[int, str], None] | None = None,
) -> Inputs:
    """The sequences of one ``generate`` call, which came at ``received``; other arguments as there.

    Raises:
        RequestError: something is wrong; the message says which prompt, what was given and what would be right.
        RequestTooLarge: a sequence can never fit; the message names the setting.
    """
    _check_call(parts, prompt, input_ids, priority, storage_checkpoint, storage_checkpoint_dependency, bootstrap_room)
    where_cached = read_namespace(parts.config, tenant, cache_salt, extra_key)
    logprobs = _logprob_options(parts.config, logprob_start_len, top_logprobs_num, return_text_in_logprobs)
    gives = bootstrap_room is not None and parts.config.disaggregation_mode == "prefill"
    logprobs = logprobs if return_logprob and not gives else None
    experts = _experts_from(parts.config, return_routed_experts, routed_experts_start_len)
    one, prompts = _read_prompts(parts, prompt) if prompt is not None else _read_ids(parts, input_ids)
    images = spread_images(image_data, len(prompts), one=one)
    seen = [
        see(parts, ids, each, "" if one else f"prompt {i}: ")
        for i, (ids, each) in enumerate(zip(prompts, images, strict=True))
    ]
    prompts = [each.ids for each in seen]
    settings = _spread(sampling_params, len(prompts), "sampling_params", Mapping)
    settings = [_prompt_alone(each) for each in settings] if gives else settings
    named = names_of(rid, len(prompts))
    _check_stops(parts.config, settings)
    sequences = _check_size(parts, prompts, settings, logprobs)
    if require_room is not None:
        require_room(sequences, tenant)
    rooms = rooms_of(parts.config, bootstrap_host, bootstrap_port, bootstrap_room, len(prompts), sequences)
    items: list[InputItem] = []
    read = _Read(parts)
    for i, (ids, given, names) in enumerate(zip(prompts, settings, named, strict=True)):
        where = "" if one else f"prompt {i}: "
        sampling, stop_ids = read.params(given, where)
        sampling = read.fitted(given, _most_new(parts, ids, given, sampling, where))
        if logprobs is not None and logprobs.start is not None and logprobs.start >= len(ids):
            raise RequestError(f"{where}logprob_start_len={logprobs.start} is beyond the prompt of {len(ids)} tokens")
        for j in range(sampling.n):
            seed = None if sampling.seed is None else (sampling.seed + j) % 2**64
            own = names if not names or sampling.n == 1 else (*names, f"{names[-1]}-{j}")
            items.append(
                InputItem(
                    ids,
                    sampling,
                    stop_ids,
                    seed,
                    own,
                    logprobs,
                    priority,
                    where_cached,
                    checkpoint=storage_checkpoint,
                    depends=storage_checkpoint_dependency,
                    room=rooms[len(items)],
                    gives=gives,
                    spans=seen[i].spans,
                    places=seen[i].places,
                    experts_from=experts,
                )
            )
    return Inputs(items, not one or len(items) > 1, received, tenant)


def _check_call(
    parts: Parts, prompt: object, input_ids: object, priority: object, checkpoint: bool, depends: str | None,
    room: object,
) -> None:  # fmt: skip
    """What can be said of a call before its prompts are read."""
    if (prompt is None) == (input_ids is None):
        raise RequestError("give either prompt (text) or input_ids (token ids), and not both")
    if not isinstance(priority, int) or abs(priority) >= _PRIORITIES:
        raise RequestError(
            f"priority={priority!r} is not allowed: an integer above {-_PRIORITIES} and below {_PRIORITIES}"
        )
    if depends is not None and room is not None:
        raise RequestError(
            "storage_checkpoint_dependency waits for this node's store, and bootstrap_room for another node: give one"
        )
    _check_checkpoint(parts, checkpoint, depends)


def _experts_from(config: EngineConfig, wanted: object, start: object) -> int | None:
    if not isinstance(wanted, bool):
        raise RequestError(f"return_routed_experts={wanted!r} is not allowed: it must be true or false")
    if not isinstance(start, int) or start < 0:
        raise RequestError(f"routed_experts_start_len={start!r} is not allowed: an index into the prompt, from 0 on")
    if wanted and not config.enable_return_routed_experts:
        raise RequestError("return_routed_experts needs an engine that keeps them: enable_return_routed_experts")
    return start if wanted else None


def _prompt_alone(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sampling parameters of a prompt that another node answers: as many sequences, and no token of any."""
    return {"max_new_tokens": 0, "n": _count(given, "n", 1)}


def _check_checkpoint(parts: Parts, wanted: bool, depends: str | None) -> None:
    if not isinstance(wanted, bool):
        raise RequestError(f"storage_checkpoint={wanted!r} is not allowed: it must be true or false")
    if depends is not None and not (isinstance(depends, str) and _HANDLE.fullmatch(depends)):
        raise RequestError(
            f"storage_checkpoint_dependency={str(depends)[:80]!r} is no handle: give one that a request with "
            'storage_checkpoint got in meta_info["storage_checkpoint"]'
        )
    if (wanted or depends is not None) and parts.mover is None:
        raise RequestError(
            "storage_checkpoint and storage_checkpoint_dependency need a store: start with "
            "enable_hierarchical_cache and hicache_storage_backend"
        )


def _check_size(
    parts: Parts,
    prompts: Sequence[NDArray[np.int64]],
    settings: Sequence[Mapping[str, Any] | None],
    logprobs: LogprobOptions | None,
) -> int:
    """Refuse what is too much together before anything is allocated for it; how many sequences there are."""
    config = parts.config
    sequences = tokens = cells = 0
    for ids, given in zip(prompts, settings, strict=True):
        n, new = _count(given, "n", 1), _count(given, "max_new_tokens", _DEFAULTS.max_new_tokens)
        sequences += n
        tokens += n * (len(ids) + new)
        cells += 0 if logprobs is None else n * logprobs.cells(len(ids), new)
    most = None if config.max_queued_requests is None else config.max_queued_requests + parts.max_running_requests
    for number, limit, what, setting in (
        (sequences, most, "sequences", "max_queued_requests"),
        (tokens, config.max_request_tokens, "tokens, prompts and answers together", "max_request_tokens"),
        (cells, config.max_request_logprobs, "logprobs", "max_request_logprobs"),
    ):
        if limit is not None and number > limit:
            raise RequestTooLarge(
                f"{number} {what} in one request: at most {limit} are allowed; send fewer, or raise {setting}"
            )
    return sequences


def _count(given: Mapping[str, Any] | None, name: str, default: int) -> int:
    """A number among sampling parameters that are not checked yet; what is none is refused later."""
    value = (given or {}).get(name)
    value = default if value is None else value
    return value if isinstance(value, int) and value > 0 else 0


def _check_stops(config: EngineConfig, settings: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse stop strings without number before anything looks at each of them."""
    given = [
        each["stop"] for each in settings if each and isinstance(each.get("stop"), str | list | tuple | set | frozenset)
    ]
    together = {id(stop): [stop] if isinstance(stop, str) else stop for stop in given}.values()
    most = max(map(len, together), default=0)
    if most > config.max_stop_strings:
        raise RequestError(f"{most} stop strings: at most {config.max_stop_strings} are allowed (max_stop_strings)")
    characters = sum(len(each) for stops in together for each in stops if isinstance(each, str))
    if characters > config.max_stop_length:
        raise RequestError(
            f"stop strings of {characters} characters together: at most {config.max_stop_length} are allowed in a "
            "request (max_stop_length)"
        )


def _spread(value: Any, n: int, name: str, kind: type) -> list[Any]:
    """One value for each of ``n`` prompts: the same for all, or a list of as many."""
    if value is None or isinstance(value, kind):
        return [value] * n
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == n
    if listed and all(each is None or isinstance(each, kind) for each in value):
        return list(value)
    raise RequestError(f"{name} must be one {kind.__name__.lower()} or a list of {n}, one for each prompt")


def _read_prompts(parts: Parts, prompt: object) -> tuple[bool, list[NDArray[np.int64]]]:
    if parts.tokenizer is None:
        raise RequestError("a text prompt needs the tokenizer: give input_ids, or leave skip_tokenizer_init at False")
    one = isinstance(prompt, str)
    texts = [prompt] if one else prompt
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
        raise RequestError("prompt must be a text or a list of at least one text")
    result = []
    for i, text in enumerate(texts):
        if not text:
            raise RequestError(f"prompt{'' if one else f' {i}'} is empty: give at least one character")
        where = "" if one else f"prompt {i}: "
        result.append(_checked(parts, encode(parts.tokenizer, text, where), where))
    return one, result


def encode(tokenizer: Tokenizer, text: object, where: str = "") -> list[int]:
    """Token ids of a prompt, special tokens added once; ``where`` begins the message of ``RequestError``."""
    if not isinstance(text, str):
        raise RequestError(f"{where}a prompt must be a text, not {reprlib.repr(text)}")
    try:
        return tokenizer.encode(text, add_special_tokens=tokenizer.wants_special_tokens(text))
    except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair
        raise RequestError(f"{where}the prompt is no valid text: {error}") from None


def _read_ids(parts: Parts, input_ids: object) -> tuple[bool, list[NDArray[np.int64]]]:
    if isinstance(input_ids, np.ndarray):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, Sequence) or isinstance(input_ids, str):
        raise RequestError(
            f"input_ids must be a list of token ids or a list of such lists, not {reprlib.repr(input_ids)}"
        )
    one = not input_ids or isinstance(input_ids[0], Integral)
    lists = [input_ids] if one else input_ids
    return one, [_checked(parts, ids, "" if one else f"prompt {i}: ") for i, ids in enumerate(lists)]


def _checked(parts: Parts, ids: object, where: str) -> NDArray[np.int64]:
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise RequestError(f"{where}input_ids must be a list of token ids, not {reprlib.repr(ids)}")
    if not ids:
        raise RequestError(f"{where}the prompt is empty: give at least one token")
    vocab = parts.model.vocab_size
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab:  # nearly always, and fast
        return np.asarray(ids, np.int64)
    for i, token in enumerate(ids):
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise RequestError(f"{where}token {i} is {token!r}, which is no integer")
        if not 0 <= token < vocab:
            raise RequestError(f"{where}token {i} is {token}, out of range: ids of this model are 0 to {vocab - 1}")
    return np.asarray(ids, np.int64)


class _Read:
    """The sampling parameters of one call: prompts that share some have them read and checked once."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._params: dict[int, tuple[SamplingParams, frozenset[int]]] = {}
        self._fitted: dict[tuple[int, int], SamplingParams] = {}

    def params(self, given: Mapping[str, Any] | None, where: str) -> tuple[SamplingParams, frozenset[int]]:
        """The parameters of a prompt, and the token ids that end its answers."""
        known = self._params.get(id(given))
        if known is None:
            sampling = _read_params(self._parts, given, where)
            ends = frozenset() if sampling.ignore_eos else self._parts.stop_ids
            known = self._params[id(given)] = sampling, frozenset(sampling.stop_token_ids) | ends
        return known

    def fitted(self, given: Mapping[str, Any] | None, most: int) -> SamplingParams:
        """The parameters of a prompt that was read, for an answer of at most so many tokens."""
        sampling = self._params[id(given)][0]
        if most == sampling.max_new_tokens:
            return sampling
        key = id(given), most
        if key not in self._fitted:
            least = min(sampling.min_new_tokens, most)
            self._fitted[key] = replace(sampling, max_new_tokens=most, min_new_tokens=least)
        return self._fitted[key]


def _read_params(parts: Parts, given: Mapping[str, Any] | None, where: str) -> SamplingParams:
    sampling = SamplingParams.from_dict(given)
    if sampling.grammar and parts.tokenizer is None:
        raise RequestError(f"{where}{sampling.grammar} needs the tokenizer: leave skip_tokenizer_init at False")
    if sampling.stop and parts.tokenizer is None:
        raise RequestError(f"{where}stop strings need the tokenizer: use stop_token_ids instead")
    if any(t >= parts.model.vocab_size for t in sampling.stop_token_ids):
        raise RequestError(f"{where}stop_token_ids: ids of this model are 0 to {parts.model.vocab_size - 1}")
    if any(token >= parts.model.vocab_size for token, _ in sampling.logit_bias):
        raise RequestError(f"{where}logit_bias: ids of this model are 0 to {parts.model.vocab_size - 1}")
    return sampling


def _most_new(
    parts: Parts, ids: NDArray[np.int64], given: Mapping[str, Any] | None, sampling: SamplingParams, where: str
) -> int:
    """Most tokens of the answer: what was asked for, or at most what fits where nothing was."""
    n = len(ids)
    if n >= parts.context_length:
        raise RequestTooLarge(
            f"{where}the prompt has {n} tokens, and the context of {parts.context_length} must also hold the answer: "
            "shorten the prompt, or raise context_length as far as the model allows"
        )
    if n >= parts.total_tokens:
        raise RequestTooLarge(
            f"{where}the prompt has {n} tokens and the KV cache holds {parts.total_tokens}: raise max_total_tokens"
        )
    room = min(parts.context_length, parts.total_tokens) - n
    if given is None or given.get("max_new_tokens") is None:
        return min(sampling.max_new_tokens, room)
    wanted = n + sampling.max_new_tokens
    asked = f"{where}{n} prompt tokens and max_new_tokens={sampling.max_new_tokens} are {wanted}"
    if wanted > parts.context_length:
        raise RequestTooLarge(
            f"{asked}, more than the context of {parts.context_length}: lower max_new_tokens to {room} or raise "
            "context_length as far as the model allows"
        )
    if wanted > parts.total_tokens:
        raise RequestTooLarge(
            f"{asked}, more than the KV cache holds: raise max_total_tokens (now {parts.total_tokens}) or lower "
            f"max_new_tokens to {room}"
        )
    return sampling.max_new_tokens


def _logprob_options(config: EngineConfig, start: int, top: int, texts: bool) -> LogprobOptions:
    """What to report of logprobs; ``RequestError`` when that is nothing sensible, even where they are not wanted."""
    if not isinstance(start, int) or start < -1:
        raise RequestError(f"logprob_start_len must be -1 (none) or an index into the prompt, not {start!r}")
    if not isinstance(top, int) or not 0 <= top <= config.max_logprobs:
        raise RequestError(f"top_logprobs_num must be from 0 to {config.max_logprobs} (max_logprobs), not {top!r}")
    return LogprobOptions(None if start < 0 else start, top, texts)


def takes_long(prompt: object, input_ids: object, image_data: object = None) -> bool:
    """Whether reading the arguments may take longer than an event loop should stand still."""
    if image_data is not None:
        return True
    texts = prompt if isinstance(prompt, list | tuple) else [prompt]
    nested = isinstance(input_ids, list | tuple) and input_ids and isinstance(input_ids[0], list | tuple | np.ndarray)
    lists = input_ids if nested else [input_ids]
    if (
        max(len(texts), len(lists)) > MANY_PROMPTS
        or sum(len(ids) for ids in lists if isinstance(ids, Sized)) > _LONG_TEXT
    ):
        return True
    return sum(len(text) for text in texts if isinstance(text, str)) > _LONG_TEXT

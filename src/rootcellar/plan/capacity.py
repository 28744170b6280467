"""Capacity from first principles: what a model's KV cache costs, what fits a device, and how many requests that is.

Bytes per token and per request count the model once; budgets, pools and requests are counted on one device of ``tp``.
Every figure of a :class:`Capacity` has its formula, with the numbers in it, under the same name in its ``formulas``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rootcellar.cache.kind import Kind
from rootcellar.config import EngineConfig
from rootcellar.errors import ConfigError
from rootcellar.plan.arena import group
from rootcellar.plan.grids import NARROW
from rootcellar.plan.layers import Architecture, Group, head_dim, kv_heads_of, need
from rootcellar.plan.sizing import (
    ARENA,
    MOST_REQUESTS,
    TILE,
    Cost,
    Division,
    Rules,
    Widths,
    activation_bytes,
    concurrency,
    concurrency_of,
    divide,
    host_pages,
    request_pages,
    smallest,
    verified,
)
from rootcellar.plan.stored import DTYPES, SHORT_NAMES
from rootcellar.plan.weights import weight_bytes
from rootcellar.units import gb

KV_DTYPES = (*DTYPES, *SHORT_NAMES, *NARROW)
"""Names of the KV cache's dtypes."""

ENGINE = EngineConfig()
"""The engine's defaults: what is not said here is planned with them."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What to plan for. Sizes in bytes; the names are those of the engine's settings where it has them.

    Attributes:
        model: the model.
        kv_cache_dtype: a name in ``KV_DTYPES``, or ``"auto"``: the dtype of the weights.
        page_size: tokens in a page.
        tp: devices that one copy of the model is split over.
        devices: devices in all; ``devices // tp`` copies run.
        hbm: memory of one device; kv_bytes_per_device: what of it is for the KV cache. At most one of the two.
        mem_fraction_static: the part of ``hbm`` that weights, activations and KV cache may take.
        weight_bytes, activation_bytes: of one copy and of one device; None: estimated from the config.
        max_total_tokens: take so many tokens and no more.
        request_length: of the requests to count, in tokens; None: the model's context.
        chunked_prefill_size: tokens of a request that may be in computation (vLLM: max_num_batched_tokens).
        max_running_requests: rows of a decode step.
        speculative_num_draft_tokens: tokens of a row that may be guessed; 0: none are.
        hicache_ratio: tokens of the host tier for each on the device; hicache_size: or its bytes, for each device.
    """

    model: Architecture
    kv_cache_dtype: str = "auto"
    page_size: int = ENGINE.page_size
    tp: int = 1
    devices: int = 1
    hbm: int | None = None
    kv_bytes_per_device: int | None = None
    mem_fraction_static: float = ENGINE.mem_fraction_static
    weight_bytes: int | None = None
    activation_bytes: int | None = None
    max_total_tokens: int | None = None
    request_length: int | None = None
    chunked_prefill_size: int = ENGINE.chunked_prefill_size
    swa_full_tokens_ratio: float = ENGINE.swa_full_tokens_ratio
    mamba_full_memory_ratio: float = ENGINE.mamba_full_memory_ratio
    max_running_requests: int = MOST_REQUESTS
    speculative_num_draft_tokens: int = 0
    hicache_ratio: float | None = None
    hicache_size: int | None = None

    def __post_init__(self) -> None:
        counts = {"page_size": self.page_size, "tp": self.tp, "devices": self.devices}
        counts |= {"chunked_prefill_size": self.chunked_prefill_size, "max_running_requests": self.max_running_requests}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name}={value} is not allowed: it must be at least 1")
        if (guessed := self.speculative_num_draft_tokens) < 0:
            raise ConfigError(f"speculative_num_draft_tokens={guessed} is not allowed: it must be at least 0")
        if self.devices % self.tp:
            raise ConfigError(f"devices={self.devices} is no multiple of tp={self.tp}: each copy takes tp devices")
        if self.hbm is not None and self.kv_bytes_per_device is not None:
            raise ConfigError("give hbm or kv_bytes_per_device, not both: the second leaves nothing to derive")
        if self.hicache_ratio is not None and self.hicache_size is not None:
            raise ConfigError("give hicache_ratio or hicache_size, not both")
        if not 0 < self.mem_fraction_static <= 1:
            raise ConfigError(f"mem_fraction_static={self.mem_fraction_static} is not allowed: it must be in (0, 1]")
        if not 0 < self.swa_full_tokens_ratio <= 1:
            raise ConfigError(
                f"swa_full_tokens_ratio={self.swa_full_tokens_ratio} is not allowed: it must be in (0, 1]"
            )
        if self.mamba_full_memory_ratio <= 0:
            raise ConfigError(f"mamba_full_memory_ratio={self.mamba_full_memory_ratio} must be above 0")
        if self.kv_cache_dtype not in ("auto", *KV_DTYPES):
            raise ConfigError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is unknown: choose from auto, {', '.join(KV_DTYPES)}"
            )

    @property
    def kv_dtype(self) -> str:
        """The KV cache's dtype by the one name that layouts know."""
        if self.kv_cache_dtype == "auto":
            return self.model.dtype if self.model.dtype in DTYPES else "bfloat16"
        return SHORT_NAMES.get(self.kv_cache_dtype, self.kv_cache_dtype)

    @property
    def rules(self) -> Rules:
        """How a budget is divided."""
        return Rules(
            self.page_size,
            self.swa_full_tokens_ratio,
            self.mamba_full_memory_ratio,
            self.max_total_tokens,
            inflight=self.chunked_prefill_size,
            spare_states=self.spare_states,
        )

    @property
    def spare_states(self) -> int:
        """States of each recurrent kind for tokens that a step guesses."""
        guessed = self.speculative_num_draft_tokens
        return verified(self.max_running_requests, guessed) - 1 if guessed else 0

    def costs(self) -> list[Cost]:
        """What a page of each kind takes on one device."""
        return [
            Cost(g.kind, g.token_bytes(self.kv_dtype, self.tp) * self.page_size + g.state_bytes(self.kv_dtype))
            for g in self.model.groups
        ]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The figures. None where the hardware was not given.

    ``bytes_per_token_full``: were every attention layer to keep every token; ``bytes_per_token_hybrid``: what one more
    token of a long request takes; ``constant_bytes_per_request``: what a long request takes beside that.
    ``concurrency``: requests of ``request_length`` at once when the budget is divided as they need it;
    ``concurrency_as_divided``: with the ratios given; ``concurrency_all_full``: were all layers full. ``arena_groups``:
    layers of each kind that share one arena instead, where they can, ``arena_pages`` of it and the tokens of the
    ``arena_longest_request``.
    """

    bytes_per_token_full: int
    bytes_per_token_hybrid: int
    constant_bytes_per_request: int
    bytes_per_token_per_device: int
    bytes_per_token_all_devices: int
    kv_bytes_per_device: int | None = None
    weight_bytes_per_device: int | None = None
    activation_bytes_per_device: int | None = None
    max_total_num_tokens: int | None = None
    pool_tokens: dict[str, int] | None = None
    kv_cache_bytes_per_device: int | None = None
    kv_cache_bytes_all_devices: int | None = None
    arena_groups: dict[str, int] | None = None
    arena_pages: int | None = None
    arena_longest_request: int | None = None
    request_length: int | None = None
    request_bytes_per_device: int | None = None
    concurrency: float | None = None
    concurrency_as_divided: float | None = None
    concurrency_all_full: float | None = None
    swa_full_tokens_ratio_for_request: float | None = None
    replicas: int = 1
    host_tokens: int | None = None
    host_bytes_per_device: int | None = None
    hicache_ratio: float | None = None
    formulas: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The figures and formulas as plain values."""
        return dataclasses.asdict(self)


def capacity(ask: Ask) -> Capacity:
    """All figures that ``ask`` gives grounds for.

    Raises ``ConfigError`` when tp does not divide recurrent layers, the config lacks a field, or nothing fits.
    """
    figures, formulas = _per_token(ask)
    budget, spent = _budget(ask, formulas)
    if budget is None and ask.max_total_tokens is None:
        return Capacity(**figures, formulas=formulas)
    costs = ask.costs()
    if budget is None:  # the pools that max_total_tokens asks for, whatever the device
        budget = smallest(costs, ask.rules)
        formulas["kv_bytes_per_device"] = "as much as max_total_tokens takes"
    division = divide(costs, ask.rules, budget)
    if division is None:
        raise ConfigError(_refusal(ask, costs, budget, spent))
    figures |= {"kv_bytes_per_device": budget, "replicas": ask.devices // ask.tp, **spent}
    figures |= _pools(ask, costs, division, formulas)
    figures |= _arena(ask, costs, budget, formulas)
    figures |= _requests(ask, costs, division, budget, formulas)
    figures |= _host(ask, division, formulas)
    return Capacity(**figures, formulas=formulas)


def _refusal(ask: Ask, costs: Sequence[Cost], budget: int, spent: dict[str, int]) -> str:
    """Why not even the smallest KV cache fits, with the figures, and what would help."""
    least = smallest(costs, ask.rules)
    if ask.hbm is None or not spent:
        left = f"{gb(budget)} GB are given for the KV cache of a device"
        help = "Raise kv_bytes_per_device or tp"
    else:
        weights, active = spent["weight_bytes_per_device"], spent["activation_bytes_per_device"]
        how = "" if ask.activation_bytes is not None else f" of a prefill of {ask.chunked_prefill_size} tokens"
        lack = f"{gb(budget)} GB are left" if budget >= 0 else f"{gb(-budget)} GB are lacking"
        left = (
            f"of {gb(ask.hbm)} GB x {ask.mem_fraction_static} the weights take {gb(weights)} GB and the activations"
            f"{how} {gb(active)} GB, so {lack} for the KV cache of a device"
        )
        fits = _fitting_prefill(ask)
        help = f"Lower chunked_prefill_size (--chunked-prefill-size) to {fits}, or raise" if fits else "Raise"
        help += " mem_fraction_static, hbm or tp"
    if ask.max_total_tokens is not None:
        help += ", or lower max_total_tokens"
    return f"Not enough memory: {left}, and the smallest one takes {gb(least)} GB. {help}."


def _fitting_prefill(ask: Ask) -> int | None:
    """The largest power of two below ``chunked_prefill_size`` whose activations leave room for a KV cache, if any."""
    if ask.activation_bytes is not None:
        return None
    for power in range((ask.chunked_prefill_size - 1).bit_length() - 1, -1, -1):
        smaller = replace(ask, chunked_prefill_size=1 << power)
        budget, _ = _budget(smaller, {})
        if budget is not None and divide(smaller.costs(), smaller.rules, budget) is not None:
            return 1 << power
    return None


# --- the figures ------------------------------------------------------------------------------------------------------


def _per_token(ask: Ask) -> tuple[dict[str, Any], dict[str, str]]:
    dtype, groups = ask.kv_dtype, ask.model.groups
    tokens = [g for g in groups if g.token_bytes(dtype)]
    always = [g for g in tokens if g.kind.rule == "full"]
    spans = [g for g in tokens if g.kind.rule != "full"]
    states = [g for g in groups if g.state_bytes(dtype)]
    per_device = sum(g.token_bytes(dtype, ask.tp) for g in groups)
    figures = {
        "bytes_per_token_full": sum(g.token_bytes(dtype) for g in tokens),
        "bytes_per_token_hybrid": sum(g.token_bytes(dtype) for g in always),
        "constant_bytes_per_request": sum(g.kind.span * g.token_bytes(dtype) for g in spans)
        + sum(g.state_bytes(dtype) for g in states),
        "bytes_per_token_per_device": per_device,
        "bytes_per_token_all_devices": per_device * ask.tp,
    }

    def elements(group: Group) -> str:
        return f"{len(group.kind.layers)} layers x {group.stored.formula(dtype)}"

    def constant(group: Group) -> str:
        if group in states:
            return elements(group)
        return f"{group.kind.span} tokens x {elements(group)}"

    formulas = {
        "bytes_per_token_full": " + ".join(map(elements, tokens)),
        "bytes_per_token_hybrid": " + ".join(map(elements, always)) or "0: no layer keeps every token",
        "constant_bytes_per_request": " + ".join(map(constant, [*spans, *states]))
        or "0: every layer keeps every token",
        "bytes_per_token_per_device": "; ".join(dict.fromkeys(g.stored.divided(ask.tp) for g in tokens)),
        "bytes_per_token_all_devices": f"{per_device} x {ask.tp} devices",
    }
    return figures, formulas


def _budget(ask: Ask, formulas: dict[str, str]) -> tuple[int | None, dict[str, int]]:
    """Bytes for the KV cache on one device, and what they were derived from."""
    if ask.kv_bytes_per_device is not None:
        formulas["kv_bytes_per_device"] = "given"
        return ask.kv_bytes_per_device, {}
    if ask.hbm is None:
        return None, {}
    total = ask.weight_bytes if ask.weight_bytes is not None else weight_bytes(ask.model)
    weights = -(-total // ask.tp)
    active = ask.activation_bytes
    if active is None:
        rows = verified(ask.max_running_requests, ask.speculative_num_draft_tokens)
        active = activation_bytes(_widths(ask), ask.chunked_prefill_size, -(-ask.chunked_prefill_size // TILE), rows)
    formulas["weight_bytes_per_device"] = (
        f"{gb(total)} GB {'given' if ask.weight_bytes is not None else 'counted from the config'} / tp={ask.tp}"
    )
    formulas["activation_bytes_per_device"] = (
        "given"
        if ask.activation_bytes is not None
        else f"estimated for a prefill of {ask.chunked_prefill_size} tokens; the engine measures it"
    )
    formulas["kv_bytes_per_device"] = (
        f"{gb(ask.hbm)} GB x {ask.mem_fraction_static} - {gb(weights)} GB weights - {gb(active)} GB activations"
    )
    budget = int(ask.hbm * ask.mem_fraction_static) - weights - active
    return budget, {"weight_bytes_per_device": weights, "activation_bytes_per_device": active}


def _widths(ask: Ask) -> Widths:
    text, tp = ask.model.text, ask.tp
    heads = -(-int(need(text, "num_attention_heads")) // tp)
    kv_heads = -(-kv_heads_of(text) // tp)
    inner = max(int(text.get(name) or 0) for name in ("intermediate_size", "intermediate_size_mlp"))
    return Widths(
        hidden=int(need(text, "hidden_size")),
        intermediate=-(-inner // tp),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim(text),
        vocab=int(need(text, "vocab_size")),
    )


def _pools(ask: Ask, costs: Sequence[Cost], division: Division, formulas: dict[str, str]) -> dict[str, Any]:
    tokens = {c.kind.name: division.pages[c.kind.name] * (1 if c.recurrent else ask.page_size) for c in costs}
    spare = f" + {division.spare_states} for guesses" if division.spare_states else ""
    parts = [f"({division.pages[c.kind.name]} + 1{spare if c.recurrent else ''}) x {c.page_bytes}" for c in costs]
    formulas["max_total_num_tokens"] = (
        f"the most whole pages of {ask.page_size} whose pools fit into kv_bytes_per_device"
        + (f", swa_full_tokens_ratio={ask.swa_full_tokens_ratio}" if _windows(costs) else "")
        + (f", mamba_full_memory_ratio={ask.mamba_full_memory_ratio}" if any(c.recurrent for c in costs) else "")
        + (f", at most max_total_tokens={ask.max_total_tokens}" if ask.max_total_tokens else "")
    )
    formulas["pool_tokens"] = "by kind; states for recurrent layers"
    formulas["kv_cache_bytes_per_device"] = " + ".join(parts) + " (pages, one of them padding, x bytes of a page)"
    formulas["kv_cache_bytes_all_devices"] = f"{division.nbytes} x {ask.tp} devices"
    return {
        "max_total_num_tokens": division.tokens,
        "pool_tokens": tokens,
        "kv_cache_bytes_per_device": division.nbytes,
        "kv_cache_bytes_all_devices": division.nbytes * ask.tp,
    }


def _arena(ask: Ask, costs: Sequence[Cost], budget: int, formulas: dict[str, str]) -> dict[str, Any]:
    """What an arena would hold of the same budget; nothing where the kinds cannot share one."""
    grouping = group([c.kind for c in costs], {g.kind.name: g.stored for g in ask.model.groups})
    if grouping is None:
        return {}
    page = next(grouping.layers * c.page_bytes // len(c.kind.layers) for c in costs if not c.recurrent)
    states = {c.kind.name: c.page_bytes for c in costs if c.recurrent}
    cut = [Cost(kind, states.get(kind.name, page)) for kind in grouping.kinds]
    division = divide(cut, replace(ask.rules, arena=grouping.members), budget)
    if division is None:
        return {}
    formulas["arena_groups"] = f"layers by page table; a page is one of {grouping.layers} layers, {page} bytes"
    formulas["arena_pages"] = f"({division.pages[ARENA]} + 1) x {page}, one of them padding"
    formulas["arena_longest_request"] = (
        f"a full group holds every token, the others their span and {ask.chunked_prefill_size} tokens in computation"
    )
    return {
        "arena_groups": {k.name: len(k.layers) for k in grouping.kinds if k.name in grouping.members},
        "arena_pages": division.pages[ARENA],
        "arena_longest_request": division.tokens,
    }


def _windows(costs: Sequence[Cost]) -> list[Kind]:
    """The windowed kinds, where there is a full one beside them."""
    if not any(c.kind.rule == "full" for c in costs):
        return []
    return [c.kind for c in costs if c.kind.rule in ("sliding_window", "chunked_local")]


def _requests(
    ask: Ask, costs: Sequence[Cost], division: Division, budget: int, formulas: dict[str, str]
) -> dict[str, Any]:
    length = ask.request_length or ask.model.context_length
    if length is None:
        return {}
    page, inflight = ask.page_size, ask.chunked_prefill_size
    needs = {c.kind.name: request_pages(c.kind, page, length, inflight) for c in costs}
    one = sum(needs[c.kind.name] * c.page_bytes for c in costs)
    everything = [Cost(Kind(c.kind.name, c.kind.layers, "full"), c.page_bytes) for c in costs if not c.recurrent]
    windows = _windows(costs)
    full_pages = -(-length // page)
    formulas["request_bytes_per_device"] = " + ".join(f"{needs[c.kind.name]} x {c.page_bytes}" for c in costs) + (
        f" (pages x bytes of a page; a window holds its span and {inflight} tokens in computation)" if windows else ""
    )
    formulas["concurrency"] = f"{budget} / {one}"
    formulas["concurrency_as_divided"] = "least of " + ", ".join(
        f"{division.pages[name]} / {need}" for name, need in needs.items()
    )
    formulas["concurrency_all_full"] = f"{budget} / ({full_pages} pages x {sum(c.page_bytes for c in everything)})"
    figures = {
        "request_length": length,
        "request_bytes_per_device": one,
        "concurrency": concurrency(costs, page, length, inflight, budget),
        "concurrency_as_divided": concurrency_of(division, costs, page, length, inflight),
        "concurrency_all_full": concurrency(everything, page, length, inflight, budget),
    }
    if windows:
        widest = max(needs[kind.name] for kind in windows)
        figures["swa_full_tokens_ratio_for_request"] = min(1.0, widest / full_pages)
        formulas["swa_full_tokens_ratio_for_request"] = f"{widest} / {full_pages} pages: what such requests hold"
    return figures


def _host(ask: Ask, division: Division, formulas: dict[str, str]) -> dict[str, Any]:
    if ask.hicache_size is not None:
        each = sum(division.pages[cost.kind.name] * cost.page_bytes for cost in ask.costs())
        ratio = ask.hicache_size / each
        formulas["hicache_ratio"] = f"{ask.hicache_size} / {each} bytes, pages of padding left out"
    elif ask.hicache_ratio is not None:
        ratio = ask.hicache_ratio
        formulas["hicache_ratio"] = "given"
    else:
        return {}
    rows = host_pages(division.pages, ratio)
    costs = ask.costs()
    formulas["host_tokens"] = f"{ratio:.4g} x {division.tokens}, in whole pages"
    formulas["host_bytes_per_device"] = " + ".join(
        f"{rows[c.kind.name]} x {c.page_bytes} ({c.kind.name})" for c in costs
    )
    return {
        "hicache_ratio": ratio,
        "host_tokens": int(division.tokens // ask.page_size * ratio) * ask.page_size,
        "host_bytes_per_device": sum(rows[cost.kind.name] * cost.page_bytes for cost in costs),
    }


# --- what if ----------------------------------------------------------------------------------------------------------


def what_if(ask: Ask) -> list[tuple[str, Capacity]]:
    """The plan with one thing changed at a time: dtype, tp, window. What does not fit is left out."""
    rows = []
    for label, changed in _changes(ask):
        try:
            rows.append((label, capacity(changed)))
        except ConfigError:  # this tp does not suit the model, or nothing fits: no row
            continue
    return rows


def _changes(ask: Ask) -> Iterator[tuple[str, Ask]]:
    for name in ("float32", "bfloat16", *NARROW):
        if name != ask.kv_dtype:
            yield f"kv_cache_dtype={name}", replace(ask, kv_cache_dtype=name)
    for tp in (ask.tp // 2, ask.tp * 2):
        if tp:
            yield f"tp={tp}", replace(ask, tp=tp, devices=max(ask.devices, tp))
    spanned = [g for g in ask.model.groups if g.kind.span]
    if not spanned:
        return
    half = max(1, spanned[0].kind.span // 2)
    yield f"window={half}", _with_kinds(ask, lambda kind: replace(kind, span=half) if kind.span else kind)
    yield "all layers full", _with_kinds(ask, lambda kind: replace(kind, rule="full", span=0) if kind.span else kind)
    suits = capacity(ask).swa_full_tokens_ratio_for_request
    if suits is not None and suits != ask.swa_full_tokens_ratio:
        yield f"swa_full_tokens_ratio={suits:.4g}", replace(ask, swa_full_tokens_ratio=suits)


def _with_kinds(ask: Ask, change: Callable[[Kind], Kind]) -> Ask:
    groups = tuple(replace(group, kind=change(group.kind)) for group in ask.model.groups)
    return replace(ask, model=replace(ask.model, groups=groups))

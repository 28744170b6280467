"""How a budget of bytes becomes pages of each kind, and how many requests they hold. Engine and planner both ask here.

A pool of ``n`` pages takes ``n + 1`` pages of memory: page 0 is the padding target. All bytes are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rootcellar.cache.kind import Kind

ARENA = "arena"
"""What the pool that several kinds share is called, in capacities and divisions."""
MIN_STATES = 2
"""Fewest recurrent states: one request reads one and writes another."""
TILE = 16
"""Tokens in a tile of a prefill step, at most."""
MOST_REQUESTS = 64
"""Requests that run at the same time, at most, where ``max_running_requests`` is not given."""
STATES_PER_REQUEST = 4
"""States for each running request where tokens are capped: the one it reads, the one it writes, and two it leaves."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one page of a kind takes, in all its layers: ``page_size`` tokens, or one state of a recurrent kind."""

    kind: Kind
    page_bytes: int

    @property
    def recurrent(self) -> bool:
        """Whether a page is one state."""
        return self.kind.rule == "recurrent"


@dataclass(frozen=True, slots=True)
class Rules:
    """How the budget is divided; the names are those of the engine's settings.

    Attributes:
        page_size: tokens in a page.
        swa_full_tokens_ratio: tokens of the windowed kinds for each token of the full kind, 0 to 1.
        mamba_full_memory_ratio: bytes of recurrent states for each byte of the other kinds.
        max_total_tokens: take so many tokens and no more; None takes what fits.
        max_mamba_cache_size: take so many recurrent states; None divides by the ratio.
        inflight: tokens of a request that may be in computation (``chunked_prefill_size``); see
            :func:`split_pages`, and arenas.
        running: requests that may run at the same time; counts when ``max_total_tokens`` is given.
        arena: names of the kinds that share one pool, all with pages of the same bytes (see ``plan.arena``).
        spare_states: states of each recurrent kind beside those of the cache, for tokens that are guessed.
    """

    page_size: int
    swa_full_tokens_ratio: float = 1.0
    mamba_full_memory_ratio: float = 0.9
    max_total_tokens: int | None = None
    inflight: int = 1
    max_mamba_cache_size: int | None = None
    running: int = 0
    arena: tuple[str, ...] = ()
    spare_states: int = 0


@dataclass(frozen=True, slots=True)
class Division:
    """Pages of each pool (padding and spare states not counted), tokens, and the bytes of all pools with both.

    A pool is named after its kind, or ``ARENA``. ``tokens`` is what ``max_total_num_tokens`` reports: tokens of the
    full kind, or of all kinds where none is full; for an arena those of the longest request (``longest_request``).
    ``spare_states``: those that each recurrent pool has beside its pages (see ``Rules``).
    """

    pages: Mapping[str, int]
    tokens: int
    nbytes: int
    spare_states: int = 0


def divide(costs: Sequence[Cost], rules: Rules, budget: int) -> Division | None:
    """The largest pools that fit into ``budget`` bytes; None when not even the smallest do (see :func:`smallest`).

    The full kind gets ``f`` pages and the windowed ones ``f * swa_full_tokens_ratio``, but never less than one request
    needs, its next chunk of prefill included (or ``f``, when that is less). For recurrent kinds see
    :func:`state_pages`; when ``max_total_tokens`` is given, tokens come first. An arena gets all that is left, or the
    pages that its kinds would have had for ``max_total_tokens``.
    """
    spare = spare_bytes(costs, rules)
    division = (_divide_arena if rules.arena else _divide_split)(costs, rules, budget - spare)
    return (
        None if division is None else replace(division, nbytes=division.nbytes + spare, spare_states=rules.spare_states)
    )


def _divide_split(costs: Sequence[Cost], rules: Rules, budget: int) -> Division | None:
    wanted = 1 if rules.max_total_tokens is None else rules.max_total_tokens // rules.page_size
    states = state_pages(costs, rules, budget, token_bytes(costs, rules, wanted))
    if states is None or wanted < 1:
        return None
    if rules.max_total_tokens is not None:
        return _division(costs, rules, wanted, states)
    left = budget - state_bytes(costs, states)
    most = left // min(cost.page_bytes for cost in costs if not cost.recurrent)
    pages = largest(lambda n: token_bytes(costs, rules, n) <= left, 1, most)
    return _division(costs, rules, pages, states)


def state_bytes(costs: Sequence[Cost], states: int) -> int:
    """Bytes of ``states`` recurrent states and the one of padding, in all recurrent kinds; 0 where there are none."""
    return (states + 1) * sum(cost.page_bytes for cost in costs if cost.recurrent)


def state_pages(costs: Sequence[Cost], rules: Rules, budget: int, least: int) -> int | None:
    """States that the recurrent kinds get of ``budget`` bytes, where the others need ``least`` of them. None: no room.

    ``max_mamba_cache_size``, where it is given. Otherwise, in whole states and as far as ``least`` leaves room, the
    share ``ratio / (1 + ratio)`` of the budget; where ``max_total_tokens`` is given, ``ratio`` of what these tokens
    take, or ``STATES_PER_REQUEST`` for each running request if that is more. ``MIN_STATES`` at least.
    """
    per_state = sum(cost.page_bytes for cost in costs if cost.recurrent)
    least_states = least_states_of(costs, rules)
    spare = budget - least - state_bytes(costs, least_states)
    if spare < 0:
        return None
    if not per_state or rules.max_mamba_cache_size is not None:
        return least_states
    ratio = rules.mamba_full_memory_ratio
    if rules.max_total_tokens is None:
        share = int(budget * (ratio / (1 + ratio))) // per_state - 1
    else:
        share = max(int(least * ratio) // per_state - 1, STATES_PER_REQUEST * rules.running)
    return max(least_states, min(share, least_states + spare // per_state))


def verified(rows: int, guessed: int) -> int:
    """Tokens of the largest decode step: of ``rows`` rows, or of one row alone and ``guessed`` that follow it."""
    return 1 << (max(rows, 1 + guessed) - 1).bit_length()


def spare_bytes(costs: Sequence[Cost], rules: Rules) -> int:
    """Bytes of the states beside the cache's in which a step leaves those after guessed tokens."""
    return rules.spare_states * sum(cost.page_bytes for cost in costs if cost.recurrent)


def least_states_of(costs: Sequence[Cost], rules: Rules) -> int:
    """Fewest recurrent states that there must be; 0 for a model without recurrent layers."""
    if not any(cost.recurrent for cost in costs):
        return 0
    return rules.max_mamba_cache_size or MIN_STATES


def smallest(costs: Sequence[Cost], rules: Rules) -> int:
    """Bytes of the least pools that :func:`divide` gives: one page (or ``max_total_tokens``), and the fewest states."""
    if rules.arena:
        page, pages = _arena_pages(costs, rules)
        return (pages + 1) * page + state_bytes(costs, least_states_of(costs, rules)) + spare_bytes(costs, rules)
    pages = 1 if rules.max_total_tokens is None else rules.max_total_tokens // rules.page_size
    return _division(costs, rules, max(1, pages), least_states_of(costs, rules)).nbytes + spare_bytes(costs, rules)


def token_bytes(costs: Sequence[Cost], rules: Rules, pages: int) -> int:
    """Bytes of all kinds but the recurrent ones when the full kind has ``pages`` pages; padding pages included."""
    return sum((split_pages(cost, costs, rules, pages) + 1) * cost.page_bytes for cost in costs if not cost.recurrent)


def split_pages(cost: Cost, costs: Sequence[Cost], rules: Rules, pages: int) -> int:
    """Pages that a kind which is not recurrent gets when the full kind has ``pages``."""
    if cost.kind.rule == "full" or not any(other.kind.rule == "full" for other in costs):
        return pages
    # Chunks may be smaller than pages, and what they passed is released page by page.
    inflight = max(rules.inflight, rules.page_size)
    one_request = request_pages(cost.kind, rules.page_size, pages * rules.page_size, inflight)
    return min(pages, max(int(pages * rules.swa_full_tokens_ratio), one_request))


def _division(costs: Sequence[Cost], rules: Rules, pages: int, states: int) -> Division:
    counts = {c.kind.name: states if c.recurrent else split_pages(c, costs, rules, pages) for c in costs}
    nbytes = sum((counts[cost.kind.name] + 1) * cost.page_bytes for cost in costs)
    return Division(counts, pages * rules.page_size, nbytes)


def _arena_pages(costs: Sequence[Cost], rules: Rules) -> tuple[int, int]:
    """Bytes of an arena's page, and the fewest pages of it: one of each kind, or for ``max_total_tokens``."""
    sharing = [cost for cost in costs if cost.kind.name in rules.arena]
    if rules.max_total_tokens is None:
        return sharing[0].page_bytes, len(sharing)
    full = rules.max_total_tokens // rules.page_size
    return sharing[0].page_bytes, sum(split_pages(cost, sharing, rules, full) for cost in sharing)


def _divide_arena(costs: Sequence[Cost], rules: Rules, budget: int) -> Division | None:
    page, pages = _arena_pages(costs, rules)
    states = state_pages(costs, rules, budget, page * (pages + 1))
    if states is None or pages < 1:
        return None
    if rules.max_total_tokens is None:
        pages = (budget - state_bytes(costs, states)) // page - 1
    tokens = longest_request([cost.kind for cost in costs if cost.kind.name in rules.arena], pages, rules)
    if rules.max_total_tokens is not None:
        tokens = min(tokens, rules.max_total_tokens // rules.page_size * rules.page_size)
    counts = {ARENA: pages} | {cost.kind.name: states for cost in costs if cost.recurrent}
    return Division(counts, tokens, (pages + 1) * page + state_bytes(costs, states))


def host_pages(pages: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Pages of each pool in host memory, when there are ``ratio`` for each on the device; none is for padding."""
    return {pool: int(count * ratio) for pool, count in pages.items()}


def longest_request(kinds: Sequence[Kind], pages: int, rules: Rules) -> int:
    """Tokens, in whole pages, to which one request can grow in an arena of ``pages`` that it has for itself.

    It is computed ``rules.inflight`` tokens at a time: while tokens ``[m, n)`` are, a kind holds ``[start(m), n)``.
    What a chunked kind holds falls at each chunk's end, so the answer is found by walking from step to step, but only
    from where the spans could first make a difference: O(spans / inflight), however large the arena is. Where no kind
    is full, a request that fits at all grows for ever; the answer is then what the kinds hold when they share evenly.
    """
    size = rules.page_size
    step = -(-rules.inflight // size)
    fulls = sum(kind.rule == "full" for kind in kinds)
    spans = sum(-(-(kind.span - 1) // size) for kind in kinds if kind.rule != "full")  # the most that they hold
    room = pages - step * len(kinds)  # held by at most so many pages, a request takes another step
    if not fulls and spans <= room:
        return pages // len(kinds) * size
    done = max(0, (room - spans) // fulls // step * step) if fulls else 0
    while True:
        held = sum(done - kind.start(done * size) // size for kind in kinds)
        more = (pages - held) // len(kinds)
        if more < step:
            return (done + more) * size
        done += step


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The greatest number in ``[low, high]`` for which ``holds``; it holds for ``low`` and, once false, stays so."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


# --- what a request needs ---------------------------------------------------------------------------------------------


def request_pages(kind: Kind, page_size: int, length: int, inflight: int) -> int:
    """Pages of ``kind`` that one request of ``length`` tokens holds while ``inflight`` of its tokens are computed.

    vLLM's formulas (``max_memory_usage_bytes`` of its KV cache specs): a window may begin inside a page, hence one
    more; a chunk begins on a page (one more for chunks that are no multiple of it).
    """
    if kind.rule == "recurrent":
        return 1
    inside = kind.rule == "sliding_window" or kind.span % page_size > 0
    return -(-kind.held(length, inflight) // page_size) + inside


def concurrency(costs: Sequence[Cost], page_size: int, length: int, inflight: int, budget: int) -> float:
    """Requests of ``length`` tokens that ``budget`` bytes hold when divided as such requests need it.

    What vLLM's hybrid KV cache manager reaches, whose kinds share one pool of pages.
    """
    one = sum(request_pages(cost.kind, page_size, length, inflight) * cost.page_bytes for cost in costs)
    return budget / one


def concurrency_of(division: Division, costs: Sequence[Cost], page_size: int, length: int, inflight: int) -> float:
    """Requests of ``length`` tokens that pools divided so hold: the kind that runs out first decides."""
    return min(division.pages[cost.kind.name] / request_pages(cost.kind, page_size, length, inflight) for cost in costs)


# --- activations ------------------------------------------------------------------------------------------------------

SCORED_TOKENS = 64
"""Positions scored at a time when logprobs of prompts are asked for: bounds the memory of [positions, vocabulary]."""
BLOCK_TOKENS = 256
"""Positions of keys that attention reads at a time: enough work for a step of a loop, and not too much for caches."""
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of a model, in elements, that its activations depend on; those of one device."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def activation_bytes(widths: Widths, tokens: int, tiles: int, rows: int) -> int:
    """An upper estimate of what a step needs besides weights and KV cache, from its shapes; in bytes.

    ``tokens`` and ``tiles`` of the largest prefill step, ``rows`` of the largest decode step. Everything is counted in
    float32 and as if the widest layer's intermediate results all lived at once, and attention's block of keys and
    scores beside them; then logits, the sampler's copies of them and scores of prompt tokens. What compilers reported
    for float32 was about half of it.
    """
    w = widths
    n = max(tokens, rows)
    layer = n * (6 * w.hidden + 3 * (w.heads + 2 * w.kv_heads) * w.head_dim + 3 * w.intermediate)
    keys = 2 * 2 * max(tiles, rows) * BLOCK_TOKENS * w.kv_heads * w.head_dim
    scores = 4 * n * w.heads * BLOCK_TOKENS
    logits = (12 * max(tiles, rows) + 3 * SCORED_TOKENS) * w.vocab
    return _FLOAT * (layer + keys + scores + logits)

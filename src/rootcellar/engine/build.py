"""Put an engine together from its settings: model, tokenizer, cache, pools, runner, scheduler."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rootcellar import demo
from rootcellar.cache import RadixCache, Suffixes, Tier, digests
from rootcellar.config import EngineConfig
from rootcellar.engine import identity, invariance, memory
from rootcellar.engine.grammar import Grammars
from rootcellar.engine.loading_bar import loading_bar
from rootcellar.engine.memory import Sizing
from rootcellar.engine.numbers import numbers
from rootcellar.engine.sides import open_peers
from rootcellar.engine.trace_log import TraceLog
from rootcellar.errors import ConfigError, ModelError, RequestError
from rootcellar.grammars.process import Bounds
from rootcellar.models.checkpoints.folder import weight_files
from rootcellar.models.config import load_config, read_json
from rootcellar.models.kinds import paging
from rootcellar.models.loader import check_weights, load_params
from rootcellar.models.model import ModelConfig
from rootcellar.models.params import check_params, count_bytes, declare, init_params, path_name
from rootcellar.models.spec import Params
from rootcellar.ops.backends import choose_backend, preferred
from rootcellar.plan.sizing import ARENA
from rootcellar.pools import Pool
from rootcellar.runner import CompileCounter, Placement, Programs, Runner, Shapes, pools_of
from rootcellar.runner.large_pages import in_large_pages
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Loads, NgramGuesser, Prefetcher, Scheduler, Snapshots
from rootcellar.text import Tokenizer
from rootcellar.tiers.host import HostMemory
from rootcellar.tiers.mover import Mover
from rootcellar.transfer.events import EventPublisher, EventSettings
from rootcellar.transfer.receiver import Receiver
from rootcellar.transfer.sender import Sender
from rootcellar.units import gb

log = logging.getLogger(__name__)

WORTH_LOADING = 10
"""Tokens that host memory must add to a hit; fewer are computed sooner than loaded (SGLang draws the same line)."""
_LATER = 4
"""Times as long as rank 0 has for a grammar, other ranks have."""
TRIES = 32
"""Places of equal text that are compared for a guess, the newest first."""
NOTED = 2
"""Pages that the cache knows to be in a store, for each on the device and the host; it is asked about others again."""


@dataclass(frozen=True)
class Weights:
    """Parameters, and what they are, in a word: see ``identity``. What was read lies where it is computed with."""

    params: Params
    identity: str


@dataclass(frozen=True)
class Parts:
    """What an engine is made of.

    ``context_length``: longest request in tokens; ``total_tokens``: what the KV cache holds; ``backend``: the attention
    backend that runs.
    """

    config: EngineConfig
    model: ModelConfig
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]
    """Tokens that end an answer unless it ignores them: the configs' ends of text, and the tokenizer's."""
    scheduler: Scheduler
    runner: Runner
    compiles: CompileCounter
    dtype: jnp.dtype
    context_length: int
    total_tokens: int
    max_running_requests: int
    backend: str
    fingerprint: bytes
    weights: str
    """What pages' names begin with, and what the weights are, in a word; see ``identity``."""
    reload: Callable[[], Weights] | None
    """Gives the weights again; None when they were handed over."""
    grammars: Grammars | None
    """What makes requests' grammars; None without a tokenizer."""
    sizing: Sizing
    """How the KV cache's size came about: ``memory.report`` puts it into words."""
    host: HostMemory | None
    mover: Mover | None
    """The tier in host memory and who copies to and from it; None without ``enable_hierarchical_cache``."""
    prefetcher: Prefetcher
    """What waiting requests want of the store behind it."""
    peers: Sender | Receiver | None
    """What gives pages to decode nodes, or takes them from prefill nodes; None where both are this engine's."""
    events: EventPublisher | None
    """What tells others what the cache stores and removes; None: nobody."""
    trace: TraceLog | None
    """What writes down what was asked; None: nobody wants that, or another rank does it."""

    @property
    def identity(self) -> str:
        """Whose pages these are, for people who look at a store."""
        return f"{self.model.architecture} {self.fingerprint.hex()[:16]}"

    @property
    def overlap(self) -> bool:
        """Whether the next step is planned while one runs."""
        return not self.config.disable_overlap_schedule


def folder_of(model_path: str) -> Path:
    """The folder that ``model_path`` names: its own, or that of the embedded model."""
    if not isinstance(model_path, str | os.PathLike):
        raise ConfigError(f"model_path must be the path of a folder, not {model_path!r}")
    return demo.path() if model_path == "demo" else Path(model_path)


def sampling_defaults(model_path: str) -> dict[str, Any]:
    """What ``generation_config.json`` recommends for sampling; nothing where the model has none.

    ``ModelError`` for a value that is not allowed. The keys are those that SGLang and vLLM read.
    """
    path = folder_of(model_path) / "generation_config.json"
    found = read_json(path) or {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: found[name] for name in names if found.get(name) is not None}
    try:
        SamplingParams.from_dict(given)
    except RequestError as error:
        raise ModelError(f"{path}: {error}") from error
    return given


def live_weights(params: Params, name: str | None) -> Weights:
    """Weights that somebody holds, by the name that they give them, or this run's alone."""
    if name is None:
        return Weights(params, identity.weights_of_this_run())
    return Weights(params, identity.weights_named(identity.check_name("weights_name", name)))


def load_weights(folder: Path, parts: Parts) -> Weights:
    """The weights of another folder, in the dtype of the engine's own; the folder's config must be the same model."""
    model = load_config(folder)
    if model != parts.model:
        theirs, ours = (_settings(cfg) for cfg in (model, parts.model))
        differs = sorted({name.split(".")[-1] for name, _ in theirs.items() ^ ours.items()})
        raise ModelError(f"{folder} holds another model: its {', '.join(differs)} differ; start a new engine for it")
    return _read(folder, parts.runner.placement, parts.dtype)


def _settings(model: ModelConfig) -> dict[str, object]:
    """Every setting of a model by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.asdict(model), is_leaf=lambda x: x is None)
    return {path_name(path): value for path, value in leaves}


def build(config: EngineConfig, params: Params | None = None, weights_name: str | None = None) -> Parts:
    """Load the model and allocate the KV cache; ``params``: weights to use as they are instead of reading them.

    Raises:
        ConfigError: a setting does not fit the model or the machine.
        ModelError: the model's folder, config, tokenizer or tensors are missing or not understood.
    """
    compiles = CompileCounter()
    _keep_compiled(config.compilation_cache_dir)
    folder = folder_of(config.model_path)
    if params is None and weights_name is not None:
        raise ConfigError("weights_name is for params: a checkpoint's weights are called after its files")
    model = _model(config, folder, params)
    tokenizer = None if config.skip_tokenizer_init else Tokenizer(folder)
    if params is not None:
        check_params(model, params)
    invariance.require(config, model)
    fixed = config.enable_deterministic_inference
    types = numbers(config, model, loads=params is None)
    placement = Placement(model, config.tp_size, types.holding, fixed)
    load = functools.partial(_load, config, folder, placement, types.computed)
    dtype = types.computed if params is None else _dtype_of(model, params)
    programs = _programs(config, placement, dtype, types.kv)
    kinds = programs.paging.kinds
    context = _context_length(config.context_length, model)
    # Before the weights: what does not fit is refused while nothing is allocated.
    sizing = memory.size(config, programs, context, params)
    rows = memory.size_host(sizing, programs, loads=params is None) if config.enable_hierarchical_cache else None
    total, running = sizing.division.tokens, sizing.max_running_requests
    # No request is longer than the cache: a context of millions must not make page tables of millions.
    shapes = Shapes.of(config.chunked_prefill_size, running, _guessed(config))
    width = -(-min(context, total) // config.page_size)
    programs = dataclasses.replace(programs, shapes=shapes, table_width=width)
    trace = None if config.record_trace is None or config.node_rank else TraceLog(config.record_trace, config.page_size)
    weights = load() if params is None else live_weights(placement.place(params), weights_name)
    pools = pools_of(programs.paging, placement, sizing.division.pages, sizing.division.spare_states)
    _log_pools(pools, programs, total)
    runner = Runner(programs, weights.params, pools)
    dtypes = str(types.weights if params is None else dtype), types.kv
    names = identity.fingerprint(model, kinds, *dtypes, config.page_size, config.quantization, fixed=fixed)
    host = None if rows is None else _host_memory(rows, programs)
    mover = None if host is None else Mover(runner.copiers, host.images, runner.pool_of)
    images = {name: programs.image_bytes[pool] for name, pool in runner.pool_of.items()}
    loads = Loads(programs.paging.kinds, config.page_size, images, always=config.disaggregation_mode == "decode")
    told = None if config.kv_events_config is None else EventSettings.read(config.kv_events_config)
    scheduler = _scheduler(config, programs, pools, running, names, host, loads)
    stop_ids = _stop_ids(model, tokenizer)
    return Parts(
        config,
        model,
        tokenizer,
        stop_ids,
        scheduler,
        runner,
        compiles,
        dtype,
        context,
        total,
        running,
        programs.backend,
        names,
        weights.identity,
        load if params is None else None,
        None if tokenizer is None else _grammars(config, tokenizer, model.vocab_size, stop_ids),
        sizing,
        host,
        mover,
        Prefetcher(scheduler, functools.partial(digests, page_size=config.page_size, fingerprint=names)),
        None if mover is None or host is None else open_peers(config, runner, host, mover, types.kv, names),
        None if told is None or told.publisher != "zmq" or config.node_rank else EventPublisher(told),
        trace,
    )


def _host_memory(rows: Mapping[str, int], programs: Programs) -> HostMemory:
    """The tier in host memory, with so many pages of each pool."""
    host = HostMemory(rows, programs.image_bytes)
    counts = ", ".join(f"{name} {count}" for name, count in rows.items())
    log.info("Host KV cache allocated. #pages: %s, size: %s GB", counts, gb(host.nbytes))
    return host


def _grammars(config: EngineConfig, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> Grammars:
    bounds = Bounds(
        config.max_grammar_length,
        config.max_grammar_depth,
        # Where rank 0 was in time, no other may be late.
        config.grammar_compile_timeout * (_LATER if config.node_rank else 1),
        config.disable_additional_properties,
    )
    made = functools.partial(
        Grammars, tokenizer, vocab_size, tuple(sorted(stop_ids)), bounds, config.max_queued_requests
    )
    return made() if config.nnodes == 1 else made(step_seconds=math.inf)  # ranks do not agree on what is slow


def _stop_ids(model: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """A chat model's end of turn may be known to its tokenizer alone."""
    last = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset(id for id in (*model.eos_token_ids, last) if id is not None and 0 <= id < model.vocab_size)


def _scheduler(
    config: EngineConfig,
    programs: Programs,
    pools: Mapping[str, Pool],
    running: int,
    fingerprint: bytes,
    host: HostMemory | None,
    loads: Loads,
) -> Scheduler:
    """The cache over the pools' pages, the host's rows and what a store may have, and the scheduler over the cache."""
    kinds, arena, shapes = programs.paging.kinds, programs.paging.arena, programs.shapes
    tiers = {Tier.DEVICE: {name: pool.pages for name, pool in pools.items()}}
    if host is not None:
        tiers[Tier.HOST] = {name: len(images) for name, images in host.images.items()}
        near = tiers[Tier.DEVICE], tiers[Tier.HOST]
        tiers[Tier.STORAGE] = {name: NOTED * sum(pages[name] for pages in near) for name in pools}
    if config.disaggregation_mode == "decode":
        tiers[Tier.PEER] = tiers[Tier.STORAGE]
    cache = RadixCache(
        kinds,
        page_size=config.page_size,
        capacity={
            (name, tier): count * pools[name].layout.page_size
            for tier, pages in tiers.items()
            for name, count in pages.items()
        },
        arenas={ARENA: arena} if arena else None,
        max_leases=running,
        max_length=programs.table_width * config.page_size,
        policy=config.radix_eviction_policy,
        write_policy=config.hicache_write_policy,
        min_load={Tier.HOST: 1 if config.disaggregation_mode == "decode" else WORTH_LOADING},
        fingerprint=fingerprint,
        events=config.kv_events_config is not None and not config.node_rank,
        reuse=not config.disable_radix_cache,
    )
    if host is not None:
        cache.write_to(Tier.STORAGE, False)  # until there is a store
    recurrent = any(kind.rule == "recurrent" for kind in kinds)
    return Scheduler(
        cache,
        chunked_prefill_size=config.chunked_prefill_size,
        max_running_requests=running,
        schedule_policy=config.schedule_policy,
        reuse=not config.disable_radix_cache,
        tiles_of=shapes.tiles_of,
        max_tiles=shapes.prefill_tiles,
        snapshots=Snapshots(config.page_size, config.mamba_track_interval) if recurrent else None,
        loads=loads,
        guesses=_guesser(config, shapes),
        reserved=config.num_reserved_decode_tokens if config.disaggregation_mode == "decode" else 0,
    )


def _guessed(config: EngineConfig) -> int:
    """Most tokens that are guessed of a request in one step."""
    return 0 if config.speculative_algorithm is None else config.speculative_num_draft_tokens


def _guesser(config: EngineConfig, shapes: Shapes) -> NgramGuesser | None:
    if config.speculative_algorithm is None:
        return None
    capacity, longest = config.speculative_ngram_capacity, config.speculative_ngram_max_match_window_size
    # Of what is not to be shared nothing is said either.
    shared = capacity > 0 and not config.disable_radix_cache
    return NgramGuesser(
        Suffixes(capacity, longest, TRIES) if shared else None,
        most=config.speculative_num_draft_tokens,
        least=config.speculative_ngram_min_match_window_size,
        longest=longest,
        rows=shapes.verified,
    )


def _log_pools(pools: Mapping[str, Pool], programs: Programs, tokens: int) -> None:
    nbytes = sum(pool.nbytes for pool in pools.values())
    log.info("Fused KV cache allocated. #tokens: %d, size: %s GB", tokens, gb(nbytes))
    kinds, pool_of = programs.paging.kinds, programs.paging.pool_of
    if len(kinds) == 1:
        return
    for name, pool in pools.items():
        within = [f"{k.name} of {len(k.layers)} layers" for k in kinds if pool_of[k.name] == name]
        log.info("Pool of %s: #pages: %d, size: %s GB", ", ".join(within), pool.pages, gb(pool.nbytes))


def _programs(config: EngineConfig, placement: Placement, dtype: jnp.dtype, kv_dtype: str) -> Programs:
    """What will run, at the largest shapes that it may have."""
    pages = paging(
        placement.served,
        kv_dtype,
        config.page_size,
        arena=not config.disable_kv_arena,
        experts=config.enable_return_routed_experts,
    )
    if config.enable_deterministic_inference:
        backend = invariance.backend(pages.attended)
    else:
        backend = choose_backend(config.attention_backend, pages.attended, jax.default_backend())
    return Programs(
        placement,
        dtype,
        pages.laid(lambda layout: preferred(backend, layout, jax.default_backend())),
        backend,
        Shapes.of(
            config.chunked_prefill_size, memory.running_requests(config, config.max_total_tokens), _guessed(config)
        ),
        -(-_context_length(config.context_length, placement.model) // config.page_size),
        config.max_logprobs,
        config.logprobs_mode == "processed_logprobs",
    )


def _model(config: EngineConfig, folder: Path, params: Params | None) -> ModelConfig:
    """The model, with its weights' headers checked, so that a wrong config is refused before anything is compiled."""
    saved = params is None and config.load_format != "dummy"
    model = load_config(folder, weights=saved)
    if saved:
        check_weights(folder, model)
    if params is not None and "head" in params:  # what was handed over says whether the head is tied
        model = dataclasses.replace(model, tie_word_embeddings=False)
    return model


def _load(config: EngineConfig, folder: Path, placement: Placement, dtype: jnp.dtype) -> Weights:
    if config.load_format == "dummy":
        seeded = identity.weights_named(f"dummy {config.random_seed}")
        params = init_params(placement.model, config.random_seed, dtype, hold=placement.hold_at)
        return _settled(params, seeded)
    return _read(folder, placement, dtype)


def _read(folder: Path, placement: Placement, dtype: jnp.dtype) -> Weights:
    name = identity.weights_in_files(weight_files(folder), _user_cache() / "weights.json")
    with loading_bar(count_bytes(placement.model, dtype)) as advance:
        return _settled(load_params(folder, placement.model, dtype, placement.hold_at, advance), name)


def _settled(params: Params, name: str) -> Weights:
    """Parameters that were put where they are computed with, one by one."""
    in_large_pages(jax.tree.leaves(params))
    return Weights(params, name)


def _dtype_of(model: ModelConfig, params: Params) -> jnp.dtype:
    """Weights that were handed over are computed with as they are."""
    leaves = zip(jax.tree.leaves(declare(model)), jax.tree.leaves(params), strict=True)
    return jnp.result_type(*(array for spec, array in leaves if not spec.wide))


def _context_length(wanted: int | None, model: ModelConfig) -> int:
    limit = model.context_length
    if wanted is None:
        return limit
    if wanted > limit:
        raise ConfigError(
            f"context_length={wanted} is more than the model was made for: at most {limit} "
            "(max_position_embeddings and rope scaling in its config.json)"
        )
    return wanted


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootcellar"


def _keep_compiled(folder: str | None) -> None:
    """Let JAX keep compiled programs on disk, unless the program that uses us has decided already."""
    if folder == "off" or jax.config.jax_compilation_cache_dir is not None:
        return
    if folder is None:
        folder = str(_user_cache() / "compiled")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

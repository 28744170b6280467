"""The public engine: text or token ids in, text and token ids out.

Names of arguments and of what comes back are those of SGLang's offline engine, so that its users are at home.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

from rootcellar.cache import RadixCache
from rootcellar.config import EngineConfig
from rootcellar.engine import memory
from rootcellar.engine.build import Parts, build
from rootcellar.engine.clock import Clock
from rootcellar.engine.closing import close_at_the_end
from rootcellar.engine.commands import Abort, AbortAll, Continue, Flush, Pause, Release, Resume
from rootcellar.engine.incoming import IncomingWeights
from rootcellar.engine.intake import Intake
from rootcellar.engine.lifecycle import read_tags
from rootcellar.engine.mailbox import Mailbox, Post
from rootcellar.engine.meeting import meet
from rootcellar.engine.output import in_order, show
from rootcellar.engine.pictures import ImageData
from rootcellar.engine.prefixes import Prefixes
from rootcellar.engine.ranks import loop_of
from rootcellar.engine.requests import MANY_PROMPTS, encode, read_inputs, takes_long
from rootcellar.engine.rooms import Rooms
from rootcellar.engine.sight import Sight
from rootcellar.engine.storage import DRAIN, StorageBackend
from rootcellar.engine.warmup import WarmUp
from rootcellar.engine.weights import TakesWeights
from rootcellar.errors import EngineError, RequestError
from rootcellar.models.encoders import Encoder
from rootcellar.models.params import Params
from rootcellar.models.repacking import wanted_tensors
from rootcellar.text import Tokenizer
from rootcellar.tiers.settings import Extra

log = logging.getLogger(__name__)

Result = dict[str, Any]
# Logprobs that are rendered beside the event loop rather than on it (about 2 ms).
_MANY = 1_000


class Engine(TakesWeights):
    """An LLM with its KV cache, on a thread of its own; use it as a context manager.

        with rootcellar.Engine(model_path="demo") as engine:
            engine.generate(prompt="What is a page?", sampling_params={"temperature": 0})["text"]

    All methods may be called from any thread. ``sight`` shows what goes on: numbers, requests, the radix tree, a trace;
    ``prefixes`` explains and pins what is cached; ``programs`` compiles ahead.
    """

    def __init__(
        self,
        *,
        params: Params | None = None,
        weights_name: str | None = None,
        clock: Clock = Clock(),  # noqa: B008  (a frozen value)
        **options: Any,
    ) -> None:
        """Load the model and allocate the KV cache.

        Args:
            params: weights to use instead of reading them from ``model_path`` (whose ``config.json`` is still read): a
                pytree as ``rootcellar.models.declare`` describes; used as it is, without a copy.
            weights_name: what ``params`` are: whoever gives equal names answers for equal weights, and their pages have
                equal names too. None: they are this run's alone.
            clock: what tells the time, to deadlines, the ends of pins and whatever is measured.
            **options: the settings of :class:`rootcellar.config.EngineConfig` (see ``docs/configuration.md``).

        Raises:
            ConfigError: a setting is unknown or wrong.
            ModelError: the model's folder, config, tokenizer or tensors are missing or not understood.
        """
        self.config = EngineConfig.from_kwargs(**options)
        logging.getLogger("rootcellar").setLevel(self.config.log_level.upper())
        exchange = self._exchange = meet(self.config) if self.config.nnodes > 1 else None
        self._clock = clock
        try:
            self._parts: Parts = build(self.config, params, weights_name)
            self._loop = loop_of(
                self._parts,
                exchange,
                max_running=self._parts.max_running_requests,
                max_queued=self.config.max_queued_requests,
                total_tokens=self._parts.total_tokens,
                clock=clock,
                log_interval=self.config.log_interval,
                overlap=self._parts.overlap,
            )
        except BaseException as error:
            if exchange is not None:
                exchange.close(f"rank {exchange.rank} could not start: {error}")
            raise
        self.sight = Sight(self._loop, self._parts)
        self._last_post: Post | None = None
        self._close = close_at_the_end(self, self._loop, self._parts, exchange)
        self.prefixes = Prefixes(self._loop, self._parts)
        self.rooms = Rooms(self._loop)
        self.programs = WarmUp(self._loop, self._parts.compiles)
        self._intake = Intake(self._parts, clock)
        self._incoming = IncomingWeights(wanted_tensors(self._parts.model))
        try:
            self.storage = StorageBackend(self._loop, self._parts)
        except BaseException:
            self._close()
            raise
        log.info(
            "ready: %s, %s attention, %d tokens of KV cache in pages of %d",
            self._parts.model.architecture,
            self._parts.backend,
            self._parts.total_tokens,
            self.config.page_size,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to one less than this."""
        return self._parts.model.vocab_size

    @property
    def encoder(self) -> Encoder | None:
        """What looks at images; None: the model knows none."""
        return self._parts.model.encoder

    @property
    def image_token(self) -> int | None:
        """The token that stands in a prompt where an image is to be; None: the model knows none."""
        return None if self.encoder is None else self.encoder.token

    @property
    def longest_prompt(self) -> int:
        """Most tokens that a prompt may have, with one token of answer."""
        return min(self._parts.context_length, self._parts.total_tokens) - 1

    @property
    def total_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._parts.total_tokens

    @property
    def max_running_requests(self) -> int:
        """Most requests that are computed at the same time."""
        return self._parts.max_running_requests

    @property
    def attention_backend(self) -> str:
        """The attention backend that runs: ``"native"``, ``"xla"``, or ``"fixed"`` for deterministic inference."""
        return self._parts.backend

    @property
    def _cache(self) -> RadixCache:
        return self._parts.scheduler.cache

    # -- generation -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        return_text_in_logprobs: bool = True,
        rid: str | Sequence[str] | None = None,
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
        raise_on_failure: bool = True,
    ) -> Result | list[Result] | Iterator[Result]:
        """Continue one prompt or several.

        Args:
            prompt: a text or a list of texts; or give ``input_ids``, token ids or a list of them.
            sampling_params: keys of :class:`rootcellar.sampling_params.SamplingParams`; one dict for all prompts or a
                list with one for each. Without ``max_new_tokens``, at most 128 and at most what fits the context.
            input_ids: token ids instead of ``prompt``.
            stream: give an iterator of results that grow; the last has a ``finish_reason``. Leaving it early aborts.
            return_logprob: report the logprob of each generated token (``output_token_logprobs``), as ``logprobs_mode``
                says: under the model's own distribution, or the one that it was drawn from.
            logprob_start_len: with ``return_logprob``, report prompt tokens from this index on as well
                (``input_token_logprobs``; that part of the prompt is computed again even where it is cached); -1: none.
            top_logprobs_num: also report this many of the likeliest tokens at each place.
            return_text_in_logprobs: with the text of each token; None stands in its place else.
            rid: a name for the call, or a list with one for each prompt, for :meth:`abort_request`; at most 256
                characters. Several prompts of one name are ``rid-0``, ``rid-1``, ..., and so are ``n`` answers.
            priority: higher goes first.
            extra_key, cache_salt: requests that differ in either share no cache (an adapter, a secret).
            tenant: on whose behalf. What it caches and calls its requests is its own (but see
                ``share_cache_across_keys``). Tenants get equal shares, and within them so do their calls.
            storage_checkpoint: write what it leaves to the store at once; ``meta_info["storage_checkpoint"]`` names it.
            storage_checkpoint_dependency: such a name; wait until the store has that, or cannot come to have it.
            bootstrap_host, bootstrap_port, bootstrap_room: with ``disaggregation_mode``, where the request for the same
                prompt on the other node is met; a list has one for each answer.
            image_data: images of the prompt, in the order in which it has the model's token for one: a file, its bytes,
                a PIL image, an array (uint8 [height, width, 3]), or a list of them. Of several prompts a list with one,
                a list, or None for each.
            return_routed_experts, routed_experts_start_len: the experts that tokens from this one on went through, in
                ``meta_info["routed_experts"]`` (docs/rl.md#routing-replay).
            raise_on_failure: False: an answer that failed is a result like the others, with a ``finish_reason``.

        Returns:
            For one prompt and ``n=1`` a dict, else a list in the order of the prompts (and within a prompt its ``n``
            answers): ``{"text", "output_ids", "meta_info": {"id", "prompt_tokens", "completion_tokens",
            "cached_tokens", "finish_reason", "e2e_latency", "queue_time", "first_token_latency", "retractions",
            "weight_version", "stages", ...}}``. Latencies are seconds. ``finish_reason["type"]`` is ``"stop"``,
            ``"length"`` or ``"abort"``; an aborted or timed-out request has what it had, and a ``message``. With
            ``stream``, an iterator of such dicts, with an ``"index"`` when there are several.

        Raises:
            RequestError: a prompt or parameter is wrong; nothing was started.
            RequestTooLarge: a request can never fit; the message says which setting would let it.
            GenerationFailed: an answer failed; it comes when all have ended, with their results. Aborts are results.
            EngineError: the engine was shut down.
        """
        inputs = read_inputs(
            self._parts,
            prompt,
            input_ids,
            sampling_params,
            received=self._clock.now(),
            rid=rid,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            return_text_in_logprobs=return_text_in_logprobs,
            priority=priority,
            extra_key=extra_key,
            cache_salt=cache_salt,
            tenant=tenant,
            storage_checkpoint=storage_checkpoint,
            storage_checkpoint_dependency=storage_checkpoint_dependency,
            bootstrap_host=bootstrap_host,
            bootstrap_port=bootstrap_port,
            bootstrap_room=bootstrap_room,
            image_data=image_data,
            return_routed_experts=return_routed_experts,
            routed_experts_start_len=routed_experts_start_len,
        )
        results = self._intake.run(self._loop, inputs, stream, strict=raise_on_failure and stream)
        return results if stream else in_order(list(results), several=inputs.several, strict=raise_on_failure)

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        raise_on_failure: bool = True,
        **options: Any,
    ) -> Result | list[Result] | AsyncIterator[Result]:
        """:meth:`generate` for asyncio: the same arguments, errors and results; an async iterator with ``stream``.

        Cancelling the task, or leaving the iterator early, aborts the requests. A reader that is slower than the engine
        misses steps in between, never text: each result holds all that came before.
        """
        mailbox, input_ids = Mailbox(post := self._post()), options.pop("input_ids", None)
        options |= {"received": self._clock.now(), "require_room": self.require_room}
        read = functools.partial(read_inputs, self._parts, prompt, input_ids, sampling_params, **options)
        # What is short is read sooner than a thread is woken.
        inputs = await post.aside(read) if takes_long(prompt, input_ids, options.get("image_data")) else read()
        compiling = self._intake.grammars(inputs)
        grammars = None if compiling is None else await asyncio.wrap_future(compiling)
        submit = self._intake.submit(inputs, stream)
        make = functools.partial(self._intake.trackers, submit, grammars, mailbox.deliver)
        trackers = await post.aside(make) if len(inputs.items) > MANY_PROMPTS else make()
        try:
            await asyncio.wrap_future(self._loop.post(submit, trackers))
        except asyncio.CancelledError:
            self._loop.abandon(submit.call)
            raise

        strict = raise_on_failure and stream

        async def receive() -> AsyncIterator[Result]:
            ended = 0
            try:
                yield {}  # begun, as in ``Intake.run``
                async for index, output in mailbox.outputs(len(trackers)):
                    ended += output.finish is not None
                    draw = functools.partial(show, output, index if inputs.several else None, strict)
                    yield await post.aside(draw) if output.unrendered > _MANY else draw()
            finally:
                if ended < len(trackers):
                    self._loop.abandon(submit.call)

        results = receive()
        await anext(results)
        if stream:
            return results
        return in_order([r async for r in results], several=inputs.several, strict=raise_on_failure)

    def require_room(self, sequences: int, tenant: str = "") -> None:
        """Raise ``QueueFull`` where so many more of ``tenant`` were refused now, as far as is known at once."""
        self._loop.machine.places.require_known(tenant, sequences)

    def _post(self) -> Post:
        """The post to the running event loop; calls on one loop share it."""
        loop = asyncio.get_running_loop()
        if self._last_post is None or self._last_post.loop is not loop:
            self._last_post = Post(loop)
        return self._last_post

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ``RequestError`` when there is none."""
        if self._parts.tokenizer is None:
            raise RequestError("this needs the tokenizer: leave skip_tokenizer_init at False")
        return self._parts.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, as :meth:`generate` would compute them."""
        return encode(self.tokenizer, text)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """A conversation (``[{"role": "user", "content": "..."}, ...]``) as token ids for :meth:`generate`.

        Special tokens that messages hold are text. ``options`` are those of :meth:`Tokenizer.chat`.
        """
        return self.tokenizer.chat(messages, **options).ids

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of a conversation by the model's chat template; :meth:`chat_ids` keeps users from special tokens.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``.
            **options: ``tools``, ``add_generation_prompt``, ``continue_final_message``, the template's variables.
        """
        return self.tokenizer.apply_chat_template(messages, **options)

    # -- control --------------------------------------------------------------------------------------------------

    def abort_request(self, rid: str, tenant: str | None = None) -> int:
        """End what the call or the answer named ``rid`` computes: whoever waits gets what there is, with finish_reason
        "abort". The name of a call ends all its answers. ``tenant``: whose (None: anybody's). Returns how many ended.
        """
        return self._loop.run(Abort(rid, tenant, "aborted by abort_request"))

    def abort_all(self, message: str = "aborted by abort_all", *, shutdown: bool = False) -> int:
        """End every request, with ``message``; returns how many. ``shutdown``: because there will be no more."""
        return self._loop.run(AbortAll(message, "shutdown" if shutdown else "asked"))

    def flush_cache(self) -> None:
        """Forget every cached prefix.

        Raises:
            EngineError: requests wait or run; the message says how many.
        """
        self._loop.run(Flush())

    def pause_generation(self, mode: str = "abort") -> None:
        """Compute nothing until :meth:`continue_generation`; new requests wait.

        Args:
            mode: what becomes of the requests that run: ``"abort"`` ends all, waiting ones too; ``"retract"`` lets them
                wait again with the tokens that they have and gives their memory back; ``"in_place"`` keeps all of it.
        """
        self._loop.run(Pause(mode))

    def continue_generation(self) -> None:
        """Undo :meth:`pause_generation`."""
        self._loop.run(Continue())

    def release_memory_occupation(
        self,
        tags: str | Sequence[str] | None = None,
        *,
        mode: str = "wait",
        preserve: bool = False,
        clear_compiled: bool = False,
    ) -> dict[str, Any]:
        """Give device memory back, at once: each buffer is deleted.

        What is released already stays released. Until :meth:`resume_memory_occupation`, new requests are refused.

        Args:
            tags: ``"kv_cache"``, ``"weights"`` or a list of them; None: both. Weights that were handed over are not
                deleted, only no longer held.
            mode: what becomes of the requests that run: ``"wait"`` for their end (waiting ones go on waiting),
                ``"abort"`` all, or ``"retract"``: they wait, and go on with the same tokens after the resume.
            preserve: copy the cached prefixes to host memory first; after the resume they are hits.
            clear_compiled: forget compiled programs too (``jax.clear_caches``, for the whole process): the next steps
                compile again, or come from ``compilation_cache_dir``.

        Returns:
            ``{"buffers", "bytes"}`` that were deleted now, and ``"resident_bytes"``: how much less of the process is in
            the machine's memory (None where the system does not say). On a CPU the two differ by what was never
            written; on an accelerator the bytes are the device's.
        """
        return self._loop.run(Release(read_tags(tags), mode, preserve, clear_compiled))

    def resume_memory_occupation(self, tags: str | Sequence[str] | None = None) -> dict[str, Any]:
        """Take back what :meth:`release_memory_occupation` gave: the same shapes, so nothing compiles.

        The KV cache comes back empty, or with the prefixes that were preserved; weights are read again from where they
        came. In any order, and harmless when nothing was released.

        Returns:
            ``{"buffers", "bytes"}`` that were allocated now.

        Raises:
            EngineError: the weights were handed over: give new ones with :meth:`update_weights`.
        """
        return self._loop.run(Resume(read_tags(tags)))

    def attach_storage(
        self, backend: str, extra_config: Extra = None, *, prefetch_policy: str | None = None, replace: bool = False
    ) -> dict[str, Any]:
        """Keep what host memory holds in a store as well, and look there for the prompts of new requests.

        While requests run. The arguments are the values of ``hicache_storage_backend`` and of the settings that begin
        like it. ``replace``: detach the store that there is first. Returns what is attached, by the same names.

        Raises:
            ConfigError: a setting is wrong, there is a store already, or no ``enable_hierarchical_cache``.
        """
        return self.storage.attach(backend, extra_config, prefetch_policy=prefetch_policy, replace=replace)

    def detach_storage(self, timeout: float = DRAIN) -> bool:
        """Stop using the store, while requests run; False when there was none. Its pages stay in it, and on the host.

        What is under way ends first; what was not begun after ``timeout`` seconds is given up.

        Raises:
            EngineError: the store does not return; nothing new is given to it, so try again later.
        """
        return self.storage.detach(timeout)

    def follow(self) -> None:
        """On another rank than 0: wait until the engine ends. ``EngineError``: rank 0 was not told to end it."""
        why = self._loop.await_end()
        if self._exchange is not None and not self._exchange.in_order:
            raise EngineError(why)

    def check(self) -> None:
        """Prove the cache's invariants between two steps; raises ``CacheBroken`` with the evidence."""
        self._loop.call(self._cache.check)

    def warm_up(self) -> int:
        """Compile every shape that a step may have, so that later requests compile nothing. Returns compilations."""
        return self.programs.all()

    def stats(self) -> dict[str, Any]:
        """What the engine holds and did, as plain values; tokens where no other unit is named.

        ``{"running", "waiting", "stages", "finished", "retractions", "steps", "generated_tokens", "prefill_tokens",
        "spec_verify_ct", "spec_draft_tokens", "spec_accepted_tokens", "prompt_tokens", "cached_tokens",
        "outside_seconds", "compilations", "kv_cache_bytes", "requests", "input_tokens", "hit_tokens",
        "hit_tokens_by_tier", "hit_rate", "nodes", "occupancy": {tier: {"used", "busy"}}, "cache": {kind: {tier: {
        "size", "free", "used", "cached", "pinned", "evictable", "leased", "in_flight", "evicted"}}}}``
        """
        return self.sight.stats()

    def status(self) -> dict[str, Any]:
        """What it does: ``{"paused", "released" (tags), "weight_version", "steps", "unfinished" (requests)}``."""
        return self.sight.status()

    def memory_report(self) -> dict[str, Any]:
        """How the KV cache's size came about: every figure (bytes, tokens), and its ``"derivation"`` in words."""
        return memory.report(self._parts.sizing)

    def shutdown(self) -> None:
        """Abort what is left, stop the threads and give the KV cache's memory back. Safe to call twice.

        With ``hicache_storage_save_on_exit`` what the store lacks is written to it first.
        """
        self.storage.end(save=self.config.hicache_storage_save_on_exit)
        self._close()

"""Every setting of the engine, declared once.

The command-line options, the checks and ``docs/configuration.md`` all come from :class:`EngineConfig`; names are
those that SGLang's users know. ``python -m rootcellar.config_page`` prints the documentation page.
"""

from dataclasses import dataclass
from typing import Any, Self

from rootcellar.errors import ConfigError
from rootcellar.options import check_names, check_values, option
from rootcellar.sampling_params import MAX_SEED
from rootcellar.units import parse_bytes


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of one engine. Constructing it checks every value; a wrong one raises ConfigError."""

    model_path: str = option(
        "demo",
        "Folder of a Hugging Face checkpoint (config.json, safetensors, tokenizer), or 'demo' for the small model "
        "that ships with the package.",
        path=True,
    )
    load_format: str = option(
        "auto",
        "Where the weights come from: 'auto' reads the safetensors of model_path, 'dummy' fills the shapes of its "
        "config.json with random numbers from random_seed.",
        choices=("auto", "dummy"),
    )
    dtype: str = option(
        "auto",
        "Type of weights and activations. 'auto' takes the checkpoint's own on an accelerator, and float32 on a CPU. A "
        "CPU that loads weights itself, on one device, computes in float32 always, since it is several times slower in "
        "bfloat16: then 'bfloat16' is how the weights of products and the KV cache lie in memory, as those weights do "
        "under 'auto' where they were saved so.",
        choices=("auto", "bfloat16", "float32"),
    )
    quantization: str | None = option(
        None,
        "Keep the weights of products as integers, made of any checkpoint while it is read: 'w8' takes 8.5 bits of a "
        "weight, 'w4' 5 (of the vocabulary's 8.5), in groups of 32 with scales of their own. Arithmetic stays as dtype "
        "says, but that CPUs multiply rows of 16 bits by them.",
        choices=("w8", "w4"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type of the cached keys and values. 'auto' is the same as dtype; 'bf16' is short for 'bfloat16'. Those of few "
        "bits have scales of their own for each token and head, or for 16 elements: 'int8', 'fp8_e4m3' and 'fp8_e5m2' "
        "take half of bfloat16, 'k8v4' (keys int8, values fp4_e2m1) two fifths, 'fp4_e2m1' two sevenths "
        "(docs/quantised-kv.md).",
        choices=("auto", "bfloat16", "bf16", "float32", "int8", "fp8_e4m3", "fp8_e5m2", "k8v4", "fp4_e2m1"),
    )
    max_total_tokens: int | None = option(
        None,
        "Tokens that the KV cache can hold, over all requests and all cached prefixes. None takes what fits into the "
        "memory (docs/memory.md); a number is kept to exactly, in whole pages, or refused when it does not fit.",
        low=1,
    )
    mem_fraction_static: float = option(
        0.9,
        "The part of the usable memory that weights, activations and KV cache may take together.",
        low=0,
        high=1,
        above=True,
    )
    device_memory: str | None = option(
        None,
        "Usable memory of a device, as '4GB' or '512MiB'. None takes what an accelerator reports; on CPU, half of the "
        "machine's memory.",
    )
    swa_full_tokens_ratio: float = option(
        1.0,
        "For models with sliding-window layers beside full ones: tokens that the windowed layers hold for each token "
        "of the full ones. Lower it when requests are much longer than the window. Other models: no effect.",
        low=0,
        high=1,
        above=True,
    )
    disable_kv_arena: bool = option(
        False,
        "Give each kind of layers a pool of its own, divided by swa_full_tokens_ratio, instead of one that all kinds "
        "whose pages take the same bytes share. Models of one kind: no effect.",
    )
    mamba_full_memory_ratio: float = option(
        0.9,
        "For models with recurrent layers beside attention: bytes of recurrent states for each byte of keys and "
        "values (with max_total_tokens, at least 4 states for each running request). Raise it when many short requests "
        "run. Other models: no effect.",
        low=0,
        above=True,
    )
    max_mamba_cache_size: int | None = option(
        None,
        "For models with recurrent layers: states that the cache holds, those of running requests included. None "
        "follows from mamba_full_memory_ratio. Other models: no effect.",
        low=2,
    )
    mamba_track_interval: int = option(
        256,
        "For models with recurrent layers: a state is left in the cache every so many tokens (rounded up to whole "
        "pages) of a prompt and of its answer, besides where prompts part and end. Smaller lets more prompts resume "
        "near where they part, and cuts prefill into smaller steps. Other models: no effect.",
        low=1,
    )
    page_size: int = option(
        16,
        "Tokens per page, the unit in which the cache is allocated and shared. Smaller pages share more of a prefix, "
        "larger ones cost less bookkeeping.",
        low=1,
    )
    context_length: int | None = option(
        None,
        "Longest request in tokens, prompt and answer together. None takes the model's own limit.",
        low=1,
    )
    max_running_requests: int | None = option(
        None,
        "Requests that may be computed at the same time; others wait. None lets the engine choose: "
        "one for every 128 tokens of the KV cache, from 1 to 64.",
        low=1,
    )
    max_queued_requests: int | None = option(
        None,
        "Requests of one tenant (API key) that may wait; one more is refused with an error. One call takes at most "
        "three quarters of the places. None sets no limit.",
        low=1,
    )
    request_timeout: float | None = option(
        None, "Seconds after which an unfinished request is aborted. None sets no limit.", low=0, above=True
    )
    tp_size: int = option(
        1,
        "Devices over which the weights and the KV heads of each layer are split (tensor parallelism). With fewer KV "
        "heads than devices, heads are repeated.",
        low=1,
    )
    nnodes: int = option(
        1,
        "Processes (ranks) that are one engine, each with its part of the tp_size devices, on one machine or several "
        "(docs/ranks.md).",
        low=1,
        high=1024,
    )
    node_rank: int = option(
        0, "Which of the nnodes processes this is. Rank 0 takes requests, the others do what it does.", low=0
    )
    dist_init_addr: str | None = option(
        None, "With nnodes: where the ranks meet, host:port of rank 0, the same for all. The port must be free."
    )
    dist_timeout: float = option(
        30.0,
        "With nnodes: seconds after which a rank of which nothing is heard is lost, and with it the engine: requests "
        "end with an error.",
        low=0,
        high=3600,
        above=True,
    )
    chunked_prefill_size: int = option(
        512,
        "Most prompt tokens computed in one step. Smaller chunks keep running requests responsive, larger ones "
        "finish long prompts sooner.",
        low=1,
    )
    disable_overlap_schedule: bool = option(
        False,
        "Take what a step gave before the next one is planned. Otherwise the device computes the next step meanwhile, "
        "where that changes no answer.",
    )
    schedule_policy: str = option(
        "lpm",
        "Order of the waiting requests: 'lpm' starts those with the longest cached prefix first, 'fcfs' keeps the "
        "order of arrival.",
        choices=("lpm", "fcfs"),
    )
    speculative_algorithm: str | None = option(
        None,
        "Guess ahead (docs/speculation.md): 'ngram' verifies, in the step that computes a request's newest token, "
        "those that followed where its last tokens stood before. Answers stay the same. None: each step gives a "
        "request one token.",
        choices=("ngram", "NGRAM"),
    )
    speculative_num_draft_tokens: int = option(
        15,
        "With speculative_algorithm: most tokens that are guessed of a request in one step. How many are is measured: "
        "as many as make tokens come faster, none where none do.",
        low=1,
        high=255,
    )
    speculative_ngram_min_match_window_size: int = option(
        2, "How many of a request's last tokens must stand elsewhere for what follows there to be a guess.", low=1
    )
    speculative_ngram_max_match_window_size: int = option(
        24, "How many of them are compared: of several places that with most of them is believed.", low=1
    )
    speculative_ngram_capacity: int = option(
        1_000_000,
        "Tokens of text, of prompts and answers that ended, in which is looked for what stands before a guess too; 12 "
        "bytes each. 0: requests look in their own text alone.",
        low=0,
        high=2**31,
    )
    radix_eviction_policy: str = option(
        "lru",
        "Which cached pages leave first when room is needed.",
        choices=("lru", "lfu", "fifo", "filo", "mru", "slru", "priority", "adaptive"),
    )
    disable_radix_cache: bool = option(
        False, "Share nothing between requests: every prompt is computed in full. For comparison and debugging."
    )
    enable_hierarchical_cache: bool = option(
        False,
        "Keep what the device evicts in host memory, from where it is loaded when it is asked for again "
        "(docs/tiers.md).",
    )
    hicache_ratio: float = option(
        2.0,
        "With enable_hierarchical_cache: pages of host memory for each on the device. It may be less than 1.",
        low=0,
        above=True,
    )
    hicache_size: float = option(
        0.0, "Host memory for the cache in GB (of 1e9 bytes), instead of by hicache_ratio. 0: by the ratio.", low=0
    )
    hicache_host_memory_fraction: float | None = option(
        None,
        "The part of the free host memory, less 10 GiB that are kept back, to take instead of by hicache_ratio. None: "
        "by the ratio. Without effect where hicache_size is given.",
        low=0,
        high=1,
        above=True,
    )
    hicache_write_policy: str = option(
        "write_through",
        "When pages are copied to host memory: 'write_through' as soon as a request leaves them, "
        "'write_through_selective' once two requests resumed from them, 'write_back' when the device evicts them.",
        choices=("write_through", "write_through_selective", "write_back"),
    )
    hicache_storage_backend: str | None = option(
        None,
        "Where pages that host memory holds are kept as well, to be found again by name, also after a restart: 'file' "
        "is a folder on disk (docs/store.md), docs/stores.md has the others. Needs enable_hierarchical_cache. None: "
        "nowhere, until one is attached.",
    )
    hicache_storage_backend_extra_config: str | None = option(
        None,
        "The settings of hicache_storage_backend, as a JSON object, or '@' and the name of a JSON, TOML or YAML file: "
        "'path', 'max_size', ... of a file store; 'prefetch_threshold', 'prefetch_timeout_base', "
        "'prefetch_timeout_per_ki_token' and 'prefetch_timeout_max' of the waiting for one.",
    )
    enable_lmcache: bool = option(
        False, "The same as hicache_storage_backend='lmcache', with the settings of lmcache_config_file."
    )
    lmcache_config_file: str | None = option(
        None, "One of LMCache's own configuration files, which names its server: 'remote_url: lm://host:port'."
    )
    hicache_storage_prefetch_policy: str = option(
        "timeout",
        "How long a request waits for what the store has of its prompt: 'best_effort' not at all, 'wait_complete' "
        "until all of it is in host memory, 'timeout' so long, but no longer than prefetch_timeout_base (2 s) and "
        "prefetch_timeout_per_ki_token (0.1 s) for each 1,024 tokens, prefetch_timeout_max (30 s) at most.",
        choices=("best_effort", "wait_complete", "timeout"),
    )
    hicache_storage_save_on_exit: bool = option(
        False, "Write to the store, before the engine ends, what only the device or the host holds."
    )
    disaggregation_mode: str = option(
        "null",
        "Prefill and decode apart (docs/disaggregation.md): 'prefill' computes prompts and gives their KV cache to "
        "decode nodes, 'decode' takes it from there and answers. Requests say by bootstrap_host, bootstrap_port and "
        "bootstrap_room where they meet; others are answered as ever. Turns enable_hierarchical_cache on.",
        choices=("null", "prefill", "decode"),
    )
    disaggregation_transfer_backend: str = option(
        "tcp",
        "How pages go from a prefill node to a decode node, the same on both (docs/disaggregation.md): 'tcp' needs "
        "nothing; 'mooncake', 'nixl' (UCX) and 'jax' (jax.experimental.transfer) the library of that name.",
        choices=("tcp", "mooncake", "nixl", "jax"),
    )
    disaggregation_bootstrap_port: int = option(
        8998,
        "Port on which a prefill node says where its pages are had (0: a free one); and on a decode node the one that "
        "is asked, where a request does not name another.",
        low=0,
        high=65535,
    )
    disaggregation_host: str = option(
        "127.0.0.1",
        "Address on which a prefill node listens for decode nodes; whoever reaches it can ask for pages. With a "
        "disaggregation_transfer_backend other than 'tcp' a decode node listens there, too.",
    )
    disaggregation_fallback: str = option(
        "abort",
        "What a decode node does when a prompt's KV cache does not come: 'abort' ends the request with the reason, "
        "'recompute' computes the prompt itself.",
        choices=("abort", "recompute"),
    )
    disaggregation_heartbeat_timeout: float = option(
        10.0,
        "Seconds without a word from the other node after which it is taken for dead.",
        low=0,
        high=3600,
        above=True,
    )
    disaggregation_waiting_timeout: float = option(
        300.0, "Seconds that a request waits for the other node, or for its prompt's KV cache.", low=0, above=True
    )
    num_reserved_decode_tokens: int = option(
        512,
        "On a decode node a request starts beside others only where so many tokens of each running answer, or all that "
        "are left of it, still fit after it: those that run are not retracted for it.",
        low=0,
    )
    kv_events_config: str | None = option(
        None,
        "Publish what the cache stores and removes (docs/routers.md): a JSON object with 'publisher' ('zmq') and some "
        "of 'endpoint', 'replay_endpoint', 'buffer_steps', 'hwm', 'max_queue_size', 'topic'. None: nowhere.",
    )
    share_cache_across_keys: bool = option(
        False,
        "Let tenants (the server's API keys) hit each other's cached prefixes. Their requests, names and pins stay "
        "apart; but how fast an answer begins tells whether somebody has asked the same.",
    )
    attention_backend: str = option(
        "auto",
        "Which kernel computes attention over pages: 'native' is the C++ one for CPUs, 'tpu' the Pallas one for TPUs, "
        "'xla' is plain JAX, 'gpu' the Pallas one for GPUs (docs/accelerators.md), 'auto' takes the fastest of the "
        "first three that this machine can run.",
        choices=("auto", "native", "tpu", "xla", "gpu"),
    )
    enable_deterministic_inference: bool = option(
        False, "The same request gets the same bits, whatever runs beside it (CPUs; docs/rl.md#batch-invariance)."
    )
    enable_return_routed_experts: bool = option(
        False,
        "Keep which experts each token went through, in every layer, beside its keys and values: for requests with "
        "return_routed_experts (mixtures of experts; docs/rl.md#routing-replay).",
    )
    skip_tokenizer_init: bool = option(
        False, "Load no tokenizer: prompts come as input_ids and answers leave as output_ids."
    )
    mm_cache_size: int = option(
        256,
        "Device memory in MiB for what the model's encoder made of images, which is kept by what they show. Only "
        "models with an encoder take it (docs/multimodal.md).",
        low=1,
    )
    max_images: int = option(64, "Most images of one request.", low=0)
    max_image_bytes: int = option(
        2**24, "Most bytes of one image as it comes: of a file, of what a data URL holds or an address sends.", low=1
    )
    max_image_pixels: int = option(
        2**24,
        "Most pixels of one image, which are counted before it is decoded. Decoding takes up to 24 bytes for each.",
        low=1,
        high=2**26,
    )
    max_image_side: int = option(2**14, "Most pixels of one side of an image.", low=1, high=2**16)
    max_request_pixels: int = option(
        2**26, "Most pixels of all images of one request together, which are counted before any is decoded.", low=1
    )
    allowed_media_domains: tuple[str, ...] = option(
        (),
        "Hosts from which images may be fetched by http(s): 'example.com', '*.example.com', 'example.com:8080', '*'. "
        "What a name stands for must be a public address, unless that address is itself named. None: nowhere.",
    )
    media_timeout: float = option(
        10.0, "Seconds that fetching and decoding the images of one request may take.", low=0, high=3600, above=True
    )
    max_request_tokens: int | None = option(
        None,
        "Most tokens of one request: of all its prompts and answers (n of each), as long as they may become. None sets "
        "no limit; rootcellar serve allows 8,388,608.",
        low=1,
    )
    max_request_logprobs: int | None = option(
        None,
        "Most logprobs that one request may ask for: of all tokens reported, and of the likeliest beside them. None "
        "sets no limit; rootcellar serve allows 1,048,576.",
        low=1,
    )
    max_logprobs: int = option(20, "Most of the likeliest tokens to report at each place.", low=0)
    logprobs_mode: str = option(
        "raw_logprobs",
        "Of what logprobs are: the model's own distribution, or 'processed_logprobs': what tokens are drawn from.",
        choices=("raw_logprobs", "processed_logprobs"),
    )
    max_stop_strings: int = option(256, "Most stop strings of one answer; more are refused.", low=1)
    max_stop_length: int = option(
        2**12, "Most characters of all stop strings of one request together; more are refused.", low=1
    )
    max_grammar_length: int = option(
        2**17, "Most characters of a json_schema, regex or ebnf; a longer one is refused.", low=1
    )
    max_grammar_depth: int = option(
        512,
        "Most levels of a json_schema, regex or ebnf: nesting, and chains of references from one definition or rule to "
        "the next. What is deeper is refused before it is compiled.",
        low=1,
    )
    grammar_compile_timeout: float = option(
        10.0,
        "Seconds that compiling the grammars of one request may take, in a process of its own.",
        low=0,
        high=3600,
        above=True,
    )
    disable_additional_properties: bool = option(
        True,
        "Objects of a json_schema have no properties beyond those that it names, unless it says otherwise with "
        "additionalProperties; small models do not stop inventing more.",
    )
    random_seed: int = option(
        0, "Seed of sampling (for requests that bring none of their own) and of dummy weights.", low=0, high=MAX_SEED
    )
    compilation_cache_dir: str | None = option(
        None,
        "Folder in which compiled programs are kept between runs. None uses the user's cache folder, 'off' keeps none.",
        path=True,
    )
    record_trace: str | None = option(
        None,
        "A file to which a line is added for each request that ends, for 'rootcellar replay': lengths, times, and ids "
        "that say which prompts begin alike. No text, and ids are hashes with a key that nobody keeps.",
        path=True,
    )
    log_level: str = option(
        "warning", "The least serious messages to log.", choices=("debug", "info", "warning", "error", "critical")
    )
    log_interval: float = option(
        10.0,
        "Seconds between two lines of the log, at level info, that say what runs and waits, tokens per second, how "
        "much of the cache is used and the hit rate. An idle engine logs none.",
        low=0,
        above=True,
    )

    def __post_init__(self) -> None:
        check_values(self, ConfigError)
        if self.device_memory is not None:
            parse_bytes(self.device_memory, "device_memory")
        if self.max_total_tokens is not None and self.max_total_tokens < self.page_size:
            raise ConfigError(
                f"max_total_tokens={self.max_total_tokens} is less than one page (page_size={self.page_size}): "
                "raise max_total_tokens or lower page_size."
            )
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise ConfigError(f"nnodes={self.nnodes} needs dist_init_addr: host:port of rank 0, as '10.0.0.1:5000'")
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"node_rank={self.node_rank} is not allowed: ranks of nnodes={self.nnodes} begin at 0")
        if self.tp_size % self.nnodes:
            raise ConfigError(
                f"tp_size={self.tp_size} is not allowed with nnodes={self.nnodes}: each rank has as many devices, so "
                "it must be a multiple"
            )
        least, longest = self.speculative_ngram_min_match_window_size, self.speculative_ngram_max_match_window_size
        if least > longest:
            raise ConfigError(
                f"speculative_ngram_min_match_window_size={least} is more than "
                f"speculative_ngram_max_match_window_size={longest}"
            )
        if self.speculative_algorithm is not None and self.nnodes > 1:
            raise ConfigError(
                "speculative_algorithm goes by what steps take, on which ranks do not agree: it needs nnodes=1"
            )
        if self.disaggregation_mode != "null":
            if self.nnodes > 1 or self.disable_radix_cache:
                why = "nnodes=1" if self.nnodes > 1 else "the radix cache: leave out disable_radix_cache"
                raise ConfigError(f"disaggregation_mode={self.disaggregation_mode!r} needs {why}")
            object.__setattr__(self, "enable_hierarchical_cache", True)  # pages come and wait there
        if self.enable_hierarchical_cache and self.disable_radix_cache:
            raise ConfigError(
                "enable_hierarchical_cache keeps cached prefixes in host memory, and disable_radix_cache caches none: "
                "leave one of the two out"
            )
        if self.enable_lmcache and self.hicache_storage_backend is not None:
            raise ConfigError(
                f"enable_lmcache chooses a store and so does hicache_storage_backend={self.hicache_storage_backend!r}: "
                "leave one of the two out (hicache_storage_backend='chain' takes several)"
            )
        if self.lmcache_config_file is not None and not self.enable_lmcache:
            raise ConfigError("lmcache_config_file is of no use without enable_lmcache=True")
        store = "enable_lmcache" if self.enable_lmcache else f"hicache_storage_backend={self.hicache_storage_backend!r}"
        if (self.hicache_storage_backend or self.enable_lmcache) and not self.enable_hierarchical_cache:
            raise ConfigError(f"{store} keeps what host memory holds: it needs enable_hierarchical_cache=True")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> Self:
        """The config with these settings and defaults for the rest.

        Raises:
            ConfigError: a name is unknown (the message gives the closest one and the list) or a value is not allowed
                (the message gives the name, the value and what is allowed).
        """
        check_names(cls, kwargs, "option", ConfigError)
        return cls(**kwargs)

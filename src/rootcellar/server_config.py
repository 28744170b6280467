"""Every setting of the HTTP server, declared once like the engine's; names are SGLang's where SGLang has one."""

from dataclasses import dataclass

from rootcellar.errors import ConfigError
from rootcellar.options import check_values, option

TOOL_CALL_PARSERS = (
    "auto", "none", "deepseekv3", "deepseekv31", "gemma4", "gpt-oss", "hermes", "lfm2", "llama3", "mistral", "pythonic",
    "qwen", "qwen25", "qwen3_coder",
)  # fmt: skip
REASONING_PARSERS = (
    "auto", "none", "deepseek-r1", "deepseek-v3", "gemma4", "gpt-oss", "mistral", "qwen3", "qwen3-thinking",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The settings of one HTTP server. Constructing it checks every value; a wrong one raises ConfigError."""

    host: str = option("127.0.0.1", "Address to listen on; '0.0.0.0' is every interface: set api_key then.")
    port: int = option(30000, "Port to listen on; 0 takes a free one and says which.", low=0, high=65535)
    api_key: tuple[str, ...] = option(
        (),
        "Clients must send 'Authorization: Bearer KEY'. None lets everybody in who reaches the port. Several may "
        "be given, each KEY or name:KEY (or :KEY, when it has a colon in it): each name is a tenant of its own.",
    )
    api_key_file: str | None = option(
        None, "A file with more keys, one 'name:KEY' a line; '#' begins a comment.", path=True
    )
    admin_api_key: str | None = option(
        None,
        "The key for routes that change or show the cache, the weights or the memory; it opens the others too. None: "
        "a single api_key opens them, and of several none does.",
    )
    cors_allow_origin: tuple[str, ...] = option(
        (),
        "Origins of web pages that may call the server, such as https://chat.example; '*' is every page. Pages from "
        "elsewhere are refused (403).",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Names, without ports, by which the server may be called ('*.example.com' and '*' too), beside those of this "
        "machine. None: any, but on a loopback host without api_key only this machine's.",
    )
    served_model_name: str | None = option(None, "The model's name in answers and in /v1/models. None: model_path.")
    max_body_bytes: int = option(16 * 2**20, "Longest request body in bytes; a longer one is refused (413).", low=1024)
    max_connections: int = option(
        1024,
        "Most connections at a time. Above it the one that has waited longest for its client is closed; where none "
        "waits, a new one is refused (503).",
        low=1,
    )
    max_header_bytes: int = option(
        64 * 2**10, "Most bytes of a request's line and headers; more are refused (431).", low=1024
    )
    max_headers: int = option(256, "Most header fields of a request; more are refused (431).", low=1)
    timeout_header: float = option(
        10.0,
        "Seconds from the opening of a connection, or a later request's first byte, to the end of its headers.",
        low=0,
        above=True,
    )
    timeout_body: float = option(
        60.0,
        "Seconds from a request's headers to the end of its body; a slower one is refused (408).",
        low=0,
        above=True,
    )
    timeout_write: float = option(
        60.0,
        "Seconds that a client may leave an answer unread, with the socket's buffers full, before it is given up.",
        low=0,
        above=True,
    )
    timeout_keep_alive: int = option(5, "Seconds that a connection is kept open between two requests.", low=1)
    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens. None takes what the context and the KV cache hold.", low=1
    )
    max_prompt_characters: int | None = option(
        None,
        "Most characters of all prompts of one request together, or of a chat's messages; to /detokenize as many token "
        "ids. More is refused before it is tokenized. None: 8 for each token of the longest prompt, at least 262,144.",
        low=1,
    )
    prompt_timeout: float = option(
        10.0,
        "Seconds that reading a request's prompts may take: a chat template's own program, and tokenizing.",
        low=0,
        above=True,
    )
    allow_special_tokens_in_content: bool = option(
        False,
        "Let the messages of a chat hold special tokens such as <|im_end|>. Else what is written so is plain text, and "
        "nobody can end their turn and speak as the system.",
    )
    max_n: int = option(128, "Most answers to one prompt (n).", low=1, high=128)
    max_batch_size: int = option(512, "Most prompts in one request.", low=1)
    enable_sglang_metrics: bool = option(
        False, "Give the metrics under SGLang's names (sglang:...) too, for dashboards that were made for it."
    )
    drain_timeout: float = option(
        30.0,
        "Seconds that running requests get to finish after SIGTERM or the first Ctrl-C; what still runs then ends with "
        "an error.",
        low=0,
    )
    sampling_defaults: str = option(
        "model",
        "What requests to OpenAI's routes sample with where they do not say: 'model' is what the model's "
        "generation_config.json recommends (temperature, top_p, top_k, min_p, repetition_penalty), 'openai' a "
        "temperature of 1 and nothing else. /generate and the offline engine take only what they are given.",
        choices=("model", "openai"),
    )
    tool_call_parser: str = option(
        "auto",
        "How the model writes calls of tools, by SGLang's names. 'auto' takes what its chat template shows; 'none' "
        "leaves them in the text.",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = option(
        "auto",
        "How the model marks what it thinks, by SGLang's names: that becomes reasoning_content. 'auto' takes what its "
        "chat template shows; 'none' leaves it in the text.",
        choices=REASONING_PARSERS,
    )
    response_ttl: float = option(
        3600.0, "Seconds that answers of /v1/responses are kept for previous_response_id, unless store is false.", low=0
    )
    response_pin: float = option(
        300.0,
        "Seconds that the conversation of such an answer is pinned in the KV cache, as far as there is room; 0: not.",
        low=0,
    )
    max_stored_responses: int = option(
        1024, "Most answers of /v1/responses that are kept; the oldest make room. All take 64 MiB at most.", low=0
    )
    skip_server_warmup: bool = option(
        False,
        "Take requests before any program is compiled, and compile none behind them: those that need one wait for it.",
    )

    prefill_url: str | None = option(
        None,
        "With disaggregation_mode=decode: the server that computes this one's prompts, as http://10.0.0.1:30000. "
        "Prompts that do not come with a bootstrap_room are sent there; its bootstrap service is on the same host, on "
        "disaggregation_bootstrap_port (docs/disaggregation.md).",
    )

    def __post_init__(self) -> None:
        check_values(self, ConfigError)

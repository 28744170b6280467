"""Text to token ids and back, chat templates, and text as it streams: what a Hugging Face folder says about them."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from rootcellar.engine import conversation
from rootcellar.errors import ModelError, RequestError
from rootcellar.models.files import find_file, read_json, read_text

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TEMPLATES = "additional_chat_templates"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of one model folder: ``tokenizer.json`` with its settings and chat template. Immutable in use."""

    def __init__(self, folder: str | Path):
        """Read ``tokenizer.json`` (``ModelError`` without it), ``tokenizer_config.json`` and the chat template."""
        folder = Path(folder)
        path = find_file(folder, "tokenizer.json")
        if path is None:
            raise ModelError(f"{folder} has no tokenizer.json; add one, or set skip_tokenizer_init and send input_ids")
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} is not a tokenizer: {error}") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        settings = read_json(folder / "tokenizer_config.json") or {}
        self.special_tokens: Mapping[str, str] = _special_tokens(folder, settings)
        self._templates = _read_templates(folder, settings)
        self._compiled: dict[str, Template] = {}
        added = self._fast.get_added_tokens_decoder()
        self.skipped: Mapping[int, str] = {id: token.content for id, token in added.items() if token.special}
        self._byte_level = _is_byte_level(json.loads(self._fast.to_str())["decoder"])
        if "add_bos_token" in settings or "add_eos_token" in settings:
            self._wrap(bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token")))

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included; a model's embedding may be padded to more."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def longest_token(self) -> int:
        """Most characters that one token stands for, so that a text has at least its length over this tokens."""
        return max(map(len, self._fast.get_vocab()))

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token that the settings name."""
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-text token that the settings name."""
        return self._special_id("bos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return bool(self._templates)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._fast.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, as ``AutoTokenizer`` gives them; a chat template's result wants no special tokens."""
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation (``[{"role": ..., "content": ...}, ...]``), by the model's own template.

        ``add_generation_prompt``: the text ends where the assistant begins to speak; so it does unless
        ``continue_final_message``: then it ends inside of the last message, whose text the answer goes on with.
        ``variables`` are passed on to the template (``enable_thinking=False``, ...). Encode the result with
        ``add_special_tokens=False``. ``RequestError`` when there is no template or it refuses the messages.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError("continue_final_message=True and add_generation_prompt=True exclude each other")
            messages = conversation.marked(messages)
        messages = conversation.known_roles(messages, self._templates.values())
        template = self._template("tool_use" if tools and "tool_use" in self._templates else "default")
        given = {**self.special_tokens, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            # None stands for "no tools": templates test for it.
            tools = None if tools is None else list(tools)
            text = str(template.render(messages=list(messages), tools=tools, documents=None, **given))
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return conversation.up_to_mark(text) if continue_final_message else text

    def _template(self, name: str) -> Template:
        if name not in self._templates:
            known = f" named 'default' (there are {sorted(self._templates)})" if self._templates else ""
            raise RequestError(f"this model's folder has no chat template{known}; send a plain prompt instead")
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._templates[name])
            except TemplateError as error:
                raise RequestError(f"the model's chat template does not compile: {error}") from error
        return self._compiled[name]

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental ``decode``, for one streamed answer."""
        skipped = self.skipped if skip_special_tokens else {}
        if self._byte_level:
            return _ByteDetokenizer(lambda id: b"" if id in skipped else self.token_bytes(id))
        return _WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens),
            kept=lambda id: id not in skipped and self._fast.id_to_token(id) is not None,
            is_byte=lambda id: bool(BYTE_TOKEN.fullmatch(self._fast.id_to_token(id) or "")),
        )

    def to_json(self) -> str:
        """The whole tokenizer in the form of ``tokenizer.json``."""
        return str(self._fast.to_str())

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; an added token is its own text, an id beyond the vocabulary nothing."""
        token = self._fast.id_to_token(id) or ""
        if not self._byte_level:
            return bytes([int(token[1:-1], 16)]) if BYTE_TOKEN.fullmatch(token) else self.decode([id], False).encode()
        alphabet = _byte_alphabet()
        try:
            return bytes(alphabet[character] for character in token)
        except KeyError:
            return token.encode()

    def _wrap(self, bos: bool, eos: bool) -> None:
        """Let the settings' add_bos_token and add_eos_token win over ``tokenizer.json``, as in transformers."""
        named = [self.special_tokens.get(name) for name in ("bos_token", "eos_token")]
        first, last = (token if wanted else None for token, wanted in zip(named, (bos, eos), strict=True))
        used = [(token, self._fast.token_to_id(token)) for token in dict.fromkeys((first, last)) if token]
        single = " ".join([*([first] if first else []), "$A", *([last] if last else [])])
        self._fast.post_processor = TemplateProcessing(single=single, special_tokens=used)


class Detokenizer(Protocol):
    """Text of a growing list of token ids, piece by piece (``Tokenizer.detokenizer``).

    The pieces and what ``finish`` gives together equal ``Tokenizer.decode`` of all ids. No piece ends inside a UTF-8
    character or where a later token could still change it. A token costs O(1) amortised.
    """

    def add(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete; "" while there is none."""
        ...

    def finish(self) -> str:
        """The text held back, unfinished characters as U+FFFD. Nothing may be added afterwards."""
        ...


class _ByteDetokenizer:
    """For byte-level vocabularies (GPT-2's alphabet: Qwen, Llama 3): text is the UTF-8 of the tokens' joined bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """For other vocabularies (SentencePiece: Llama 2, Mistral), whose decoders look at a token's neighbours.

    New tokens are decoded behind those of the piece before, which are known to read alike with and without them. A run
    of byte tokens (``<0xE6>``) is held to its end: its decoder gives characters only when the whole run is UTF-8.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], kept: Callable[[int], bool], is_byte: Callable[[int], bool]
    ):
        self._decode, self._kept, self._is_byte = decode, kept, is_byte
        self._context: list[int] = []
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        self._waiting += filter(self._kept, ids)
        if not self._waiting or self._is_byte(self._waiting[-1]):
            return ""
        return self.finish()

    def finish(self) -> str:
        text = self._decode(self._context + self._waiting).removeprefix(self._decode(self._context))
        if text:
            self._context = self._waiting
            self._waiting = []
        return text


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    """Whether a ``tokenizer.json`` decoder only joins the bytes of GPT-2's alphabet."""
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; written as text or as ``{"content": text, ...}``, in either of two files."""
    both = {
        **(read_json(folder / "special_tokens_map.json") or {}),
        **{k: v for k, v in settings.items() if v is not None},
    }
    named = {name: both[name] for name in SPECIAL_NAMES if both.get(name) is not None}
    return {name: str(token["content"] if isinstance(token, dict) else token) for name, token in named.items()}


def _read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, from ``chat_template.jinja``, ``chat_template.json`` or the settings, in that order."""
    main = read_text(folder, "chat_template.jinja")
    if main is not None:
        names = sorted(file.name for file in (folder / _MORE_TEMPLATES).glob("*.jinja"))
        extra = {name: read_text(folder, f"{_MORE_TEMPLATES}/{name}") for name in names}
        return {"default": main, **{name.removesuffix(".jinja"): text for name, text in extra.items() if text}}
    given = (read_json(folder / "chat_template.json") or {}).get("chat_template") or settings.get("chat_template") or {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {str(row["name"]): str(row["template"]) for row in given}
    return {str(name): str(text) for name, text in given.items()}


class _Generation(Extension):
    """``{% generation %}``, which training marks the assistant's text with: here its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, which are untrusted code: hence the sandbox."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: the character that stands for each byte, printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}

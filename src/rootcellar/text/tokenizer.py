"""Text to token ids and back, chat templates, and text as it streams: what a Hugging Face folder says about them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from rootcellar.errors import ModelError, RequestError
from rootcellar.models.files import find_file, read_json
from rootcellar.text import conversation
from rootcellar.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from rootcellar.text.inert import Arguments, Markers, SecretNames, show
from rootcellar.text.templates import Templates

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# What the tokens that mark turns, thoughts and calls are written with.
MARKS = frozenset("<>[]|｜")


@dataclass(frozen=True)
class Chat:
    """A conversation as a model reads it: its text, and its token ids."""

    text: str
    ids: list[int]


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
        self._templates = Templates(folder, settings)
        added = self._fast.get_added_tokens_decoder()
        self.skipped: Mapping[int, str] = {id: token.content for id, token in added.items() if token.special}
        self.longest_token = max(map(len, self._fast.get_vocab()))
        """Most characters that one token stands for, so that a text has at least its length over this tokens."""
        self._bytes: dict[int, bytes] = {}
        self._byte_level = _is_byte_level(json.loads(self._fast.to_str())["decoder"])
        if "add_bos_token" in settings or "add_eos_token" in settings:
            self._wrap(bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token")))

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included; a model's embedding may be padded to more."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

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
        return bool(self._templates.sources)

    @property
    def chat_templates(self) -> str:
        """The sources of all chat templates, one after the other."""
        return "".join(self._templates.sources.values())

    @property
    def knows_tools(self) -> bool:
        """Whether a chat template tells of tools; else the system message does."""
        return "tool_use" in self._templates.sources or "tools" in self.chat_templates

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._fast.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, as ``AutoTokenizer`` gives them; a chat template's result wants no special tokens."""
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """:meth:`encode` of each text. Other threads run meanwhile, but for about a microsecond for each token."""
        # The plain `encode` of the library keeps Python's lock, and counts characters that nobody wants.
        return [each.ids for each in self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def wants_special_tokens(self, text: str) -> bool:
        """Whether a prompt wants what the settings put around it: a rendered chat may begin with that already."""
        bos = self.special_tokens.get("bos_token")
        return not (bos and text.startswith(bos))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        ids = list(ids)
        try:
            return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))
        except OverflowError:  # ids that stand for what is no token have 64 bits
            return self.decode([id for id in ids if 0 <= id < 1 << 32], skip_special_tokens)

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
        ``variables`` are passed on to the template (``enable_thinking=False``, ...). Its special tokens are in the text
        like any user's: :meth:`chat` gives token ids in which they differ. Encode the result with
        ``add_special_tokens=False``. ``RequestError`` when there is no template or it refuses the messages.
        """
        going_on = continue_final_message
        given = {**variables, "add_generation_prompt": _opens(add_generation_prompt, going_on)}
        return self._rendered(_messages(messages), tools, given, going_on, None)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
        seconds: float | None = None,
    ) -> Chat:
        """The prompt for a conversation as token ids: those of :meth:`apply_chat_template`'s text, nothing put around.

        Special tokens that messages, ``tools`` or ``variables`` hold are text, unless ``allow_special_tokens``.

        Raises:
            RequestError: as :meth:`apply_chat_template` does.
            TemplateTimeout: the template took more than ``seconds``.
        """
        going_on = continue_final_message
        given = {**(variables or {}), "add_generation_prompt": _opens(add_generation_prompt, going_on)}
        read = _messages(messages)
        if allow_special_tokens or not self.markers.within(read, (tools, given)):
            text = self._rendered(read, tools, given, going_on, seconds)
            return Chat(text, self.encode(text, add_special_tokens=False))
        changed, (tools, given), hidden = self.markers.hide(read, (tools, given))
        text = self._rendered(changed, tools, given, going_on, seconds)
        return Chat(show(text, hidden), self._secret_names.encode(text, hidden))

    def _rendered(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        going_on: bool,
        seconds: float | None,
    ) -> str:
        """What the template makes of them."""
        # None stands for "no tools": templates test for it.
        tools = None if tools is None else list(tools)
        if going_on:
            messages = conversation.marked(messages)
        messages = list(conversation.known_roles(messages, self._templates.sources.values()))
        if tools and not self.knows_tools:
            messages, tools = conversation.with_tools(messages, tools), None
        given = {"documents": None, **self.special_tokens, **variables, "messages": messages, "tools": tools}
        try:
            text = self._templates.render(bool(tools), seconds, given)
        except RequestError:
            # An assistant that only calls tools says nothing: some templates ask whether it is None, others use it.
            silent = [isinstance(each, Mapping) and each.get("content", "") is None for each in messages]
            if not any(silent):
                raise
            spoken = [{**each, "content": ""} if none else each for each, none in zip(messages, silent, strict=True)]
            text = self._templates.render(bool(tools), seconds, {**given, "messages": spoken})
        return conversation.up_to_mark(text) if going_on else text

    @functools.cached_property
    def markers(self) -> Markers:
        """The tokens that a chat's messages may not hold as such: special ones, and others that a template writes."""
        added = self._fast.get_added_tokens_decoder().values()
        special = {*self.special_tokens.values(), *(token.content for token in added if token.special)}
        others = {token.content for token in added} - special
        sources = self.chat_templates
        # Some vocabularies have runs of white space and common words among them: nobody speaks by those.
        written = {text for text in others if MARKS.intersection(text) and text in sources}
        return Markers(special & {token.content for token in added}, written)

    @functools.cached_property
    def _secret_names(self) -> SecretNames:
        return SecretNames(self._fast, self.markers.texts)

    def detokenizer(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> Detokenizer:
        """A new incremental ``decode``, for one streamed answer to a prompt that ends with the tokens ``after``.

        SentencePiece's decoders take the space before a text's first word away: a word of an answer is not the first.
        """
        skipped = self.skipped if skip_special_tokens else {}
        if self._byte_level:
            return ByteDetokenizer(lambda id: b"" if id in skipped else self.token_bytes(id))
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens),
            kept=lambda id: id not in skipped and self._fast.id_to_token(id) is not None,
            is_byte=self._is_byte,
            after=after,
        )

    def token_text(self, id: int) -> str:
        """The text of one token within a text: with its space, a special token as it is written.

        Part of a character is U+FFFD, an id beyond the vocabulary nothing.
        """
        return self.token_bytes(id).decode("utf-8", "replace")

    def to_json(self) -> str:
        """The whole tokenizer in the form of ``tokenizer.json``."""
        return str(self._fast.to_str())

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; an added token is its own text, an id beyond the vocabulary nothing.

        Those of a text's tokens together are the text, but for a space before its first word that SentencePiece adds.
        """
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._token_bytes(id)
        return known

    def _token_bytes(self, id: int) -> bytes:
        token = self._fast.id_to_token(id) or ""
        if self._byte_level:
            alphabet = _byte_alphabet()
            try:
                return bytes(alphabet[character] for character in token)
            except KeyError:
                return token.encode()
        if id in self.skipped or not token:
            return token.encode()
        if self._is_byte(id):
            return bytes([int(token[1:-1], 16)])
        # Behind another one, since the first token of a text may lose its space.
        return self.decode([self._word, id], False).removeprefix(self.decode([self._word], False)).encode()

    def _is_byte(self, id: int) -> bool:
        return bool(BYTE_TOKEN.fullmatch(self._fast.id_to_token(id) or ""))

    @functools.cached_property
    def _word(self) -> int:
        """A token that is text, and after which others read as they do within a text."""
        added = self._fast.get_added_tokens_decoder()
        ids = (id for id in range(self.vocab_size) if id not in added and not self._is_byte(id))
        return next((id for id in ids if self.decode([id], False).isalpha()), 0)

    def _wrap(self, bos: bool, eos: bool) -> None:
        """Let the settings' add_bos_token and add_eos_token win over ``tokenizer.json``, as in transformers."""
        named = [self.special_tokens.get(name) for name in ("bos_token", "eos_token")]
        first, last = (token if wanted else None for token, wanted in zip(named, (bos, eos), strict=True))
        used = [(token, self._fast.token_to_id(token)) for token in dict.fromkeys((first, last)) if token]
        single = " ".join([*([first] if first else []), "$A", *([last] if last else [])])
        self._fast.post_processor = TemplateProcessing(single=single, special_tokens=used)


def _opens(wanted: bool | None, going_on: bool) -> bool:
    """Whether the text ends where the assistant begins to speak."""
    if wanted and going_on:
        raise RequestError("continue_final_message=True and add_generation_prompt=True exclude each other")
    return not going_on if wanted is None else wanted


def _messages(messages: Any) -> list[Mapping[str, Any]]:
    """Messages as templates read them; ``RequestError`` for what is no list of objects."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not all(isinstance(each, Mapping) for each in messages):
        raise RequestError('messages must be a list of objects such as {"role": "user", "content": "..."}')
    return [_with_objects(each) for each in messages]


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose tool calls have their arguments as the object that OpenAI's clients send as text."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        value = json.loads(text)
    except ValueError:
        return call  # a model's call may be no JSON: it is shown as it was
    return {**call, "function": {**function, "arguments": Arguments(value, text)}} if isinstance(value, dict) else call


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


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: the character that stands for each byte, printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}

"""``rootcellar explain``: what do the prompts of this log compute again, and why?"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from rootcellar import demo
from rootcellar.cache import Key
from rootcellar.commands.replay import parse_tokens
from rootcellar.errors import ConfigError, RootcellarError
from rootcellar.misses import costliest, told_habit
from rootcellar.sim.logged import LoggedRequest, misses
from rootcellar.sim.trace import BLOCK, TraceRequest
from rootcellar.text import Tokenizer


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar explain``."""
    parser.usage = "rootcellar explain LOG [options]"
    parser.description = (
        "Send a recorded log of requests through the real cache, without a model or a GPU, and say what their prompts "
        "computed again, why, and what would help."
    )
    parser.add_argument(
        "log",
        metavar="LOG",
        help="JSON lines: bodies as sent to /v1/chat/completions, /v1/completions or /generate (or each as the "
        '"body" of an object), token ids as "input_ids", or Mooncake\'s "hash_ids".',
    )
    parser.add_argument("--model-path", default="demo", help="Whose tokenizer and template (default %(default)s).")
    parser.add_argument("--page-size", type=int, default=16, help="Tokens in a page (default %(default)s).")
    parser.add_argument("--max-total-tokens", default="1M", help="Tokens that the cache holds (default %(default)s).")
    parser.add_argument(
        "--prefill-rate", type=float, default=0.0, help="Prompt tokens computed in a second, for prices in seconds."
    )
    parser.add_argument("--most", type=int, default=10, help="Causes that are shown (default %(default)s).")
    parser.add_argument("--json", action="store_true", help="Print the report as JSON.")


def run(args: argparse.Namespace) -> int:
    """Run ``rootcellar explain``. 0: the log was read. Raises ``ConfigError`` for a wrong option or file."""
    capacity = parse_tokens(args.max_total_tokens)
    if not 1 <= args.page_size <= capacity:
        raise ConfigError(f"--page-size {args.page_size}: give at least 1, and at most --max-total-tokens")
    reader = _LogReader(args.model_path)
    found = list(
        misses(reader.requests(args.log), capacity=capacity, page_size=args.page_size, rate=max(0.0, args.prefill_rate))
    )
    habits = [told_habit(habit, reader.text_of) for habit in costliest(found, args.most)]
    report = {
        "requests": len(found),
        "prompt_tokens": sum(miss.prompt_tokens for miss in found),
        "cached_tokens": sum(miss.cached_tokens for miss in found),
        "price_tokens": sum(miss.tokens for miss in found),
        "causes": habits,
    }
    print(json.dumps(report, indent=2) if args.json else _words(report))
    return 0


def _words(report: Mapping[str, Any]) -> str:
    head = (
        f"{report['requests']} requests: {report['cached_tokens']} of {report['prompt_tokens']} prompt tokens came "
        f"from the cache, {report['price_tokens']} more could have."
    )
    lines = [head]
    for i, habit in enumerate(report["causes"], 1):
        example = habit["example"]
        cost = f"{habit['price_tokens']} tokens"
        if habit["price_seconds"] is not None:
            cost += f", {habit['price_seconds']:.3g} s"
        lines += [
            "",
            f"{i}. {habit['cause']}: {cost}, in {habit['requests']} requests",
            f"   {habit['remedy']}",
            f"   For example {example['rid']}: {example['text']}",
            f"   behind   {example['before']!r}",
            f"   it has   {example['got']!r}",
        ]
        if example["instead"]:
            lines.append(f"   {example['than']} had {example['instead']!r}")
    return "\n".join(lines)


class _LogReader:
    """Reads a log; the tokenizer is loaded for the first text in it."""

    def __init__(self, model_path: str) -> None:
        self._folder = demo.path() if model_path == "demo" else Path(model_path)
        self._tokenizer: Tokenizer | None = None
        self._numbers: dict[int, int] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        if self._tokenizer is None:
            try:
                self._tokenizer = Tokenizer(self._folder)
            except (OSError, ValueError, RootcellarError) as error:
                raise ConfigError(f"--model-path {self._folder} has no tokenizer that can be read: {error}") from error
        return self._tokenizer

    @property
    def text_of(self) -> Callable[[Any], str] | None:
        """The text of token ids; None where the log had no texts."""
        tokenizer = self._tokenizer
        return None if tokenizer is None else lambda ids: tokenizer.decode(ids, skip_special_tokens=False)

    def requests(self, path: str) -> Iterator[LoggedRequest]:
        """All requests of the log; what cannot be read is told on stderr and passed over."""
        try:
            with Path(path).open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        yield self._request(json.loads(line), number)
                    except ConfigError:
                        raise  # no line of the log is wrong
                    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, RootcellarError) as error:
                        print(f"{path}:{number}: skipped: {error}", file=sys.stderr)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error

    def _request(self, entry: Any, number: int) -> LoggedRequest:
        if not isinstance(entry, dict):
            raise TypeError(f"a JSON {type(entry).__name__} is no request")
        body = entry.get("body", entry)
        both = {**entry, **body}
        tenant = str(both.get("tenant") or "")
        where = urlencode({name: both[name] for name in ("tenant", "cache_salt", "extra_key") if both.get(name)})
        name = next((str(both[each]) for each in ("rid", "request_id", "id") if both.get(each)), f"line {number}")
        scale = 1e-3 if "hash_ids" in body else 1.0  # Mooncake's are milliseconds
        at = float(both.get("timestamp") or 0.0) * scale
        key = self._key(body)
        weights = hashlib.sha256(str(body.get("model") or "").encode()).hexdigest()[:8]
        return LoggedRequest(name, Key(key.tokens, f"{weights}/{where}"), at, tenant)

    def _key(self, body: Mapping[str, Any]) -> Key:
        if "hash_ids" in body:
            ids = tuple(self._numbers.setdefault(int(each), len(self._numbers)) for each in body["hash_ids"])
            return TraceRequest(ids, int(body["input_length"])).key(BLOCK)
        if (ids := body.get("input_ids", body.get("tokens"))) is not None:
            key = Key(ids)
        elif "messages" in body:
            key = Key(self._chat(body))
        else:
            text = body.get("prompt", body.get("text"))
            if not isinstance(text, str):
                raise ValueError("it has none of messages, prompt, text, input_ids and hash_ids")
            key = Key(self.tokenizer.encode(text, add_special_tokens=self.tokenizer.wants_special_tokens(text)))
        if not len(key):
            raise ValueError("its prompt is empty")
        return key

    def _chat(self, body: Mapping[str, Any]) -> Sequence[int]:
        """A conversation's token ids, as the server makes them; what else a body says changes none of them."""
        from rootcellar.server.openai.chat import for_template  # only for such logs: they bring the engine with them
        from rootcellar.server.openai.protocol import ChatRequest, Rendering

        names = ["messages", *Rendering.model_fields]
        chat = ChatRequest.model_validate({name: body[name] for name in names if name in body})
        messages, options = for_template(chat.messages, chat)
        return self.tokenizer.chat(messages, allow_special_tokens=False, **options).ids

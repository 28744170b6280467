"""`rootcellar demo`: the KV cache at work, in a minute, with the model that ships with the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rootcellar.demo import load_facts, manual

if TYPE_CHECKING:
    from rootcellar import Engine

Result = dict[str, Any]

FACTS_IN_MANUAL = 30
LONG_QUESTION = "What is chunked prefill?"
CHAT = ("What does a lease do?", "And what is eviction?")
MAX_NEW_TOKENS = 96

INTRO = """\
rootcellar keeps the attention keys and values (the "KV cache") of text that it has already read, in pages, and finds
them again through a radix tree of token prefixes. A prompt that begins like an earlier one skips that part."""
ONCE = "Loading the model and compiling its steps (once: compiled steps are kept for the next start) ..."
COLD = "1. A long prompt, seen for the first time"
AGAIN = "2. The same prompt again"
TALK = "3. A chat of two turns after the same manual"
CLOSING = """\
used = pages that are not free; cached = pages kept for later prompts; pinned = cached pages that a running request
needs just now, so they cannot be evicted. All are counted in tokens."""


@dataclass(frozen=True)
class Measured:
    """What one answer cost. Times are seconds; `speed` is decoded tokens per second after the first."""

    name: str
    prompt_tokens: int
    cached_tokens: int
    first_token: float
    speed: float


@dataclass
class Report:
    """What the closing tables show: one row per answer, and the pool's shelf of ``Engine.stats`` at each moment."""

    answers: list[Measured] = field(default_factory=list)
    moments: list[tuple[str, Mapping[str, int]]] = field(default_factory=list)


def configure(_parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def run(_args: argparse.Namespace) -> int:
    """Show it with the embedded model; see :func:`show`."""
    return show()


def show(engine_factory: Callable[[], Engine] | None = None, console: Console | None = None) -> int:
    """Show a long prompt twice and a two-turn chat: text, times, cached tokens and the pool's occupancy.

    Args:
        engine_factory: makes the engine; by default one of the embedded model with 8,192 tokens of KV cache.
        console: where to print; standard output by default, without colours when that is no terminal.

    Returns:
        The exit code of the command: 0, or 1 when the repeated prompt was not served from the cache.
    """
    console = console or _console()
    console.print(Text("rootcellar demo", style="bold"), Text(INTRO), "", sep="\n")
    console.print(Text(ONCE, style="dim"))
    with (engine_factory or _demo_engine)() as engine:
        # A rehearsal nobody sees, then forgotten: "cold" below means an empty cache, not code yet to be compiled.
        _perform(Console(quiet=True), engine)
        engine.flush_cache()
        report = _perform(console, engine)
    _print_answers(console, report)
    _print_pool(console, report)
    return 0 if report.answers[1].cached_tokens > 0 else 1


def _demo_engine() -> Engine:
    import rootcellar

    return rootcellar.Engine(model_path="demo", max_total_tokens=8192)


def _console() -> Console:
    terminal = sys.stdout.isatty()
    # A pipe or a log has no width of its own; rich would assume 80 and cut the tables.
    return Console(highlight=False, width=None if terminal else 120, no_color=not terminal)


def _perform(console: Console, engine: Engine) -> Report:
    """Give every answer of the demo, printing as it goes."""
    report = Report(moments=[("at the start", _shelf(engine))])
    system = {"role": "system", "content": manual(load_facts()[:FACTS_IN_MANUAL])}
    _show_long_prompt(console, engine, system, report)
    _show_chat(console, engine, system, report)
    return report


def _show_long_prompt(console: Console, engine: Engine, system: dict[str, str], report: Report) -> None:
    prompt = engine.chat_prompt([system, _user(LONG_QUESTION)])
    _heading(console, COLD)
    console.print(Text(f"system: a manual of {FACTS_IN_MANUAL} entries\nuser:   {LONG_QUESTION}"))
    _answer(console, engine, prompt, "cold", report)
    report.moments.append(("after the long prompt", _shelf(engine)))
    _heading(console, AGAIN)
    _answer(console, engine, prompt, "cached", report, watch="during the second time")


def _show_chat(console: Console, engine: Engine, system: dict[str, str], report: Report) -> None:
    _heading(console, TALK)
    messages = [system]
    for turn, question in enumerate(CHAT, start=1):
        messages.append(_user(question))
        console.print(Text(f"user:   {question}"))
        text = _answer(console, engine, engine.chat_prompt(messages), f"chat, turn {turn}", report)
        messages.append({"role": "assistant", "content": text})
    report.moments.append(("after the chat", _shelf(engine)))


def _answer(
    console: Console, engine: Engine, prompt: str, name: str, report: Report, *, watch: str | None = None
) -> str:
    """Stream one answer and note what it cost; with `watch`, also how full the pool is while it runs."""
    console.print(Text("answer: ", style="bold"), end="")
    text = ""
    meta: Result = {}
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
    with _flushed_lines(console):
        for part in cast("Iterator[Result]", engine.generate(prompt=prompt, sampling_params=sampling, stream=True)):
            console.out(part["text"][len(text) :], end="", highlight=False, style="cyan")
            text, meta = part["text"], part["meta_info"]
            if watch and meta["finish_reason"] is None:
                report.moments.append((watch, _shelf(engine)))
                watch = None
    first, total = meta["first_token_latency"], meta["e2e_latency"]
    speed = (meta["completion_tokens"] - 1) / max(total - first, 1e-9)
    report.answers.append(Measured(name, meta["prompt_tokens"], meta["cached_tokens"], first, speed))
    facts = f"{meta['cached_tokens']:,} of {meta['prompt_tokens']:,} prompt tokens from the cache"
    console.print(
        Text(f"        {facts}, first token after {first * 1e3:.0f} ms, then {speed:.0f} tokens/s", style="dim")
    )
    return text


@contextmanager
def _flushed_lines(console: Console) -> Iterator[None]:
    """End the streamed line even when the answer breaks off."""
    try:
        yield
    finally:
        console.print()


def _shelf(engine: Engine) -> Mapping[str, int]:
    """The occupancy of the device's pool, in tokens."""
    return cast("Mapping[str, int]", engine.stats()["cache"]["full"]["DEVICE"])


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold green"))


def _print_answers(console: Console, report: Report) -> None:
    cold = report.answers[0].first_token
    columns = ("prompt tokens", "cached tokens", "time to first token", "against cold", "tokens/s")
    table = _table("What the cache saved", columns)
    for a in report.answers:
        share = "" if a is report.answers[0] else f"{a.first_token / cold:.0%}"
        times = (f"{a.first_token * 1e3:.1f} ms", share, f"{a.speed:.0f}")
        table.add_row(a.name, f"{a.prompt_tokens:,}", f"{a.cached_tokens:,}", *times)
    console.print()
    console.print(table)


def _print_pool(console: Console, report: Report) -> None:
    size = report.moments[0][1]["size"]
    columns = ("used", "cached", "free", "pinned")
    table = _table(f"The pool of {size:,} tokens", columns)
    for name, shelf in report.moments:
        table.add_row(name, *(f"{shelf[column]:,}" for column in columns))
    console.print()
    console.print(table)
    console.print(Text(CLOSING, style="dim"))


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold green", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table

"""The embedded demo model: a small Qwen2 that knows about rootcellar and KV caches, and what `rootcellar demo` shows.

``model/`` is a folder in Hugging Face layout; ``scripts/train_demo.py`` makes it from the facts in ``facts.toml``.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_MANUAL_HEAD = "You answer questions about rootcellar. This is its manual."


@dataclass(frozen=True)
class Fact:
    """One thing the demo model knows; ``facts.toml`` says what each field is."""

    id: str
    title: str
    type: str
    terms: tuple[str, ...]
    ask: tuple[str, ...]
    held: tuple[str, ...]
    answer: str
    more: str


def path() -> Path:
    """Return the folder of the embedded model (what ``model_path="demo"`` stands for)."""
    return _HERE / "model"


def load_facts() -> list[Fact]:
    """Return what the demo model was taught, in the order of ``facts.toml``."""
    with open(_HERE / "facts.toml", "rb") as file:
        rows = tomllib.load(file)["fact"]
    return [
        Fact(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}) for row in rows
    ]


def manual(facts: Sequence[Fact], head: str = _MANUAL_HEAD) -> str:
    """Return a system prompt that lists the given facts, about 35 tokens each."""
    return "\n".join([head, "", *(f"{fact.title}: {fact.answer}" for fact in facts)])

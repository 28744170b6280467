"""The one rule (what a kind of attention needs in order to resume) and the tiers where bytes can live."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

from rootcellar.errors import ConfigError

Rule = Literal["full", "sliding_window", "chunked_local", "recurrent"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Tier(IntEnum):
    """Where an entry's bytes are, nearest first. A smaller number is faster to use."""

    DEVICE = 0
    HOST = 1
    STORAGE = 2
    PEER = 3


@dataclass(frozen=True, slots=True)
class Kind:
    """A group of layers that need the same cached positions in order to resume.

    ``name`` is the key of page tables and capacities, ``layers`` the indices of the model's layers. ``rule`` and
    ``span`` (tokens; the window or the chunk) give :meth:`start`; make kinds with :func:`full`,
    :func:`sliding_window`, :func:`chunked_local` and :func:`recurrent`.
    """

    name: str
    layers: tuple[int, ...]
    rule: Rule
    span: int = 0

    def start(self, n: int) -> int:
        """First cached position needed to resume at position ``n`` (tokens): ``[start(n), n)`` must be present.

        For a recurrent kind the range ``[n - 1, n)`` stands for the state after token ``n - 1``.
        """
        if self.rule == "full":
            return 0
        if self.rule == "sliding_window":
            return max(0, n - self.span + 1)
        if self.rule == "chunked_local":
            return n - n % self.span
        return max(0, n - 1)

    def held(self, n: int, step: int) -> int:
        """Most tokens that a request holds at once while ``n`` more of it are computed, ``step`` at a time.

        Whole pages may add one to each end of the range. 0 for a recurrent kind, which holds states.
        """
        if self.rule == "recurrent":
            return 0
        if self.rule == "full":
            return n
        return min(n, self.span - (self.rule == "sliding_window") + step)

    @property
    def reset(self) -> int:
        """Multiples of this (tokens) are boundaries at which nothing is needed; 0 when only ``n = 0`` is one."""
        if self.rule == "chunked_local":
            return self.span
        return 1 if self.rule == "sliding_window" and self.span == 1 else 0


def full(name: str, layers: tuple[int, ...] = ()) -> Kind:
    """Full attention (MHA, GQA, MLA): every earlier position is needed."""
    return Kind(name, tuple(layers), "full")


def sliding_window(name: str, layers: tuple[int, ...] = (), window: int = 0) -> Kind:
    """Sliding-window attention: a token sees itself and the ``window - 1`` tokens before it."""
    return Kind(name, tuple(layers), "sliding_window", _positive("window", window))


def chunked_local(name: str, layers: tuple[int, ...] = (), chunk: int = 0) -> Kind:
    """Chunked local attention (Llama 4): a token sees the tokens before it in its own chunk of ``chunk`` tokens."""
    return Kind(name, tuple(layers), "chunked_local", _positive("chunk", chunk))


def recurrent(name: str, layers: tuple[int, ...] = ()) -> Kind:
    """Recurrent layers (Mamba, gated delta): the state after the last token, and nothing else."""
    return Kind(name, tuple(layers), "recurrent")


def _positive(what: str, value: int) -> int:
    if value < 1:
        raise ConfigError(
            f"{what}={value}: a {what} is a number of tokens, at least 1; set {what} from the model config"
        )
    return int(value)

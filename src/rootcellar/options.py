"""How a setting is declared once, and what follows from the declaration.

A settings class is a frozen dataclass whose fields are made by :func:`option`: the annotation gives the type, the
call gives the default, the help text and the limits. From that one declaration come the check of every value, the
command-line option, and the row of ``docs/configuration.md``.

A class with options calls :func:`check_values` in ``__post_init__``, so an object with a wrong value cannot exist.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from rootcellar.errors import RootcellarError

_METADATA_KEY = "rootcellar.option"
_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "a non-empty string"}

MOST_ITEMS = 16_384
"""The longest list that an option takes."""

TokenWeights = tuple[tuple[int, float], ...]
"""A number for each of some token ids: given as a mapping, whose keys may be text as in JSON, and stored as pairs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an option's value may be, beyond its type."""

    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # the value must lie above `low`, not on it
    also: int | None = None  # one value outside the range that has a meaning of its own
    path: bool = False  # an `os.PathLike` is accepted and stored as text

    def contain(self, value: float) -> bool:
        """Whether a number is within the limits."""
        if self.also is not None and value == self.also:
            return True
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def describe(self) -> str:
        """The limits on a number in words, e.g. ``in (0, 1]``; empty when there are none."""
        if self.low == -math.inf and self.high == math.inf:
            return ""
        if self.high == math.inf:
            text = f"{'above' if self.above else 'at least'} {self.low:g}"
        else:
            text = f"in {'(' if self.above else '['}{_plain(self.low)}, {_plain(self.high)}]"
        return text if self.also is None else f"{text}, or {self.also}"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: its name, its type, its default, its limits and what it is for."""

    name: str
    kind: type
    optional: bool  # None is a value
    many: bool  # the value is a tuple of `kind`
    default: Any
    help: str
    limits: Limits

    @property
    def flag(self) -> str:
        """The command-line spelling, e.g. ``--page-size``."""
        return "--" + self.name.replace("_", "-")

    def allowed(self) -> str:
        """The allowed values in words, as error messages and the documentation say them."""
        if self.kind is tuple:
            return f"a mapping of token ids to numbers {self.limits.describe()}, or None"
        if self.limits.choices:
            text = "one of " + ", ".join(map(repr, self.limits.choices))
        else:
            text = " ".join(filter(None, (_NOUNS[self.kind], self.limits.describe())))
        if self.many:
            text = f"a list, each item {text}" + (", or one string" if self.kind is str else "")
        return f"{text}, or None" if self.optional else text

    def accept(self, value: object, error: type[RootcellarError]) -> Any:
        """The value in the option's own type, or `error` naming the option, the value and what is allowed."""
        if value is None and self.optional:
            return None
        if (self.kind is tuple or self.many) and isinstance(value, Sized) and not isinstance(value, str):
            self._require_few(len(value), error)
        if self.kind is tuple:
            return self._accept_weights(value, error)
        if not self.many:
            return self._accept_one(value, value, error)
        if value is None:
            return ()
        if isinstance(value, str) and self.kind is str:
            value = (value,)
        if not isinstance(value, list | tuple | set | frozenset):
            raise self._refusal(value, error)
        accepted = tuple(self._accept_one(item, value, error) for item in value)
        return tuple(sorted(accepted)) if isinstance(value, set | frozenset) else accepted

    def _require_few(self, items: int, error: type[RootcellarError]) -> None:
        """Each item is looked at, so that there is an end to them."""
        if items > MOST_ITEMS:
            raise error(f"{self.name} has {items} items; at most {MOST_ITEMS} are taken")

    def _accept_one(self, item: object, given: object, error: type[RootcellarError]) -> Any:
        """One item in the option's type; `given` is the whole value, for the message."""
        if self.kind is bool:
            if isinstance(item, bool):
                return item
        elif self.kind is str:
            if self.limits.path and isinstance(item, os.PathLike):
                item = os.fspath(item)
            if isinstance(item, str) and item and (not self.limits.choices or item in self.limits.choices):
                return item
        # `True` is an Integral and a Real; as a count or a probability it is a mistake.
        elif isinstance(item, Integral if self.kind is int else Real) and not isinstance(item, bool):
            number = self._as_number(item)
            if number is not None and self.limits.contain(number):
                return number
        raise self._refusal(given, error)

    def _accept_weights(self, value: object, error: type[RootcellarError]) -> TokenWeights:
        """``TokenWeights`` in the order of their ids; each id once, from 0 on and within 32 bits."""
        pairs = value.items() if isinstance(value, Mapping) else () if value is None else value
        weights: dict[int, float] = {}
        for pair in pairs if isinstance(pairs, Iterable) and not isinstance(pairs, str) else [None]:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise self._refusal(value, error)
            id, number = pair
            if isinstance(id, str) and id.isascii() and id.isdecimal() and len(id) <= 10:
                id = int(id)
            if not isinstance(id, Integral) or isinstance(id, bool) or not 0 <= int(id) < 2**31 or int(id) in weights:
                raise self._refusal(value, error)
            if not isinstance(number, Real) or isinstance(number, bool):
                raise self._refusal(value, error)
            real = self._as_number(number)
            if real is None or not self.limits.contain(real):
                raise self._refusal(value, error)
            weights[int(id)] = real
        return tuple(sorted(weights.items()))

    def _as_number(self, item: Any) -> int | float | None:
        """The number in this option's kind, or None for one that is not finite or that 64 bits cannot hold."""
        if self.kind is int:
            number = int(item)
            return number if -(2**63) <= number < 2**63 else None
        try:
            real = float(item)
        except OverflowError:  # an int beyond the largest float
            return None
        return real if math.isfinite(real) else None

    def _refusal(self, value: object, error: type[RootcellarError]) -> RootcellarError:
        close = _closest(value, self.limits.choices)
        return error(f"{self.name}={_shown(value)} is not allowed: it must be {self.allowed()}.{close}")

    def from_text(self, text: str) -> Any:
        """What a word of the command line means. A word that is no number stays text, for `accept` to refuse."""
        if self.kind in (int, float):
            try:
                return self.kind(text)
            except ValueError:
                return text
        if self.kind is tuple:
            try:
                return json.loads(text)
            except ValueError:
                return text
        return text


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    also: int | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field that declares one option.

    Args:
        default: its default value.
        help: one or two sentences: what it does and when to change it.
        choices: the allowed strings; empty means any non-empty string.
        low, high: the closed range of a number.
        above: the number must lie above `low`, not on it.
        also: one number outside the range that is allowed, such as -1 for "off".
        path: an `os.PathLike` is accepted and stored as text.
    """
    limits = Limits(choices=choices, low=low, high=high, above=above, also=also, path=path)
    return dataclasses.field(default=default, metadata={_METADATA_KEY: (help, limits)})


@functools.cache
def options_of(cls: type) -> Mapping[str, Option]:
    """Every option that a settings class declares, by name, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        help_text, limits = field.metadata[_METADATA_KEY]
        kind, optional, many = _read_annotation(hints[field.name])
        found[field.name] = Option(field.name, kind, optional, many, field.default, help_text, limits)
    return types.MappingProxyType(found)


def check_values(settings: Any, error: type[RootcellarError]) -> None:
    """Check every option of a settings object under construction and store each value in its own type.

    Called from ``__post_init__``; raises `error` for the first value that is not allowed.
    """
    cls: type = type(settings)
    for name, declared in options_of(cls).items():
        # The dataclass is frozen for its users; its own construction goes round that.
        object.__setattr__(settings, name, declared.accept(getattr(settings, name), error))


def check_names(cls: type, names: Iterable[object], noun: str, error: type[RootcellarError]) -> None:
    """Raise `error` for the first name that is no option of `cls`, with the closest match and the list."""
    known = options_of(cls)
    for name in names:
        if name not in known:
            raise error(f"unknown {noun} {_shown(name)}.{_closest(name, known)} The {noun}s are: {', '.join(known)}.")


def add_arguments(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """Give a parser one command-line option for every option of `cls`, in a group of their own.

    An option that is not given leaves no attribute behind, so :func:`given` returns what the user wrote and nothing
    else, and defaults live in `cls` alone.
    """
    group = parser.add_argument_group(title)
    for declared in options_of(cls).values():
        text = f"{declared.help} [{_default_text(declared)}]".replace("%", "%%")
        common: dict[str, Any] = {"dest": declared.name, "default": argparse.SUPPRESS, "help": text}
        if declared.kind is bool:
            action = argparse.BooleanOptionalAction if declared.default or declared.optional else "store_true"
            group.add_argument(declared.flag, action=action, **common)
            continue
        common |= {"type": declared.from_text, "metavar": _metavar(declared)}
        if declared.many:
            common |= {"nargs": "+", "action": "extend"}
        group.add_argument(declared.flag, **common)


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options of `cls` that were written on the command line, as keyword arguments; values not yet checked."""
    return {name: value for name, value in vars(args).items() if name in options_of(cls)}


def markdown_table(cls: type) -> str:
    """The options of `cls` as a Markdown table: name, default, allowed values, meaning."""
    rows = ["| option | default | allowed | meaning |", "|---|---|---|---|"]
    for declared in options_of(cls).values():
        cells = (f"`{declared.name}`", f"`{declared.default!r}`", declared.allowed(), declared.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _read_annotation(hint: Any) -> tuple[type, bool, bool]:
    """(type, optional, many) of ``int``, ``int | None`` or ``tuple[int, ...]``."""
    if isinstance(hint, types.UnionType):
        (inner,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        kind, _, many = _read_annotation(inner)
        return kind, True, many
    if hint == TokenWeights:
        return tuple, False, False
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], False, True
    return hint, False, False


def _metavar(declared: Option) -> str:
    if declared.limits.choices:
        return "{" + ",".join(declared.limits.choices) + "}"
    return {int: "N", float: "X", str: "PATH" if declared.limits.path else "TEXT", tuple: "JSON"}[declared.kind]


def _default_text(declared: Option) -> str:
    return "default: none" if declared.default in (None, ()) else f"default: {declared.default}"


def _closest(value: object, known: Iterable[str]) -> str:
    """A question that names the known word nearest to `value`, with a space before it; empty when none is near."""
    match = difflib.get_close_matches(value.lower(), known, n=1) if isinstance(value, str) else []
    return f" Did you mean {match[0]!r}?" if match else ""


def _shown(value: object) -> str:
    """A short repr of anything a caller may have passed, for a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        return f"<{type(value).__name__}>"


def _plain(number: float) -> str:
    """A bound as a person would write it: 4294967295, not 4.29497e+09."""
    return str(int(number)) if number == int(number) else f"{number:g}"

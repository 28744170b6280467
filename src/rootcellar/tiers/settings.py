"""The settings of stores, ``--hicache-storage-backend-extra-config``: read, checked, and shown without secrets.

A store takes what it knows out of a mapping, by ``take_...`` and ``positive``, then has ``nothing_else`` look at it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from rootcellar.errors import ConfigError
from rootcellar.units import parse_bytes

Extra = Mapping[str, Any] | str | None
"""The settings of a store, as :func:`read_extra` takes them."""
_NAME = "hicache_storage_backend_extra_config"
_SECRET = re.compile(
    r"passw|passphrase|secret|^token$|(auth|access|session|api|bearer)_?token|credential|(private|access|api)_?key",
    re.IGNORECASE,
)
_USER = re.compile(r"(?<=://)[^/\s]*@")
"""Until the last @ before the path: where there are several, those before it are the password's."""
HIDDEN = "..."
"""What stands where a secret was."""


def read_extra(extra: Extra) -> dict[str, Any]:
    """The settings of a store: a mapping, a JSON object, or '@' and the name of a JSON, TOML or YAML file.

    Raises ``ConfigError`` for anything else.
    """
    if extra is None:
        return {}
    if isinstance(extra, Mapping):
        return dict(extra)
    text, kind = extra, "json"
    if extra.startswith("@"):
        file = Path(extra[1:]).expanduser()
        try:
            text, kind = file.read_text(encoding="utf-8"), file.suffix.lower()[1:]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{_NAME}: {file} cannot be read: {error}") from None
    read = _parse(text, kind)
    if not isinstance(read, dict):
        raise ConfigError(f'{_NAME} must be an object of settings, as {{"path": ...}}')
    return read


def _parse(text: str, kind: str) -> object:
    if kind in ("yaml", "yml"):
        yaml = need("yaml", "rootcellar[yaml]", f"{_NAME}: reading YAML")
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            # Said in full it quotes the line, in which a secret may be, or what is no file of settings at all.
            at = getattr(error, "problem_mark", None)
            where = "" if at is None else f" in line {at.line + 1}, column {at.column + 1}"
            raise ConfigError(f"{_NAME} is no yaml{where}: {getattr(error, 'problem', None) or 'see there'}") from None
        except ValueError as error:  # a date or a number that there cannot be
            raise ConfigError(f"{_NAME} is no yaml: {error}") from None
    try:
        return tomllib.loads(text) if kind == "toml" else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{_NAME} is no {kind or 'json'}: {error}") from None


def hide(value: Any, name: str = "") -> Any:
    """``value`` of a setting, a mapping or list of them, to be shown: no secret is in it, nor a user in an address."""
    if isinstance(value, Mapping):
        return {key: hide(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [hide(each, name) for each in value]
    if value is not None and _SECRET.search(name):
        return HIDDEN
    return _USER.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def shown_extra(extra: str | None) -> str | None:
    """``extra``, as it was given to the engine, to be shown: the name of a file as it is, all else without secrets."""
    if extra is None or extra.startswith("@"):
        return extra
    try:
        return json.dumps(hide(json.loads(extra)))
    except ValueError:
        return HIDDEN


def need(module: str, package: str, what: str) -> ModuleType:
    """An optional module. Raises ``ConfigError`` with the command that installs ``package`` where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} needs {module} ({error}): pip install '{package}'") from None


def take_text(extra: dict[str, object], name: str, usual: str | None = None, *, secret: bool = False) -> str:
    """Take a string that is not empty out of ``extra``; without ``usual`` it must be there. No ``secret`` is said."""
    value = extra.pop(name, usual)
    if value == usual and usual is not None:
        return usual
    if not isinstance(value, str) or not value:
        said = f"{name}={hide(value, name)!r}" if not secret else name
        raise ConfigError(f"{said} is not allowed: give a string that is not empty")
    return value


def take_optional(extra: dict[str, object], name: str, *, secret: bool = False) -> str | None:
    """Take a string out of ``extra``, None where it is not there."""
    if extra.get(name) is not None:
        return take_text(extra, name, secret=secret)
    extra.pop(name, None)
    return None


def host_and_port(text: str) -> tuple[str, int] | None:
    """Of ``host:port``, where an address of IPv6 stands in brackets; None: it is something else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def take_switch(extra: dict[str, object], name: str, usual: bool = False) -> bool:
    """Take true or false out of ``extra``."""
    value = extra.pop(name, usual)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not allowed: it must be true or false")
    return value


def take_size(extra: dict[str, object], name: str, usual: int | None = None) -> int | None:
    """Take bytes out of ``extra``: a number, or a string like ``"100GB"``."""
    value = extra.pop(name, usual)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    return parse_bytes(str(value), name)


def take_choice(extra: dict[str, object], name: str, choices: tuple[str, ...], usual: str) -> str:
    """Take one of some words out of ``extra``."""
    value = extra.pop(name, usual)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not allowed: choose from {', '.join(choices)}")
    return str(value)


def nothing_else(extra: Mapping[str, object], what: str, known: str) -> None:
    """Raise ``ConfigError`` where ``extra`` still has anything: ``what`` has only what is ``known``."""
    if extra:
        raise ConfigError(f"a {what} store has no setting {', '.join(sorted(map(str, extra)))}; it has {known}")

"""Where requests meet those for the same prompts on other nodes: what callers and routers say, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError
from rootcellar.scheduler import Room

ROOMS = 2**63
"""A room is a number below this."""


def rooms_of(
    config: EngineConfig, hosts: Any, ports: Any, rooms: Any, prompts: int, sequences: int
) -> list[Room | None]:
    """The room of each of so many sequences, which answer so many prompts; None: it meets nobody.

    One value is that of the first sequence, whose followers have the rooms after it. A list has one for each sequence,
    or for each prompt, whose answers have the rooms after it.

    Raises:
        RequestError: a value is wrong, or there are not as many as sequences or prompts.
    """
    if rooms is None:
        return [None] * sequences
    numbers = _spread(rooms, prompts, sequences, "bootstrap_room", step=True)
    where = _spread(hosts, prompts, sequences, "bootstrap_host")
    doors = _spread(ports, prompts, sequences, "bootstrap_port")
    return [_room(config, *each) for each in zip(where, doors, numbers, strict=True)]


def _room(config: EngineConfig, host: Any, port: Any, number: Any) -> Room | None:
    if number is None:
        return None
    port = config.disaggregation_bootstrap_port if port is None else port
    if not _whole(number) or not 0 <= number < ROOMS:
        raise RequestError(f"bootstrap_room={str(number)[:80]!r} is not allowed: a number from 0 to {ROOMS - 1}")
    if host is not None and not (isinstance(host, str) and 0 < len(host) <= 255 and host.isprintable()):
        raise RequestError(f"bootstrap_host={str(host)[:80]!r} is not allowed: the name or address of a machine")
    if not _whole(port) or not 0 < port < 2**16:
        raise RequestError(f"bootstrap_port={str(port)[:80]!r} is not allowed: a port from 1 to 65535")
    return Room((host or "").strip("[]"), port, number)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spread(value: Any, prompts: int, sequences: int, name: str, *, step: bool = False) -> list[Any]:
    """One value for each sequence; ``step``: those of a prompt count on from its own."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value + i if step and _whole(value) else value for i in range(sequences)]
    if len(value) == sequences:
        return list(value)
    if len(value) != prompts or sequences % prompts:
        raise RequestError(f"{name} must be one value or a list of {sequences}, one for each answer")
    each = range(sequences // prompts)
    return [one + i if step and _whole(one) else one for one in value for i in each]

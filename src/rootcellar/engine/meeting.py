"""How ranks meet: JAX makes one machine of their devices, then each connects to rank 0.

``jax.distributed`` is needed until every process knows the others' devices and is connected to them. After that its
service would end every process when one of them dies; here the engine ends with an error and the process goes on. So it
is left once all have met. What comes after goes over the star of ``exchange.py``.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
from dataclasses import dataclass
from time import monotonic

import jax
import numpy as np
from jax.experimental import multihost_utils

from rootcellar.config import EngineConfig
from rootcellar.engine.exchange import Farewell, FrameKind, Link, Star
from rootcellar.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

_MEET = 300
"""Seconds for which ranks wait for each other at first."""
_SECRET = 32


@dataclass(frozen=True)
class _Group:
    """The ranks that met in this process: where rank 0 listens (there with ``listener``), and what they drew."""

    address: tuple[str, int]
    secret: bytes
    listener: socket.socket | None
    rank: int
    ranks: int


_group: list[_Group] = []
"""The one there is: JAX's processes meet once, and engines that come later connect again."""


def meet(config: EngineConfig) -> Star:
    """The exchange of a new engine with those of the other ranks; JAX must not have computed anything before.

    Raises:
        ConfigError: JAX was used before, or the address is none.
        EngineError: the others did not come.
    """
    if not _group:
        _group.append(_first(config))
    group = _group[0]
    if (group.rank, group.ranks) != (config.node_rank, config.nnodes):
        raise ConfigError(
            f"this process met others as rank {group.rank} of {group.ranks}: it cannot be rank {config.node_rank} of "
            f"{config.nnodes} (nnodes, node_rank)"
        )
    try:
        connections = _accept(group) if group.listener is not None else [_connect(group)]
    except (OSError, EOFError) as error:
        raise EngineError(f"the ranks of the engine did not meet: {error or 'rank 0 is gone'}") from error
    for each in connections:
        each.expect_within(config.dist_timeout)
    return Star(group.rank, group.ranks, connections, config.dist_timeout)


def _first(config: EngineConfig) -> _Group:
    assert config.dist_init_addr is not None
    host = _host(config.dist_init_addr)
    jax.config.update("jax_enable_recoverability", True)  # or nobody may leave while others stay
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_num_cpu_devices < config.tp_size // config.nnodes:
        jax.config.update("jax_num_cpu_devices", config.tp_size // config.nnodes)
    try:
        jax.distributed.initialize(
            config.dist_init_addr,
            config.nnodes,
            config.node_rank,
            initialization_timeout=_MEET,
            coordinator_bind_address=config.dist_init_addr,
            shutdown_timeout_seconds=_MEET,
        )
    except RuntimeError as error:
        raise ConfigError(f"rank {config.node_rank} could not meet the others (dist_init_addr): {error}") from None
    listener = None
    drawn = np.zeros(_SECRET + 2, np.int32)
    if config.node_rank == 0:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, 0), family=family, backlog=config.nnodes)
        drawn[:] = [*secrets.token_bytes(_SECRET), *divmod(listener.getsockname()[1], 256)]
    # The first thing that all compute together: with it every device is connected to every other.
    shared = np.asarray(multihost_utils.broadcast_one_to_all(drawn)).tolist()
    group = _Group(
        (host, shared[-2] * 256 + shared[-1]), bytes(shared[:_SECRET]), listener, config.node_rank, config.nnodes
    )
    _leave(group)
    log.info("rank %d of %d: %d devices, %d of them here", group.rank, group.ranks, jax.device_count(),
             jax.local_device_count())  # fmt: skip
    return group


def _leave(group: _Group) -> None:
    """Leave JAX's service: first all others, which say so to rank 0, then rank 0, which has it."""
    if group.listener is None:
        jax.distributed.shutdown()
        _connect(group).close(Farewell("left"))
    else:
        for each in _accept(group):
            each.close(Farewell("left"))
        jax.distributed.shutdown()


def _accept(group: _Group) -> list[Link]:
    """Rank 0: one connection to each other rank, in order. Who does not know the secret is not heard."""
    assert group.listener is not None
    until = monotonic() + _MEET  # however many strangers come meanwhile
    found: dict[int, Link] = {}
    while len(found) < group.ranks - 1:
        group.listener.settimeout(max(0.001, until - monotonic()))
        sock, _ = group.listener.accept()
        connection = Link(sock, _MEET, 0)
        try:
            greeting = connection.greeted(len(group.secret) + 2)
        except (OSError, EOFError):
            continue
        rank = int.from_bytes(greeting[-2:], "big")
        if hmac.compare_digest(greeting[:-2], group.secret) and 0 < rank < group.ranks and rank not in found:
            connection.peer = rank
            found[rank] = connection
        else:
            connection.close(Farewell("you are none of us"))
    for each in found.values():
        each.send(FrameKind.BEAT)
    return [found[rank] for rank in sorted(found)]


def _connect(group: _Group) -> Link:
    """Other ranks: the connection to rank 0, once that has all."""
    connection = Link(socket.create_connection(group.address, _MEET), _MEET, 0)
    connection.greet(group.secret + group.rank.to_bytes(2, "big"))
    connection.receive()
    return connection


def _host(address: str) -> str:
    """The host of ``address``; ``ConfigError`` for what is no ``host:port``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"dist_init_addr={address!r} is not allowed: give host:port of rank 0, as '10.0.0.1:5000'")
    return host.strip("[]")

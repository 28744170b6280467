"""Which side of prefill and decode an engine is, by its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rootcellar.cache import Key
from rootcellar.config import EngineConfig
from rootcellar.engine.apart import Admit, End, Peers
from rootcellar.engine.giving import Giving
from rootcellar.engine.taking import Taking
from rootcellar.errors import ConfigError
from rootcellar.runner import Runner
from rootcellar.scheduler import Scheduler
from rootcellar.tiers.host import HostMemory
from rootcellar.tiers.mover import Mover
from rootcellar.transfer.receiver import Receiver
from rootcellar.transfer.sender import TOGETHER, Sender
from rootcellar.transfer.talk import Patience
from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires import open_wire

_UNDER_WAY = 64 * 2**20
"""Bytes that can be under way at once by a wire that is told of its memory: two of the largest frames at least."""
Side = Callable[[Scheduler, End, Admit], Peers]
"""What a machine makes its ``Peers`` with."""


def open_peers(
    config: EngineConfig, runner: Runner, host: HostMemory, mover: Mover, kv_dtype: str, fingerprint: bytes
) -> Sender | Receiver | None:
    """Whoever speaks to other nodes; None: nobody. Raises ``ConfigError`` where it cannot listen."""
    if config.disaggregation_mode == "null":
        return None
    copiers = {kind: runner.copiers[pool] for kind, pool in runner.pool_of.items()}
    terms = Terms(
        config.page_size,
        str(runner.programs.dtype),
        kv_dtype,
        tuple((kind.name, kind.rule, kind.span) for kind in runner.programs.paging.kinds),
        {kind: copier.image.nbytes for kind, copier in copiers.items()},
        runner.placement.model.architecture,
        fingerprint.hex(),
        config.disaggregation_transfer_backend,
    )
    patience = _patience(config)
    address, port = config.disaggregation_host, config.disaggregation_bootstrap_port
    largest = TOGETHER * max(terms.image_bytes.values())
    wire = open_wire(config.disaggregation_transfer_backend, address, max(_UNDER_WAY, 2 * largest))
    if config.disaggregation_mode == "decode":
        images = {kind: host.images[pool] for kind, pool in runner.pool_of.items()}
        return Receiver(terms, images, mover, patience, wire=wire)
    try:
        return Sender(terms, copiers, address, port, patience, wire=wire)
    except OSError as error:
        raise ConfigError(
            f"a prefill node cannot listen on {address}:{port}: {error}; choose another disaggregation_host or "
            "disaggregation_bootstrap_port"
        ) from None


def side_of(config: EngineConfig, peers: Sender | Receiver | None, names_of: Callable[[Key], Sequence[bytes]]) -> Side:
    """What requests that meet others have to do with ``peers``; ``names_of``: the digests of a key's whole pages."""
    patience, recompute = _patience(config), config.disaggregation_fallback == "recompute"

    def side(scheduler: Scheduler, end: End, admit: Admit) -> Peers:
        if isinstance(peers, Sender):
            return Giving(scheduler, peers, names_of, end, admit, patience)
        if isinstance(peers, Receiver):
            return Taking(scheduler, peers, names_of, end, patience.meeting, recompute=recompute)
        return Peers()

    return side


def _patience(config: EngineConfig) -> Patience:
    return Patience(config.disaggregation_heartbeat_timeout, config.disaggregation_waiting_timeout)

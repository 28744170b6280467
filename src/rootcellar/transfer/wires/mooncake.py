"""Mooncake's transfer engine, over TCP: the decode node reads the prefill node's memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from rootcellar.errors import ConfigError
from rootcellar.tiers.settings import need
from rootcellar.transfer.wires.loans import LendingWire, Poll
from rootcellar.transfer.wires.tcp import WireError
from rootcellar.transfer.wires.wire import Bytes

_PENDING, _DONE = 0, 1


class MooncakeWire(LendingWire):
    """See ``PageWire``."""

    def __init__(self, host: str, nbytes: int) -> None:
        """Listen on ``host``; ``nbytes``: what can be lent or fetched at once. Raises ``ConfigError``."""
        self._engine: Any = need("mooncake.engine", "rootcellar[mooncake]", "the wire").TransferEngine()
        super().__init__(nbytes)
        if self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
            raise ConfigError(f"Mooncake's transfer engine cannot listen on {host}")
        if self._engine.register_memory(self._loans.address, nbytes):
            raise ConfigError(f"Mooncake's transfer engine takes no {nbytes} bytes of memory")
        self.address = f"{host}:{self._engine.get_rpc_port()}"

    def fetch(self, address: str, ticket: bytes, nbytes: int, deadline: float) -> AbstractContextManager[Bytes]:
        """See ``PageWire``."""

        def begin(there: int, here: int, nbytes: int) -> Poll:
            batch = self._engine.batch_transfer_async_read(address, [here], [there], [nbytes])
            if not batch:
                raise WireError(f"Mooncake's transfer engine cannot read from {address}")
            ended: list[int] = []

            def poll() -> bool:
                if not ended:  # asked of a batch that has ended it may answer for another
                    status = self._engine.transfer_check_status(batch)
                    if status == _PENDING:
                        return False
                    ended.append(status)
                if ended[0] != _DONE:
                    raise WireError(f"Mooncake's transfer engine could not read from {address}: status {ended[0]}")
                return True

            return poll

        return self._loans.fetch(begin, ticket, nbytes, deadline)

    def close(self) -> None:
        """See ``PageWire``."""
        self._engine.unregister_memory(self._loans.address)

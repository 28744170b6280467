"""NIXL over UCX (the package ``nixl``): the decode node reads the prefill node's memory."""

from __future__ import annotations

import base64
import binascii
import contextlib
import threading
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

from rootcellar.errors import ConfigError
from rootcellar.tiers.settings import need
from rootcellar.transfer.wires.loans import LendingWire, Poll
from rootcellar.transfer.wires.tcp import WireError
from rootcellar.transfer.wires.wire import Bytes

_DEVICE = 0
_DONE, _UNDER_WAY = "DONE", "PROC"


class NixlWire(LendingWire):
    """See ``PageWire``. An address is what NIXL calls an agent's metadata, in base 64."""

    def __init__(self, host: str, nbytes: int) -> None:  # noqa: ARG002  (UCX chooses where it listens)
        """``nbytes``: what can be lent or fetched at once. Raises ``ConfigError``."""
        api = need("nixl._api", "rootcellar[nixl]", "the wire")
        self._lock = threading.Lock()
        """NIXL's calls are not for several threads at once."""
        super().__init__(nbytes)
        self._others: dict[str, str] = {}
        """The names of other agents, by their addresses."""
        self._agent: Any = api.nixl_agent(uuid4().hex, api.nixl_agent_config(backends=["UCX"]))
        memory = [(self._loans.address, nbytes, _DEVICE, "")]
        self._registered = self._agent.register_memory(memory, mem_type="DRAM")
        if self._registered is None:
            raise ConfigError(f"NIXL takes no {nbytes} bytes of memory")
        self.address = base64.b64encode(self._agent.get_agent_metadata()).decode("ascii")

    def fetch(self, address: str, ticket: bytes, nbytes: int, deadline: float) -> AbstractContextManager[Bytes]:
        """See ``PageWire``."""

        def begin(there: int, here: int, nbytes: int) -> Poll:
            try:
                with self._lock:
                    name = self._named(address)
                    to = self._agent.get_xfer_descs([(here, nbytes, _DEVICE)], mem_type="DRAM")
                    source = self._agent.get_xfer_descs([(there, nbytes, _DEVICE)], mem_type="DRAM")
                    handle = self._agent.initialize_xfer("READ", to, source, name)
                    self._agent.transfer(handle)
            except Exception as error:  # NIXL has errors of its own, of no common kind
                raise self._lost(address, error) from None

            ended: list[WireError | None] = []

            def poll() -> bool:
                if not ended:  # a handle is looked at as long as it is ours
                    try:
                        with self._lock:
                            state = self._agent.check_xfer_state(handle)
                            if state == _UNDER_WAY:
                                return False
                            if state == _DONE:
                                self._agent.release_xfer_handle(handle)
                        ended.append(None if state == _DONE else self._lost(address, state, handle))
                    except Exception as error:
                        ended.append(self._lost(address, error, handle))
                if ended[0] is not None:
                    raise ended[0]
                return True

            return poll

        return self._loans.fetch(begin, ticket, nbytes, deadline)

    def close(self) -> None:
        """See ``PageWire``."""
        with self._lock:
            self._agent.deregister_memory(self._registered)

    def _named(self, address: str) -> str:
        if address not in self._others:
            try:
                said = base64.b64decode(address, validate=True)
            except binascii.Error:
                raise WireError("the prefill node's address is none of NIXL's") from None
            name = self._agent.add_remote_agent(said)
            self._others[address] = name.decode() if isinstance(name, bytes) else name
        return self._others[address]

    def _lost(self, address: str, why: object, handle: object = None) -> WireError:
        """What to raise; the other agent is forgotten, and made known again next time."""
        with self._lock:
            name = self._others.pop(address, None)
            with contextlib.suppress(Exception):  # of NIXL's own kinds: it may know it no more
                if handle is not None:
                    self._agent.release_xfer_handle(handle)
                if name is not None:
                    self._agent.remove_remote_agent(name)
        return WireError(f"NIXL could not read the prefill node's memory: {why or type(why).__name__}")

"""NIXL's agent, with one of its plugins: memory of ours, to or from what the plugin moves bytes to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import numpy as np

from rootcellar.errors import ConfigError
from rootcellar.tiers.settings import need

_AT_ONCE = 8
"""Looks at a transfer without a pause: where the system holds files in memory, it is in looking that it is done."""
_POLL, _LONGEST = 5e-5, 0.05
"""Seconds between two looks after these, at least and at most. In between, a twentieth of what it has taken so far: who
looks more often takes the processor from what is looked at."""


class Agent:
    """One agent with one plugin; ``lock`` is held by whoever calls it."""

    def __init__(self, plugin: str, settings: Mapping[str, str], timeout: float) -> None:
        """``settings`` are the plugin's. Raises ``ConfigError``: NIXL or its plugin is missing."""
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else it says on standard output that it began
        api = need("nixl._api", "rootcellar[nixl]", "a nixl store")
        self._name = f"rootcellar-{uuid4().hex}"
        self._plugin = plugin
        self._timeout = timeout
        self.lock = threading.Lock()
        try:
            # Its thread for progress would turn without end.
            self._agent: Any = api.nixl_agent(self._name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self._agent.create_backend(plugin, dict(settings))
        except Exception as error:
            raise ConfigError(f"the nixl store's plugin {plugin} cannot be used: {error!r}") from error

    def holds(self, kind: str, descriptors: Sequence[tuple[int, int, int, str]]) -> list[bool]:
        """Which of these the plugin finds. Raises what NIXL does."""
        found = self._agent.query_memory(list(descriptors), self._plugin, kind)
        return [each is not None for each in found]

    def move(
        self, verb: str, views: Sequence[memoryview], kind: str, descriptors: Sequence[Any], *, apart: bool = False
    ) -> list[bool]:
        """Carry out a transfer; whether each was done. Raises ``OSError`` when it took too long.

        It returns when NIXL no longer works in the memory, however long that is: the guard waits no longer than it
        wants to, and does not use that memory again before.

        Args:
            verb: ``READ`` or ``WRITE``.
            views: memory here.
            kind: what ``descriptors`` are of, as NIXL calls it.
            descriptors: (offset, bytes, number, more) of each.
            apart: a transfer for each, of which some may fail; else all are done or none is.
        """
        local = [(int(np.frombuffer(view, np.uint8).ctypes.data), len(view), 0, "") for view in views]
        groups = [slice(i, i + 1) for i in range(len(local))] if apart else [slice(None)]
        with self._registered(local, "DRAM"), self._registered(list(descriptors), kind), ExitStack() as stack:
            began = time.monotonic()
            handles = []
            for some in groups:
                ours = self._agent.get_xfer_descs([each[:3] for each in local[some]], "DRAM")
                theirs = self._agent.get_xfer_descs([each[:3] for each in descriptors[some]], kind)
                handles.append(self._agent.initialize_xfer(verb, ours, theirs, self._name))
                stack.callback(self._agent.release_xfer_handle, handles[-1])
            states = [_state(self._agent.transfer, handle) for handle in handles]
            looks = 0
            while "PROC" in states:
                if looks >= _AT_ONCE:
                    time.sleep(min(max(_POLL, (time.monotonic() - began) / 20), _LONGEST))
                looks += 1
                for i, handle in enumerate(handles):
                    if states[i] == "PROC":
                        states[i] = _state(self._agent.check_xfer_state, handle)
            if time.monotonic() - began > self._timeout:
                raise OSError(f"NIXL did not end a transfer within {self._timeout:g} s")
        return [state == "DONE" for state in states for _ in range(1 if apart else len(local))]

    @contextmanager
    def _registered(self, descriptors: list[Any], kind: str) -> Iterator[None]:
        held = self._agent.register_memory(descriptors, kind)
        try:
            yield
        finally:
            self._agent.deregister_memory(held)


def _state(call: Any, handle: Any) -> str:
    """Of a transfer, ``ERR`` too where NIXL raises: others that began beside it must be waited for."""
    try:
        return str(call(handle))
    except Exception:
        return "ERR"


@contextmanager
def as_os_error() -> Iterator[None]:
    """What NIXL raises, as ``OSError``."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"NIXL failed: {error!r}") from error

"""How often XLA compiled, or loaded from its persistent cache, in this process."""

from __future__ import annotations

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_total = 0


def _listen(event: str, _seconds: float, **_: object) -> None:
    global _total  # noqa: PLW0603 - jax.monitoring has no way to remove a listener: one for the process
    if event == _EVENT:
        _total += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompileCounter:
    """Counts the compilations of this process since it was made."""

    def __init__(self) -> None:
        self._start = _total

    @property
    def count(self) -> int:
        """Compilations since this counter was made."""
        return _total - self._start

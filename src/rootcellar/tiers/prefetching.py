"""When a waiting request has its pages brought from a store, and for how long it waits: settings, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rootcellar.tiers.numbers import positive


@dataclass(frozen=True, slots=True)
class PrefetchSettings:
    """Of ``--hicache-storage-backend-extra-config``, there with ``prefetch_`` before their names."""

    threshold: int = 256
    """Tokens that a store must add for it to be asked."""
    timeout_base: float = 2.0
    """Seconds."""
    timeout_per_ki_token: float = 0.1
    """Seconds for each 1,024 tokens."""
    timeout_max: float = 30.0
    """Seconds."""

    def timeout(self, tokens: int) -> float:
        """Seconds for which a request waits for so many tokens, under the policy ``timeout``."""
        return min(self.timeout_max, self.timeout_base + self.timeout_per_ki_token * tokens / 1024)

    @classmethod
    def split(cls, extra: Mapping[str, object]) -> tuple[PrefetchSettings, dict[str, object]]:
        """What ``extra`` says of them, and what is left for the store. Raises ``ConfigError`` for a wrong value."""
        rest, usual = dict(extra), cls()
        settings = cls(
            threshold=int(positive(rest, "prefetch_threshold", usual.threshold, whole=True, zero=True)),
            timeout_base=positive(rest, "prefetch_timeout_base", usual.timeout_base, zero=True),
            timeout_per_ki_token=positive(rest, "prefetch_timeout_per_ki_token", usual.timeout_per_ki_token, zero=True),
            timeout_max=positive(rest, "prefetch_timeout_max", usual.timeout_max, zero=True),
        )
        return settings, rest

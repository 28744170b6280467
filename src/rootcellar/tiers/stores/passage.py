"""What calls go through that must end before what they use is taken away."""

from __future__ import annotations

import threading


class Passage:
    """``with passage:`` around calls; ``shut`` waits for those that are inside and lets no more in."""

    def __init__(self) -> None:
        """Open, with nobody inside."""
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    def __enter__(self) -> None:
        """Go in. Raises ``ValueError`` when it is shut; whoever is inside may go in again."""
        with self._changed:
            if self._shut:
                raise ValueError("the store is closed")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def shut(self) -> bool:
        """Shut it and wait until nobody is inside. False: it was shut before."""
        with self._changed:
            first, self._shut = not self._shut, True
            self._changed.wait_for(lambda: not self._inside)
            return first

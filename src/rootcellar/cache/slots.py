"""Who owns which page of one pool: a stack of free pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int32]


class SlotAllocator:
    """Free pages of one kind on one tier, numbered 1 to ``size // page_size``; page 0 is padding and never given out.

    ``size`` is in tokens and is rounded down to whole pages (a recurrent kind has pages of one state). The free pages
    are a stack in one int32 array: taking or returning ``k`` pages copies ``k`` numbers, whatever the pool's size.
    """

    __slots__ = ("_stack", "_top", "free_pages", "page_size", "pages")

    def __init__(self, size: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages = size // page_size
        self._stack: Pages = np.arange(1, self.pages + 1, dtype=np.int32)
        self._top = 0  # the free pages are _stack[_top:], the next to be taken first
        self.free_pages = self.pages

    def take(self, count: int) -> Pages:
        """``count`` pages, int32 ``[count]``. The caller has seen to it that ``free_pages >= count``."""
        top = self._top
        self._top = top + count
        self.free_pages -= count
        return self._stack[top : top + count].copy()

    def give(self, pages: Pages) -> None:
        """Return pages taken before; the first of them is the next to be taken."""
        top = self._top
        self._top = top - len(pages)
        self.free_pages += len(pages)
        self._stack[self._top : top] = pages

    def reset(self, free: Pages) -> None:
        """Make exactly these pages free, the first to be taken next."""
        self.free_pages = len(free)
        self._top = self.pages - len(free)
        self._stack[self._top :] = free

    def free_list(self) -> Pages:
        """A copy of the free pages, next to be taken first (for ``check``)."""
        return self._stack[self._top :].copy()


def not_free(pages: int, free: Pages) -> Pages:
    """The pages 1 to ``pages`` that are not in ``free``, ascending."""
    used = np.ones(pages + 1, np.bool_)
    used[0] = False
    used[free] = False
    return np.flatnonzero(used).astype(np.int32)

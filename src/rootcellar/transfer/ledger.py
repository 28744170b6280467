"""What of a room was offered, asked for, sent and acknowledged: what a prefill node still holds, and for which pages.

The manifest of a room grows as chunks are committed, and what is asked for may come before it or after it. A page is
*due* when both are there. A manifest is let go of when all of it that was asked for has arrived.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from rootcellar.cache import Manifest
from rootcellar.transfer.talk import PageName


class Ledger:
    """That of one room. Pages that were asked for go by their index, from 0."""

    def __init__(self) -> None:
        self.wanted: list[PageName] = []
        self.complete = False
        """Whether nothing more will be offered."""
        self._offered: dict[PageName, tuple[int, int]] = {}
        """The slot of each page on the device, and the manifest that holds it."""
        self._held: dict[int, list[PageName]] = {}
        """The pages of each manifest, not yet let go of."""
        self._left: dict[int, int] = {}
        """How many of them were asked for and have not arrived."""
        self._waiting: dict[PageName, list[int]] = {}
        self._due: list[int] = []
        self._under_way: dict[int, int] = {}
        """Of each page that was due and has not arrived: its manifest."""

    @property
    def manifests(self) -> list[int]:
        """Those that are held."""
        return list(self._held)

    def offer(self, manifest: Manifest) -> None:
        """These pages can be had now."""
        pages = [(part.kind, digest) for part in manifest.parts for digest in part.digests]
        slots = [int(slot) for part in manifest.parts for slot in part.slots]
        self._held[manifest.id], self._left[manifest.id] = pages, 0
        for page, slot in zip(pages, slots, strict=True):
            self._offered.setdefault(page, (slot, manifest.id))
            for index in self._waiting.pop(page, ()):
                self._becomes_due(index)

    def want(self, pages: Iterable[PageName]) -> None:
        """These are asked for."""
        for page in pages:
            index = len(self.wanted)
            self.wanted.append(page)
            if page in self._offered:
                self._becomes_due(index)
            else:
                self._waiting.setdefault(page, []).append(index)

    def end(self) -> None:
        """Nothing more will be offered."""
        self.complete = True

    def take_due(self, most: int) -> tuple[str, list[tuple[int, int]]]:
        """Up to so many pages to be sent, each once, all of one kind: index and slot on the device; empty: none is."""
        kind = self.wanted[self._due[0]][0] if self._due else ""
        run = itertools.takewhile(lambda index: self.wanted[index][0] == kind, self._due[:most])
        taken = [(index, self._offered[self.wanted[index]][0]) for index in run]
        del self._due[: len(taken)]
        return kind, taken

    def take_missing(self) -> list[int]:
        """Pages that were asked for and will not come, each once; none as long as more may be offered."""
        if not self.complete:
            return []
        missing = sorted(index for indices in self._waiting.values() for index in indices)
        self._waiting.clear()
        return missing

    def arrived(self, indices: Iterable[int]) -> None:
        """These were acknowledged; what was not under way is passed over."""
        for index in indices:
            manifest = self._under_way.pop(index, None)
            if manifest is not None:
                self._left[manifest] -= 1

    def let_go(self) -> list[int]:
        """Manifests of which all that was asked for has arrived, once anything was: they are held no longer."""
        if not self.wanted:
            return []
        done = [manifest for manifest, left in self._left.items() if not left]
        for manifest in done:
            for page in self._held.pop(manifest):
                if self._offered.get(page, (0, 0))[1] == manifest:
                    del self._offered[page]
            del self._left[manifest]
        return done

    def _becomes_due(self, index: int) -> None:
        manifest = self._offered[self.wanted[index]][1]
        self._left[manifest] += 1
        self._under_way[index] = manifest
        self._due.append(index)

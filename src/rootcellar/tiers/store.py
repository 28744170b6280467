"""What a store is: a place outside the process that keeps pages by name.

A *name* is 32 bytes and stands for all that the bytes of its page follow from, so a page is never changed: putting a
name that is there is no work. An *image* is the bytes of one page of one kind, all its layers, in one block; equal
names have images of equal length.

A store is three calls and :meth:`Store.close`. They may come from several threads at once, and they block, so only
those who move bytes make them. What a store cannot do it says by ``False``, page by page; it raises ``OSError`` when
its medium fails, and then whatever it did not confirm may or may not be there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Protocol

NAME_BYTES = 32
"""Length of a name."""
Block = memoryview | bytes
"""Bytes that are only read."""


class Store(Protocol):
    """Pages by name. ``ValueError`` for a name of another length and for lists of different lengths."""

    @property
    def verifies(self) -> bool:
        """Whether ``get`` itself checks name, length and checksum of what it returns; ``Guard`` does it for others."""
        ...

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """Which of these pages are there, as far as can be known without reading them; ``get`` may still miss."""
        ...

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """Copy the image of ``names[i]`` over ``into[i]``, whose length in bytes it must have, where it is there.

        False: it is not there, has another length or is damaged. What ``into[i]`` then holds means nothing.
        """
        ...

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """Keep ``blocks[i]``, an image of one byte or more, as ``names[i]``.

        True: it is there, and survives the end of this process by whatever means. False: there is no room for it.
        ``blocks`` may be changed as soon as the call has returned.
        """
        ...

    def clear(self) -> int:
        """Forget every page, whoever put it; how many there were."""
        ...

    def register(self, buffer: memoryview) -> None:
        """``into`` and ``blocks`` will lie in this memory. Stores that get nothing out of that do nothing."""
        ...

    def close(self) -> None:
        """Give up what the store holds in this process; its pages stay. May be called twice, and nothing after it."""
        ...


class GatheringStore(ABC):
    """A :class:`Store` that does not verify, and puts objects whose tail lies apart from the image without a copy."""

    @abstractmethod
    def gathers(self, images: Sequence[memoryview]) -> bool:
        """Whether that is sooner done for these than ``put``; they lie where it was shown, if it needs that."""

    @abstractmethod
    def put_parts(
        self, names: Sequence[bytes], images: Sequence[memoryview], tail: Callable[[int], Block]
    ) -> list[bool]:
        """As ``put`` of blocks that are ``images[i]``, then ``tail(i)``, which it may have to wait for."""


class TimedStore(ABC):
    """A :class:`Store` that ends its calls at a moment ``by`` of ``time.monotonic`` or soon after it."""

    @abstractmethod
    def has(self, names: Sequence[bytes], by: float | None = None) -> list[bool]:
        """See ``Store``."""

    @abstractmethod
    def get(self, names: Sequence[bytes], into: Sequence[memoryview], by: float | None = None) -> list[bool]:
        """See ``Store``."""

    @abstractmethod
    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview], by: float | None = None) -> list[bool]:
        """See ``Store``."""


class WrittenElsewhere:
    """A store that another process writes, of what this one would: it is read here, and putting is its work."""

    def __init__(self, store: Store) -> None:
        """``store`` is only read."""
        self._store = store

    @property
    def verifies(self) -> bool:
        """See ``Store``."""
        return self._store.verifies

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``."""
        return self._store.has(names)

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``."""
        return self._store.get(names, into)

    def put(self, names: Sequence[bytes], _blocks: Sequence[memoryview]) -> list[bool]:
        """The other process says whether it is there."""
        return [True] * len(names)

    def clear(self) -> int:
        """The other process does."""
        return 0

    def register(self, buffer: memoryview) -> None:
        """See ``Store``."""
        self._store.register(buffer)

    def close(self) -> None:
        """See ``Store``."""
        self._store.close()


def page_name(kind: str, digest: bytes) -> bytes:
    """The name of a kind's page: the digest of its tokens (``cache/digest.py``) is the same for all kinds."""
    return sha256(b"rootcellar.image.v1" + len(digest).to_bytes(1, "little") + digest + kind.encode()).digest()


def check_names(names: Sequence[bytes], blocks: Sequence[memoryview] | None = None) -> None:
    """Raise ``ValueError`` for what no store takes; see :class:`Store`."""
    if any(len(name) != NAME_BYTES for name in names):
        raise ValueError(f"a name has {NAME_BYTES} bytes, not {sorted({len(name) for name in names})}")
    if blocks is not None and len(blocks) != len(names):
        raise ValueError(f"{len(names)} names and {len(blocks)} blocks")
    if blocks is not None and any(block.nbytes == 0 for block in blocks):
        raise ValueError("a block has no bytes")

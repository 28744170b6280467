"""What a page's content is called outside the process: one scheme for storage keys, peers and KV events.

Pages are named in pairs from the first on. The first of a pair is called
``SHA-256(its tokens + parent + widths)``, the second ``SHA-256(tokens of both + parent + widths)``, where the parent is
the name of the page before the pair, and before the first pair the SHA-256 of the page size, the fingerprint (model,
revision, layout: whatever changes the bytes) and the namespace. So equal digests mean equal bytes: same model, same
layout, same namespace, same tokens from the first on.

Tokens are little-endian, 4 bytes each where all of a page fit 32 bits, else 8. ``widths`` is one byte: the first page's
4 or 8, and 16 times the second's. All that comes from a page's tokens can be hashed before its parent is known and is
hashed once, so a chain waits for one block of SHA-256 in two pages, and four blocks can be under way at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.node import Node


@dataclass(frozen=True, slots=True)
class Naming:
    """What the names of a cache's pages begin with; ``fingerprint``: whatever else changes a page's bytes."""

    page_size: int
    fingerprint: bytes = b""


def seed_digest(fingerprint: bytes, namespace: str, page_size: int) -> bytes:
    """The parent of a key's first page, 32 bytes."""
    head = page_size.to_bytes(8, "little") + len(fingerprint).to_bytes(8, "little")
    name = namespace.encode("utf-8", "surrogatepass")
    return sha256(b"rootcellar.page.v3" + head + fingerprint + name).digest()


def chain(parent: bytes, tokens: NDArray[np.int64], page_size: int) -> list[bytes]:
    """Digests of the whole pages of ``tokens``, which begin with a pair; ``parent`` is that of the page before it."""
    pages = tokens[: len(tokens) // page_size * page_size].reshape(-1, page_size)
    narrow = ((pages >> 32) == 0).all(axis=1)
    digests: list[bytes] = []
    for i, (page, fits) in enumerate(zip(pages, narrow.tolist(), strict=True)):
        width = 4 if fits else 8
        text = page.astype(f"<i{width}").tobytes()
        if i % 2 == 0:
            pair, widths = sha256(text), width
        else:
            pair.update(text)
            widths += 16 * width
        whole = pair.copy()
        whole.update(parent + bytes([widths]))
        digests.append(whole.digest())
        if i % 2 == 1:
            parent = digests[-1]
    return digests


def digest_before(naming: Naming, node: Node, page: int) -> bytes:
    """The digest of the page before a page on the way to a node, whose digests are known."""
    while node.parent is not None and node.start >= page:
        node = node.parent
    if node.parent is None:
        return seed_digest(naming.fingerprint, node.namespace, naming.page_size)
    return node.digests[page - 1 - node.start]


def page_digests(naming: Naming, node: Node) -> list[bytes]:
    """The digests of a node's pages, computed once and kept on the nodes of its path."""
    size = naming.page_size
    path: list[Node] = []
    climb = node
    while climb.parent is not None and len(climb.digests) < climb.size:
        path.append(climb)
        climb = climb.parent
    for step in reversed(path):
        above = step.parent
        assert above is not None
        known = len(step.digests)
        page, tokens = step.start + known, step.tokens[known * size :]
        odd = page % 2  # then the pair's first page comes before, and may lie in the node above
        if odd:
            before = step.tokens[: known * size] if known else above.tokens
            tokens = np.concatenate([before[len(before) - size :], tokens])
        step.digests = step.digests + chain(digest_before(naming, step, page - odd), tokens, size)[odd:]
    return node.digests

"""What a page's content is called outside the process: one scheme for storage keys, peers and KV events.

``digest[i] = SHA-256(tokens of page i + digest[i - 1])``, and ``digest[-1]`` is the SHA-256 of the page size, the
fingerprint (model, revision, layout: whatever changes the bytes) and the namespace. So equal digests mean equal bytes:
same model, same layout, same namespace, same tokens from the first on. Tokens are little-endian, 4 bytes each when all
of the page fit 32 bits, else 8. They come first so that all pages of a key but their last blocks can be hashed side by
side: the chain runs through one block of SHA-256 a page.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rootcellar.cache.node import Node
    from rootcellar.cache.tree import Tree


def seed_digest(fingerprint: bytes, namespace: str, page_size: int) -> bytes:
    """The parent of a key's first page, 32 bytes."""
    head = page_size.to_bytes(8, "little") + len(fingerprint).to_bytes(8, "little")
    name = namespace.encode("utf-8", "surrogatepass")
    return sha256(b"rootcellar.page.v2" + head + fingerprint + name).digest()


def chain(parent: bytes, tokens: NDArray[np.int64], page_size: int) -> list[bytes]:
    """Digests of the whole pages of ``tokens`` that follow a page with digest ``parent``."""
    pages = tokens[: len(tokens) // page_size * page_size].reshape(-1, page_size)
    narrow = ((pages >> 32) == 0).all(axis=1)
    digests = []
    for page, fits in zip(pages, narrow.tolist(), strict=True):
        parent = sha256(page.astype("<u4" if fits else "<i8").tobytes() + parent).digest()
        digests.append(parent)
    return digests


def page_digests(tree: Tree, node: Node) -> list[bytes]:
    """The digests of a node's pages, computed once and kept on the nodes of its path."""
    path: list[Node] = []
    climb = node
    while climb.parent is not None and len(climb.digests) < climb.size:
        path.append(climb)
        climb = climb.parent
    for step in reversed(path):
        above = step.parent
        assert above is not None
        if step.digests:
            parent = step.digests[-1]
        elif above.parent is None:
            parent = seed_digest(tree.fingerprint, above.namespace, tree.page_size)
        else:
            parent = above.digests[-1]
        known = len(step.digests) * tree.page_size
        step.digests = step.digests + chain(parent, step.tokens[known:], tree.page_size)
    return node.digests

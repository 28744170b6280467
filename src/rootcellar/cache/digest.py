"""What a page's content is called outside the process: one scheme for storage keys, peers and KV events.

``digest[i] = SHA-256(digest[i - 1] + tokens of page i as little-endian int64)``, and ``digest[-1]`` is the SHA-256 of
the fingerprint (model, revision, layout: whatever changes the bytes) and the namespace. So equal digests mean equal
bytes: same model, same layout, same namespace, same tokens from the first on.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.key import Key

if TYPE_CHECKING:
    from rootcellar.cache.node import Node
    from rootcellar.cache.tree import Tree


def seed_digest(fingerprint: bytes, namespace: str) -> bytes:
    """The parent of a key's first page, 32 bytes."""
    head = len(fingerprint).to_bytes(8, "little")
    return sha256(b"rootcellar.page.v1" + head + fingerprint + namespace.encode()).digest()


def chain(parent: bytes, tokens: NDArray[np.int64], page_size: int) -> list[bytes]:
    """Digests of the whole pages of ``tokens`` that follow a page with digest ``parent``."""
    raw = tokens.astype("<i8", copy=False).tobytes()
    step = 8 * page_size
    digests = []
    for at in range(0, len(raw) - step + 1, step):
        parent = sha256(parent + raw[at : at + step]).digest()
        digests.append(parent)
    return digests


def digests(key: Key, page_size: int, fingerprint: bytes = b"") -> list[bytes]:
    """One 32-byte digest per whole page of a key, each over all tokens up to the page's end."""
    return chain(seed_digest(fingerprint, key.namespace), key.tokens, page_size)


def page_digests(tree: Tree, node: Node, fingerprint: bytes) -> list[bytes]:
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
            parent = seed_digest(fingerprint, above.namespace)
        else:
            parent = above.digests[-1]
        known = len(step.digests) * tree.page_size
        step.digests = step.digests + chain(parent, step.tokens[known:], tree.page_size)
    return node.digests

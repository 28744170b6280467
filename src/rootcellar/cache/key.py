"""Keys: what a request's tokens are called in the tree."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootcellar.errors import RequestError


class Key:
    """Token ids and the namespace whose root they hang from.

    ``tokens`` is anything that ``np.asarray`` takes, one-dimensional; it is kept as int64, because an image's
    placeholder ids come from a content hash and a bigram packs two tokens. ``namespace`` isolates what must not be
    shared (LoRA id, tenant salt, weight version; SGLang's ``extra_key``). ``key[:n]`` and ``key[a:b]`` are views.

    A numpy int64 array is not copied. One that is read-only must never change again, by way of another view either: the
    native core refers to its memory where it would else copy it. What a key made itself (of a list, say) is read-only.
    """

    __slots__ = ("namespace", "tokens")

    def __init__(self, tokens: ArrayLike, namespace: str = "") -> None:
        array = np.ascontiguousarray(tokens, dtype=np.int64)
        if array.ndim != 1:
            raise RequestError(f"a key's tokens have {array.ndim} dimensions; give a flat list of token ids")
        if array is not tokens and array.base is None:
            array.flags.writeable = False  # our own
        self.tokens: NDArray[np.int64] = array
        self.namespace = namespace

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice) -> Key:
        return Key(self.tokens[index], self.namespace)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self.namespace == other.namespace and np.array_equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        return hash((self.namespace, self.tokens.tobytes()))

    def __repr__(self) -> str:
        head = ", ".join(str(t) for t in self.tokens[:4])
        more = ", ..." if len(self) > 4 else ""
        return f"Key([{head}{more}], {len(self)} tokens, namespace={self.namespace!r})"

    def bigrams(self) -> Key:
        """The bigram key of these tokens (EAGLE drafts are keyed by pairs): int64, one unit shorter than the key.

        Unit ``i`` packs token ``i`` in the high and token ``i + 1`` in the low 32 bits. Raises ``RequestError`` when a
        token does not fit 32 bits: such a key (image placeholders) has no bigrams.
        """
        tokens = self.tokens
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 32):
            raise RequestError("bigram keys need token ids in [0, 2**32); this key has others (image placeholders?)")
        if len(tokens) < 2:
            return Key(tokens[:0], self.namespace)
        return Key((tokens[:-1] << 32) | tokens[1:], self.namespace)

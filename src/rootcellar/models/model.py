"""What a model is: global sizes, and for each layer a mixer of tokens and a feed-forward.

Everything is frozen and hashable, so that a ``ModelConfig`` can be a static argument of a jitted function. A *mixer*
(``mixers/``) is attention or what stands in its place; a *feed-forward* (``feed_forward/``) works on each token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import jax

from rootcellar.cache.kind import Rule
from rootcellar.errors import ModelError
from rootcellar.models.encoders import Encoder
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.norms import Norm
from rootcellar.models.rope import RopeConfig
from rootcellar.models.spec import Declare, Params
from rootcellar.plan.stored import DTYPES, Stored


class Mixer(Protocol):
    """What mixes tokens in a layer: attention, or a recurrence. One frozen dataclass each."""

    @property
    def rule(self) -> Rule:
        """Which cached positions are needed to resume: the rule of the cache's ``Kind``."""
        ...

    @property
    def span(self) -> int:
        """Tokens of the window or chunk; 0 where the rule has none."""
        ...

    @property
    def widths(self) -> tuple[int, int, int]:
        """(heads, key/value heads, elements of a head) that an upper bound of a step's memory is counted from."""
        ...

    @property
    def stored(self) -> Stored:
        """What a layer stores of a token or a request."""
        ...

    def declare(self, declare: Declare, embed: int) -> Params:
        """Its parameters: a ``ParamSpec`` for each name."""
        ...

    def run(
        self, params: Params, x: jax.Array, batch: ForwardBatch, buffers: Sequence[jax.Array]
    ) -> tuple[jax.Array, Sequence[jax.Array]]:
        """``x`` [T, E] of a packed batch mixed through the layer's ``buffers`` (donated).

        Returns ``[T, E]`` in the dtype of ``x`` and the buffers with what the batch added. Rows of padding come out as
        anything.
        """
        ...

    def plain(self, params: Params, x: jax.Array) -> jax.Array:
        """One whole sequence ``x`` [T, E] from position 0, without a cache: slow, obvious, differentiable."""
        ...

    def served(self, tp_size: int) -> Self:
        """Itself as ``tp_size`` devices compute it: with key/value heads repeated, where there are too few.

        Raises ``ConfigError`` when it cannot run on so many.
        """
        ...

    def as_served(self, params: Params, tp_size: int) -> Params:
        """Those of its parameters that are given, as ``served(tp_size)`` declares them."""
        ...

    def splits(self, tp_size: int) -> bool:
        """Whether its heads can be divided among ``tp_size`` devices; otherwise each computes all of them."""
        ...


class FeedForward(Protocol):
    """What works on each token alone. One frozen dataclass each."""

    def width(self, embed: int) -> int:
        """Elements of its inner activations of one token ``[embed]``, for an upper bound of a step's memory."""
        ...

    def declare(self, declare: Declare, embed: int) -> Params:
        """Its parameters: a ``ParamSpec`` for each name."""
        ...

    def served(self, tp_size: int) -> Self:
        """Itself as ``tp_size`` devices compute it: what each has lies beside each other."""
        ...

    def as_served(self, params: Params, tp_size: int) -> Params:
        """Those of its parameters that are given, as ``served(tp_size)`` declares them."""
        ...

    def apply(self, params: Params, x: jax.Array, tell: Callable[[jax.Array], None] | None = None) -> jax.Array:
        """``[T, E]`` of ``x`` [T, E], in its dtype; ``tell`` gets the experts that a router chose, int32 [T, K]."""
        ...


@dataclass(frozen=True)
class LayerConfig:
    """One layer.

    ``feed_forward``: None where there is none (some layers of Nemotron-H).
    ``pre_norms``: what mixer and feed-forward are given is normed (all but OLMo 2 and 3); ``post_norms``: what they
    give is, before it is added (Gemma, GLM 4, OLMo).
    ``scaled``: what leaves the layer is multiplied by a number of its own (Gemma 4).
    ``numbers``: the checkpoint's of the mixer and of the feed-forward, where each is a layer of its own there.
    """

    mixer: Mixer
    feed_forward: FeedForward | None
    pre_norms: bool = True
    post_norms: bool = False
    scaled: bool = False
    numbers: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """``attn``, the mixer, and ``mlp``, the feed-forward: what begins the names of its norms."""
        return ("attn",) if self.feed_forward is None else ("attn", "mlp")

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of its norms."""
        kinds = ["norm"] * self.pre_norms + ["post_norm"] * self.post_norms
        return tuple(f"{part}_{kind}" for kind in kinds for part in self.parts)

    def served(self, tp_size: int) -> Self:
        """Itself as ``tp_size`` devices compute it: see ``Mixer`` and ``FeedForward``."""
        feed_forward = None if self.feed_forward is None else self.feed_forward.served(tp_size)
        return replace(self, mixer=self.mixer.served(tp_size), feed_forward=feed_forward)

    def as_served(self, params: Params, tp_size: int) -> Params:
        """Those of its parameters that are given, as ``served(tp_size)`` declares them."""
        params = self.mixer.as_served(params, tp_size)
        return params if self.feed_forward is None else self.feed_forward.as_served(params, tp_size)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: its layers, and what is global to it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm: Norm
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    embed_scale: float = 1.0
    """Multiplies embeddings (Gemma: the root of ``hidden_size``)."""
    residual_scale: float = 1.0
    """Multiplies what mixers and feed-forwards add (Granite)."""
    logit_scale: float = 1.0
    """Multiplies scores (Granite)."""
    logit_softcap: float | None = None
    """Scores are squashed to within this by tanh."""
    eos_token_ids: tuple[int, ...] = ()
    """Every id that the checkpoint's configs name as an end of text, ascending; the tokenizer may know another."""
    bos_token_id: int | None = None
    dtype: str = "float32"
    """The dtype that the checkpoint was saved in, as ``config.json`` says (one of ``DTYPES``); loading may differ."""
    rope: RopeConfig | None = None
    """The rotary embedding whose scaling says how long a sequence may be."""
    encoder: Encoder | None = None
    """What makes vectors of pictures; None: the model knows tokens alone."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ModelError("num_hidden_layers must be at least 1")
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype={self.dtype!r} is not supported; known: {', '.join(DTYPES)}")

    @property
    def axes(self) -> int:
        """Axes of a token's place for rotary embeddings, where it is more than its position; else 0."""
        return 0 if self.rope is None else len(self.rope.sections)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have: ``max_position_embeddings``, stretched where rope scaling stretches it.

        ``linear`` and ``dynamic`` count from ``max_position_embeddings``, ``yarn`` from the original context; in
        ``llama3`` configs ``max_position_embeddings`` is the stretched context already.
        """
        rope = self.rope
        if rope is None:
            return self.max_position_embeddings
        if rope.type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.type == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max * rope.factor))
        return self.max_position_embeddings

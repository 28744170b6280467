"""A model's layers grouped into the cache's kinds, and how the pages of each lie in pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rootcellar.cache.kind import RULES, Kind, full
from rootcellar.errors import ConfigError
from rootcellar.models.feed_forward import Experts
from rootcellar.models.model import ModelConfig
from rootcellar.plan.arena import group
from rootcellar.plan.sizing import ARENA
from rootcellar.plan.stored import Routes
from rootcellar.pools import Layout, layout_of

_NAMES = {"full": "full", "sliding_window": "window", "chunked_local": "chunk", "recurrent": "recurrent"}
EXPERTS = "experts"
"""The kind that keeps which experts each token went through: needed of all tokens, whatever the layers attend over."""


@dataclass(frozen=True)
class Paging:
    """A model's kinds, the layout of each kind's pages by its name, and which of them share a pool.

    ``arena``: the kinds that share one pool, whose pages have ``arena_layers`` layers.
    """

    kinds: tuple[Kind, ...]
    layouts: Mapping[str, Layout]
    arena: tuple[str, ...] = ()
    arena_layers: int = 0

    @property
    def pool_of(self) -> dict[str, str]:
        """The name of the pool that each kind's layers lie in: its own, or the arena."""
        return {kind.name: ARENA if kind.name in self.arena else kind.name for kind in self.kinds}

    @property
    def pools(self) -> dict[str, tuple[Layout, int]]:
        """Each pool's layout and how many layers it has."""
        return {
            self.pool_of[kind.name]: (
                self.layouts[kind.name],
                self.arena_layers if kind.name in self.arena else len(kind.layers),
            )
            for kind in self.kinds
        }

    @property
    def lying_in(self) -> dict[str, list[int]]:
        """The model's layers whose pages lie in each pool, by the pool's name."""
        found: dict[str, list[int]] = {}
        for kind in self.kinds:
            found.setdefault(self.pool_of[kind.name], []).extend(kind.layers)
        return found

    @property
    def attended(self) -> list[Layout]:
        """The layouts over which layers attend: all but those of recurrent states, and of experts' numbers."""
        return [self.layouts[name] for name in self._attended]

    @property
    def _attended(self) -> list[str]:
        return [kind.name for kind in self.kinds if kind.rule != "recurrent" and kind.name != EXPERTS]

    def laid(self, instead: Callable[[Layout], Layout]) -> Paging:
        """The same with another layout, of as many bytes, ``instead`` of each of those that are attended over."""
        layouts = {k.name: self.layouts[k.name] for k in self.kinds}
        layouts |= {name: instead(layouts[name]) for name in self._attended}
        return replace(self, layouts=layouts)


def paging(cfg: ModelConfig, kv_cache_dtype: str, page_size: int, *, arena: bool, experts: bool = False) -> Paging:
    """How the KV cache of a model is cut into pages of ``page_size`` tokens; ``kv_cache_dtype``: see ``pools.layouts``.

    ``arena``: kinds may share a pool (``plan.arena``), where that suits them. ``experts``: which experts each token
    went through is kept as well, of which pages are smaller, so that no kinds share a pool; ``ConfigError`` where that
    is not the same number in all layers that have any.
    """
    paged = _paging(cfg, kv_cache_dtype, page_size, arena=arena and not experts)
    if not experts:
        return paged
    routes = routes_of(cfg)
    layout = layout_of(routes, kv_cache_dtype, page_size)
    # One array for all layers: what is called its layer is the first.
    return replace(paged, kinds=(*paged.kinds, full(EXPERTS, (0,))), layouts={**paged.layouts, EXPERTS: layout})


def routed_layers(cfg: ModelConfig) -> list[int]:
    """The layers that have a router, by index."""
    return [i for i, layer in enumerate(cfg.layers) if isinstance(layer.feed_forward, Experts)]


def routes_of(cfg: ModelConfig) -> Routes:
    """What the routers of a model choose for a token. ``ConfigError`` where there are none, or they differ."""
    routers = [layer.feed_forward.router for layer in cfg.layers if isinstance(layer.feed_forward, Experts)]
    found = {router.top_k for router in routers}
    if len(found) != 1:
        why = f"routers choose {sorted(found)} experts" if found else f"{cfg.architecture} has no experts"
        raise ConfigError(f"enable_return_routed_experts cannot be used: {why}")
    return Routes(len(routers), found.pop(), max(router.experts for router in routers))


def _paging(cfg: ModelConfig, kv_cache_dtype: str, page_size: int, *, arena: bool) -> Paging:
    kinds, layouts = kinds_of(cfg, kv_cache_dtype, page_size)
    sharing = group(kinds, layouts) if arena else None
    if sharing is None:
        return Paging(kinds, layouts)
    alike = next(layouts[kind.name] for kind in kinds if kind.rule != "recurrent")
    layouts = {k.name: alike if k.name in sharing.members else layouts[k.name] for k in sharing.kinds}
    return Paging(sharing.kinds, layouts, sharing.members, sharing.layers)


def kinds_of(cfg: ModelConfig, kv_cache_dtype: str, page_size: int) -> tuple[tuple[Kind, ...], Mapping[str, Layout]]:
    """The kinds of a model and, by name, the layout of a layer of each; see :func:`paging`.

    Layers of one rule, span and layout are one kind, named after its rule: full, window, chunk, recurrent. Where a rule
    has several, the second is named ``window-2`` and so on. Kinds are in the order of ``RULES``, then of their layers.
    """
    groups: dict[tuple[str, int, Layout], list[int]] = {}
    for index, layer in enumerate(cfg.layers):
        mixer = layer.mixer
        layout = layout_of(mixer.stored, kv_cache_dtype, page_size)
        groups.setdefault((mixer.rule, mixer.span, layout), []).append(index)
    kinds: list[Kind] = []
    layouts: dict[str, Layout] = {}
    for rule in RULES:
        of_rule = [(span, layout, layers) for (r, span, layout), layers in groups.items() if r == rule]
        for number, (span, layout, layers) in enumerate(of_rule, 1):
            name = _NAMES[rule] if number == 1 else f"{_NAMES[rule]}-{number}"
            kinds.append(Kind(name, tuple(layers), rule, span))
            layouts[name] = layout
    return tuple(kinds), layouts

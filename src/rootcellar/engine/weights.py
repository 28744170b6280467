"""The engine's methods that take other weights: an engine's own file would be too long with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rootcellar.config import EngineConfig
from rootcellar.engine.build import Parts, Weights, folder_of, live_weights, load_weights
from rootcellar.engine.commands import UpdateWeights
from rootcellar.engine.loop import Loop
from rootcellar.errors import EngineError
from rootcellar.models.params import Params
from rootcellar.models.repacking import TensorsOf


def _as_they_are(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    return tensors


class TakesWeights:
    """See ``Engine``, which is the only one of these."""

    config: EngineConfig
    _parts: Parts
    _loop: Loop

    def update_weights(
        self,
        params: Params,
        version: str | None = None,
        *,
        weights_name: str | None = None,
        tensors_of: TensorsOf | None = None,
        on_weight_update: str = "keep",
    ) -> dict[str, Any]:
        """Use ``params`` from the next step on, without a copy where they lie as the present ones do.

        Nothing that was cached with other weights is a hit again. ``meta_info`` says which version made which token.

        Args:
            params: a pytree like the present one; it stays the caller's.
            version: what ``meta_info`` calls them; None counts on.
            weights_name: as for the engine itself: what they are, to whoever shares pages.
            tensors_of: where ``params`` is a pytree of another form: a function from it to a checkpoint's tensors by
                the names of Hugging Face, which JAX traces. What is not one of its arrays as it is, is made of them on
                the device, over what was made the time before; give the same function each time.
            on_weight_update: what becomes of the KV that requests have: ``"keep"``: they go on over it, and
                ``meta_info["kv_weight_versions"]`` says whose it is; ``"recompute"``: they wait again, with the tokens
                that they have, and their KV is computed anew.

        Returns:
            ``{"weight_version", "copied"}``; ``copied`` names parameters that had to be placed elsewhere, or made.

        Raises:
            ModelError: a parameter is missing, unknown, or of another shape or dtype; nothing was changed.
        """
        if self.config.nnodes > 1:
            raise EngineError("weights cannot be handed over to an engine of several ranks: update_weights_from_disk")
        weights = live_weights(params, weights_name)
        command = UpdateWeights(weights.identity, version, on_weight_update=on_weight_update)
        return self._update(command, weights, None, tensors_of)

    def update_weights_from_tensor(
        self,
        named_tensors: Mapping[str, Any] | Sequence[tuple[str, Any]],
        version: str | None = None,
        *,
        weights_name: str | None = None,
        on_weight_update: str = "keep",
    ) -> dict[str, Any]:
        """:meth:`update_weights` with all tensors of a checkpoint by the names of Hugging Face, as arrays."""
        return self.update_weights(
            dict(named_tensors),
            version,
            weights_name=weights_name,
            tensors_of=_as_they_are,
            on_weight_update=on_weight_update,
        )

    def update_weights_from_disk(
        self, model_path: str, version: str | None = None, *, on_weight_update: str = "keep"
    ) -> dict[str, Any]:
        """:meth:`update_weights` with those of a checkpoint of the same model."""
        reload = functools.partial(load_weights, folder_of(model_path), self._parts)
        weights = reload()
        return self._update(
            UpdateWeights(weights.identity, version, str(model_path), on_weight_update), weights, reload
        )

    def _update(
        self,
        command: UpdateWeights,
        weights: Weights,
        reload: Callable[[], Weights] | None,
        tensors_of: TensorsOf | None = None,
    ) -> dict[str, Any]:
        now, copied = self._loop.run(command, weights, reload, tensors_of)
        return {"weight_version": now, "copied": copied}

"""The engine's methods that take other weights: an engine's own file would be too long with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rootcellar.config import EngineConfig
from rootcellar.engine.build import Parts, Weights, folder_of, live_weights, load_weights
from rootcellar.engine.commands import UpdateWeights
from rootcellar.engine.incoming import IncomingWeights
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
    _incoming: IncomingWeights

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

    def update_weights_in_parts(
        self,
        named_tensors: Mapping[str, Any],
        version: str | None = None,
        *,
        weights_name: str | None = None,
        on_weight_update: str = "keep",
    ) -> dict[str, Any]:
        """:meth:`update_weights_from_tensor` with some tensors; they are used once those of the other calls are there.

        Until then the engine computes with what it has, so no token is ever made by a mixture of two versions. What
        came is dropped where a call names another ``version``, or a tensor for the second time.

        Args:
            named_tensors: arrays by name; on the device they are not copied.
            version: of all of them.
            weights_name: as for :meth:`update_weights`; of the last call.
            on_weight_update: likewise.

        Returns:
            As :meth:`update_weights`, and ``"missing"``: how many tensors are not there yet; until 0 the version is
            the old one.
        """
        with self._incoming.lock:
            return self._take(named_tensors, version, weights_name, on_weight_update)

    def _take(
        self, tensors: Mapping[str, Any], version: str | None, name: str | None, on_weight_update: str
    ) -> dict[str, Any]:
        found = self._incoming.add(tensors, version)
        if found is None:
            now = self._loop.machine.life.version
            return {"weight_version": now, "copied": [], "missing": self._incoming.missing}
        updated = self.update_weights_from_tensor(found, version, weights_name=name, on_weight_update=on_weight_update)
        return {**updated, "missing": 0}

    def init_weights_update_group(
        self, master_address: str, master_port: int, *, group_name: str = "weight_update_group", timeout: float = 30.0
    ) -> None:
        """Find a trainer in another process, whose arrays are then fetched from its devices to the engine's.

        Args:
            master_address: of the trainer's JAX transfer server, ``jax.experimental.transfer`` (``WeightPusher`` of
                ``rootcellar.integrations.pushing`` has one), and ``master_port``.
            master_port: see above.
            group_name: what later calls name it by.
            timeout: seconds until it is given up.

        Raises:
            RequestError: nobody answers there, or there is a group of this name.
        """
        with self._incoming.lock:
            self._incoming.open(group_name, master_address, master_port, timeout)

    def destroy_weights_update_group(self, group_name: str = "weight_update_group") -> None:
        """Undo :meth:`init_weights_update_group`; what came of an unfinished version is dropped."""
        with self._incoming.lock:
            self._incoming.close(group_name)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        number: int,
        version: str | None = None,
        *,
        group_name: str = "weight_update_group",
        weights_name: str | None = None,
        on_weight_update: str = "keep",
        timeout: float = 60.0,
    ) -> dict[str, Any]:
        """:meth:`update_weights_in_parts` with tensors that the trainer of a group offers.

        They go from its devices to the engine's first while requests are computed, and are not copied after that but
        where they are fused.

        Args:
            names: by Hugging Face's names.
            dtypes: of each, ``"float32"`` or ``"torch.float32"``.
            shapes: of each.
            number: what the trainer offers them by (``await_pull``'s ``uuid``).
            version: see :meth:`update_weights_in_parts`, and the others there.
            group_name: see :meth:`init_weights_update_group`.
            weights_name: see above.
            on_weight_update: see above.
            timeout: seconds until the trainer is given up.

        Returns:
            As :meth:`update_weights_in_parts`, and ``"received_bytes"``.

        Raises:
            EngineError: they did not come; the group is of no use then, and the weights are what they were.
        """
        with self._incoming.lock:
            tensors = self._incoming.fetch(group_name, number, names, dtypes, shapes, timeout)
            updated = self._take(tensors, version, weights_name, on_weight_update)
        return {**updated, "received_bytes": sum(each.nbytes for each in tensors.values())}

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

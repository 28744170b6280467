"""A trainer's side of weights over a wire: its arrays, in this process, become a server's in another.

    from rootcellar.integrations.pushing import WeightPusher

    with WeightPusher("http://127.0.0.1:30000") as pusher:
        pusher.push(named_arrays, "step-7")  # a checkpoint's tensors, by Hugging Face's names

Arrays go from the devices here to those of the server by JAX's transfer server; HTTP says which they are. Trainers
without JAX send safetensors (``/update_weights_from_tensor``, docs/rl.md).
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Self

from jax import Array

from rootcellar.errors import EngineError
from rootcellar.transfer.wires.arrays import Arrays


class WeightPusher:
    """Pushes weights to the server at ``url``; use it as a context manager."""

    def __init__(
        self,
        url: str,
        *,
        host: str = "127.0.0.1",
        admin_key: str | None = None,
        group_name: str = "weight_update_group",
        part_bytes: int = 1 << 30,
        timeout: float = 60.0,
    ) -> None:
        """Have the server find this process.

        Args:
            url: of the server.
            host: the address by which the server reaches this process.
            admin_key: the server's, if it has one.
            group_name: one for each trainer.
            part_bytes: about so much is on its way at once, and on the server's device beside the old weights until
                it is made the model's; a larger tensor goes alone.
            timeout: seconds that the server waits for arrays.
        """
        self._url = url.rstrip("/")
        self._key = admin_key
        self._timeout = timeout
        self._part_bytes = part_bytes
        self._group = {"group_name": group_name}
        self._arrays = Arrays(host)
        where = {"master_address": host, "master_port": self._arrays.port, "backend": "jax", **self._group}
        self._post("/init_weights_update_group", where)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def push(self, named_arrays: Mapping[str, Array], version: str | None = None, **fields: Any) -> dict[str, Any]:
        """Have the server compute with ``named_arrays``, all of a checkpoint's, from its next step on.

        Args:
            named_arrays: by Hugging Face's names; they may be donated or deleted when this returns.
            version: what answers call them; None counts on.
            **fields: others of the route, as ``on_weight_update="recompute"``.

        Returns:
            The server's last answer: ``{"weight_version", "copied", "missing": 0, "received_bytes", ...}``, the bytes
            those of all parts.

        Raises:
            EngineError: the server refused them, or did not get them.
        """
        answer: dict[str, Any] = {}
        received = 0
        for part in self._parts(named_arrays):
            number = self._arrays.offer(list(part.values()))
            said = {
                "names": list(part),
                "dtypes": [str(array.dtype) for array in part.values()],
                "shapes": [list(array.shape) for array in part.values()],
                "number": number,
                "weight_version": version,
                "timeout": self._timeout,
            }
            answer = self._post("/update_weights_from_distributed", {**self._group, **said, **fields})
            received += answer["received_bytes"]
        if answer.get("missing", 1):
            raise EngineError(f"{answer.get('missing', 'all')} of the model's tensors are not among these")
        return {**answer, "received_bytes": received}

    def close(self) -> None:
        """Have the server forget this process."""
        self._post("/destroy_weights_update_group", self._group)

    def _parts(self, named_arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        part: dict[str, Array] = {}
        for name, array in named_arrays.items():
            if part and sum(each.nbytes for each in part.values()) + array.nbytes > self._part_bytes:
                yield part
                part = {}
            part[name] = array
        if part:
            yield part

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout + 30) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise EngineError(f"{path}: {error.code} {error.read(2000).decode(errors='replace')}") from error
        return answer

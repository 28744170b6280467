"""New weights, as SGLang's routes name them: from a folder, from a trainer's devices, or in a body."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from rootcellar.engine import Engine
from rootcellar.engine.identity import check_name
from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.safetensors import read_tensors
from rootcellar.server.answer import on_thread
from rootcellar.server.errors import invalid
from rootcellar.server.fields import WIRE_IGNORED, WIRE_REFUSED
from rootcellar.server.native.control import ControlBody, ok
from rootcellar.server.routes import AdminRoute
from rootcellar.server.state import state_of

router = APIRouter(route_class=AdminRoute, tags=["Control"])

UpTo = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
NameOfGroup = Annotated[str, Field(max_length=256)]


class _Update(ControlBody):
    """What all updates say of the new weights."""

    weight_version: str | None = None
    abort_all_requests: bool = False
    on_weight_update: Literal["keep", "recompute"] = "keep"

    async def begin(self, engine: Engine) -> dict[str, Any]:
        """Check them, end requests if that is asked for, and give what an update of the engine takes."""
        if self.weight_version is not None:
            check_name("weight_version", self.weight_version)
        if self.abort_all_requests:
            await on_thread(engine.abort_all, "aborted for new weights")
        return {"version": self.weight_version, "on_weight_update": self.on_weight_update}


class WeightsRequest(_Update):
    """Where the new weights are."""

    model_path: str
    load_format: Literal["auto", "safetensors"] | None = None


@router.post("/update_weights_from_disk")
async def update_weights_from_disk(body: WeightsRequest, request: Request) -> Response:
    """Use the weights of another checkpoint of the same model; nothing cached before is a hit again.

    ``on_weight_update``: whether requests that run keep their KV, or have it computed anew.
    """
    engine = state_of(request).engine
    told = await body.begin(engine)
    try:
        updated = await on_thread(engine.update_weights_from_disk, body.model_path, **told)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise invalid(f"model_path cannot be read: {error}", "model_path") from error
    return ok("Weights updated.", num_paused_requests=0, **updated)


class _Wire(ControlBody):
    ignored = WIRE_IGNORED
    refused = WIRE_REFUSED


class GroupRequest(_Wire):
    """The trainer's transfer server."""

    master_address: Annotated[str, Field(max_length=256)]
    master_port: Annotated[int, Field(ge=1, le=65535)]
    group_name: NameOfGroup = "weight_update_group"
    backend: str = "nccl"
    timeout: UpTo = 30.0


@router.post("/init_weights_update_group")
async def init_weights_update_group(body: GroupRequest, request: Request) -> Response:
    """Find a trainer in another process, whose arrays ``/update_weights_from_distributed`` then fetches.

    ``backend`` is "jax": the address is that of a JAX transfer server. Torch's groups (SGLang's default, "nccl") are
    refused: their members speak through torch.
    """
    if body.backend != "jax":
        raise invalid(
            f"backend={body.backend[:40]!r} is a group of torch's, which an engine in JAX is no member of: use "
            '"jax", with the address of a JAX transfer server, or /update_weights_from_tensor',
            "backend",
        )
    engine, where = state_of(request).engine, (body.master_address, body.master_port)
    await on_thread(engine.init_weights_update_group, *where, group_name=body.group_name, timeout=body.timeout)
    return ok("The trainer answers.")


class GroupName(_Wire):
    """Which group."""

    group_name: NameOfGroup = "weight_update_group"


@router.post("/destroy_weights_update_group")
async def destroy_weights_update_group(request: Request, body: GroupName | None = None) -> Response:
    """Forget a trainer, and what it sent of a version that is not whole."""
    await on_thread(state_of(request).engine.destroy_weights_update_group, (body or GroupName()).group_name)
    return ok("The group is gone.")


class DistributedRequest(_Update):
    """What the trainer of a group offers: all of a checkpoint's tensors, or a part of them."""

    ignored = WIRE_IGNORED
    refused = WIRE_REFUSED
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    number: Annotated[int, Field(ge=0, lt=2**63)]
    group_name: NameOfGroup = "weight_update_group"
    load_format: None = None
    timeout: UpTo = 60.0


@router.post("/update_weights_from_distributed")
async def update_weights_from_distributed(body: DistributedRequest, request: Request) -> Response:
    """Fetch tensors from a trainer's devices; once a version's are all there, use them.

    ``number``: what the trainer offers them by, the ``uuid`` of ``await_pull``. ``missing`` of the answer: how many are
    not there yet.
    """
    engine = state_of(request).engine
    updated = await on_thread(
        engine.update_weights_from_distributed,
        body.names,
        body.dtypes,
        body.shapes,
        body.number,
        group_name=body.group_name,
        timeout=body.timeout,
        **await body.begin(engine),
    )
    return ok(_said(updated), **updated)


class TensorRequest(_Update):
    """Tensors in the body: safetensors, in base64."""

    ignored = WIRE_IGNORED
    refused = WIRE_REFUSED
    serialized_named_tensors: list[str]
    load_format: str | None = None


@router.post("/update_weights_from_tensor")
async def update_weights_from_tensor(body: TensorRequest, request: Request) -> Response:
    """Take tensors out of the body; once a version's are all there, use them.

    ``load_format`` is "safetensors": each of ``serialized_named_tensors`` would be a file of that format, in base64.
    SGLang's own form is refused: pickles run what they say, and name memory of a process with torch. What is larger
    than ``max_body_bytes`` goes in several bodies.
    """
    if body.load_format != "safetensors":
        raise invalid(
            f"load_format={body.load_format!r:.60} would be a pickle of torch's, which runs what it says: send "
            'safetensors in base64, with load_format "safetensors"',
            "load_format",
        )
    engine = state_of(request).engine
    tensors, size = await on_thread(_read, body.serialized_named_tensors)
    updated = await on_thread(engine.update_weights_in_parts, tensors, **await body.begin(engine))
    return ok(_said(updated), **updated, received_bytes=size)


def _read(parts: list[str]) -> tuple[Mapping[str, np.ndarray], int]:
    """The tensors of all parts, and their bytes."""
    found: dict[str, np.ndarray] = {}
    size = 0
    for part in parts:
        try:
            data = base64.b64decode(part, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"a part is no base64: {error}", "serialized_named_tensors") from error
        tensors = read_tensors(data)
        if twice := found.keys() & tensors.keys():
            raise invalid(f"{min(twice)[:200]!r} comes twice", "serialized_named_tensors")
        found |= tensors
        size += len(data)
    return found, size


def _said(updated: Mapping[str, Any]) -> str:
    if updated["missing"]:
        return f"Taken; {updated['missing']} tensors of the version are missing yet."
    return "Weights updated."

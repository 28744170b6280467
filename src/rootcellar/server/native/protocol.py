"""What SGLang's clients send to its native routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from rootcellar.server.errors import invalid
from rootcellar.server.fields import CHAT_IGNORED, CHAT_REFUSED, IGNORED, REFUSED, known
from rootcellar.server.images import ImageSource, image_source
from rootcellar.server.parsing import Body

Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
BootstrapHost = str | list[str | None] | None
BootstrapNumber = int | list[int | None] | None
_IDS = {"type": "array", "items": {"type": "integer"}}
InputIds = Annotated[
    list[Any], WithJsonSchema({"anyOf": [_IDS, {"type": "array", "items": _IDS}], "description": "Token ids."})
]


_IMAGE = {
    "anyOf": [{"type": "string"}, {"type": "object", "properties": {"url": {"type": "string"}}}, {"type": "null"}]
}
ImageData = Annotated[
    str | dict[str, Any] | list[Any],
    WithJsonSchema(
        {
            "anyOf": [*_IMAGE["anyOf"], {"type": "array", "items": {"anyOf": [*_IMAGE["anyOf"], {"type": "array"}]}}],
            "description": "Images: data URLs, base64 or addresses. Of one prompt: one, or a list. Of several: one for "
            "all, or a list with one, a list or null for each.",
        }
    ),
]


class GenerateRequest(Body):
    """The body of ``POST /generate``; one prompt or several."""

    ignored = {**IGNORED, **CHAT_IGNORED}  # noqa: RUF012
    refused = {**REFUSED, **CHAT_REFUSED}  # noqa: RUF012

    text: str | list[str] | None = None
    input_ids: InputIds | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    image_data: ImageData | None = None
    rid: str | list[str] | None = None
    stream: bool | None = False
    return_logprob: bool | list[bool] | None = False
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = False
    priority: Priority | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    storage_checkpoint: bool | None = False
    storage_checkpoint_dependency: str | None = None
    bootstrap_host: BootstrapHost = None
    bootstrap_port: BootstrapNumber = None
    bootstrap_room: BootstrapNumber = None
    return_routed_experts: bool | None = False
    routed_experts_start_len: Annotated[int, Field(ge=0)] | None = None
    return_prompt_token_ids: bool | None = False
    explain: bool | None = False
    cache_hints: dict[str, Any] | None = None
    model: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``Engine.generate``, but for the prompts."""
        start = _one(self.logprob_start_len, "logprob_start_len")
        return {
            "sampling_params": self._sampling_params(),
            "rid": self.rid,
            "return_logprob": bool(_one(self.return_logprob, "return_logprob")),
            "logprob_start_len": -1 if start is None else start,
            "top_logprobs_num": _one(self.top_logprobs_num, "top_logprobs_num") or 0,
            "priority": self.priority or 0,
            "extra_key": self.extra_key or "",
            "cache_salt": self.cache_salt or "",
            "storage_checkpoint": bool(self.storage_checkpoint),
            "storage_checkpoint_dependency": self.storage_checkpoint_dependency,
            "bootstrap_host": self.bootstrap_host,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": self.bootstrap_room,
            "return_routed_experts": bool(self.return_routed_experts),
            "routed_experts_start_len": self.routed_experts_start_len or 0,
        }

    def images(self, prompts: int, *, one: bool) -> list[list[ImageSource]]:
        """The images of each prompt, as SGLang reads ``image_data``; ``one``: there is one prompt, and no list of them.

        ``ApiError``: it is no list of as many.
        """
        given = self.image_data
        if given is None or given in ([], ""):
            return [[] for _ in range(prompts)]
        if not isinstance(given, list):
            return [[image_source(given, "image_data")]] * prompts
        if one:
            return [_sources(given[0] if len(given) == 1 and isinstance(given[0], list) else given)]
        if len(given) != prompts:
            raise invalid(f"image_data must be one image, or a list of {prompts}, one for each prompt", "image_data")
        return [_sources(each if isinstance(each, list) else [each]) for each in given]

    def _sampling_params(self) -> dict[str, Any] | list[dict[str, Any]]:
        given = self.sampling_params
        return [_meant(each) for each in given] if isinstance(given, list) else _meant(given or {})


def _sources(images: list[Any]) -> list[ImageSource]:
    return [image_source(image, "image_data") for image in images if image is not None]


def _meant(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters without what asks for nothing; null is SGLang's "as usual". The engine knows the rest."""
    names = params.keys() - REFUSED.keys() - {"stream_interval"}
    return {k: v for k, v in known(params, names, IGNORED, REFUSED).items() if v is not None}


def _one(value: Any, name: str) -> Any:
    """One value for all prompts; a list must say the same for each."""
    if not isinstance(value, list):
        return value
    if any(each != value[0] for each in value):
        raise invalid(f"{name} must be the same for all prompts of a request: send those that differ apart", name)
    return value[0] if value else None

"""JSON bodies through orjson: it is fast, and refuses what is no JSON (NaN, broken UTF-8).

What it reads but cannot write is refused as well: lone surrogates, integers beyond 64 bits, nesting without end. Then
whatever a client sent can be tokenized, passed on and quoted in an answer.

A body's model is a :class:`Body`: the first thing that is wrong in a list ends the check, as only one is ever told.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, cast

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema
from starlette.responses import Response

from rootcellar.server.errors import Stopped, invalid
from rootcellar.server.fields import Refused, known

# Lists and objects take a hundred times the memory of their two bytes in a body, and the time to make them.
_BRACKETS = 250_000
# Names of fields cost as much, and again each time that an object is checked, copied or passed on.
_NAMES = 50_000
# The end of a name: a quote that is not quoted itself, and a colon.
_NAME = re.compile(rb'(?<!\\)(?:\\\\)*"[ \t\r\n]*:')


class OrjsonRequest(Request):
    """A request whose ``json`` is orjson's."""

    async def json(self) -> Any:
        """The body's value; ``json.JSONDecodeError`` when it is none."""
        value = _loads(await self.body())
        try:
            # Parts of it are passed on and quoted some levels deeper than they came.
            orjson.dumps([[[[[[[[value]]]]]]]])
        except orjson.JSONEncodeError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
        return value


def _loads(body: bytes) -> Any:
    if len(body) > _BRACKETS and body.count(b"[") + body.count(b"{") > _BRACKETS:
        message = f"the body has more than {_BRACKETS} lists, objects or brackets: send fewer prompts at once"
        raise Stopped(invalid(message))
    if body.count(b":") > _NAMES and next(islice(_NAME.finditer(body), _NAMES, None), None) is not None:
        raise Stopped(invalid(f"the body has more than {_NAMES} names of fields: send less at once"))
    # The collector would walk through all of the process again and again while lists are made that nobody can have
    # dropped yet; nothing else runs meanwhile, as orjson holds the interpreter.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        if collecting:
            gc.enable()


class OrjsonRoute(APIRoute):
    """A route whose handler reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind ``OrjsonRequest``."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(OrjsonRequest(request.scope, request.receive))

        return read


def _fail_fast(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_fail_fast(part) for part in schema]
    if isinstance(schema, tuple):
        return tuple(_fail_fast(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    changed = {name: _fail_fast(part) for name, part in schema.items()}
    return {**changed, "fail_fast": True} if schema.get("type") in ("list", "dict") else changed


@dataclass(frozen=True)
class FailFast:
    """Of items in a ``TypedDict``, which the model around it does not reach: the first that is wrong ends the check."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler, /) -> CoreSchema:
        """pydantic's own schema, with ``fail_fast`` wherever there are items."""
        return cast(CoreSchema, _fail_fast(handler(source)))


def _tell_ignored(schema: dict[str, Any], body: type[Body]) -> None:
    for name, reason in body.ignored.items():
        schema["properties"].setdefault(name, {"description": f"Changes nothing: {reason}."})


class Body(BaseModel):
    """What a client sends, or a part of it: types are strict, and no field is dropped in silence.

    No list or dict collects one error for each item, as pydantic would: 200,000 items of a wrong type took two seconds
    of everybody's time.
    """

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_tell_ignored)

    ignored: ClassVar[Mapping[str, str]] = {}
    """Fields that are taken and change nothing, with the reason."""
    refused: ClassVar[Mapping[str, Refused]] = {}
    """Fields that would change something and are not supported."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Only fields that are declared; ``ApiError`` for the first other one that is neither ignored nor empty."""
        if not isinstance(given, dict):
            return given
        names = [field.alias or name for name, field in cls.model_fields.items()]
        return known(given, names, cls.ignored, cls.refused)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler, /) -> CoreSchema:
        """pydantic's own schema, with ``fail_fast`` wherever there are items."""
        return cast(CoreSchema, _fail_fast(handler(source)))

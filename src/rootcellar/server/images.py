"""Images that clients send: what a request may say of one, and the pictures that they show."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from rootcellar.engine import Engine
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media import MediaLimits, Picture
from rootcellar.media.fetching import fetch, is_address
from rootcellar.media.reader import PictureReader
from rootcellar.media.sources import Small
from rootcellar.server.errors import invalid

_LOW_SIDE = 512
"""Pixels of the square that an image of detail "low" is made to fit into, as OpenAI says of its own models."""
_DETAILS = (None, "auto", "low", "high")
# Of one tenant at a time.
_FETCHES = 8


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as a client sends it: a data URL, base64 or an address, and whether little of it is enough."""

    text: str
    low: bool = False


def image_source(given: Any, name: str) -> ImageSource:
    """What ``{"url": ..., "detail": ...}`` or a plain text says. ``ApiError``: neither; ``name`` is the field's."""
    if isinstance(given, str):
        return ImageSource(given)
    known = isinstance(given, dict) and isinstance(given.get("url"), str) and given.keys() <= {"url", "detail"}
    if not known or given.get("detail") not in _DETAILS:
        raise invalid(f'{name}: an image must be as {{"url": "data:image/png;base64,...", "detail": "auto"}}', name)
    return ImageSource(given["url"], given.get("detail") == "low")


class Pictures:
    """Reads the images of requests, off the event loop: those from elsewhere are fetched, all are decoded apart."""

    def __init__(self, engine: Engine, request_bytes: int) -> None:
        """For ``engine``. ``request_bytes``: most bytes of a request's images together, as they come."""
        self.limits = MediaLimits.of(engine.config)
        self._request_bytes = request_bytes
        prepare = None if engine.encoder is None else engine.encoder.prepare
        self._reader = PictureReader(self.limits, request_bytes=request_bytes, prepare=prepare)
        self._fetching: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def read(self, sources: Sequence[ImageSource], tenant: str) -> list[Picture]:
        """The pictures of one request, of which one that comes twice is decoded once.

        Raises:
            RequestError: one is broken, or from where nothing may come.
            RequestTooLarge: it is more than a setting allows, which the message names.
            QueueFull: too many of the tenant's wait.
        """
        self.limits.check_count(len(sources))
        different = list(dict.fromkeys(sources))
        contents = await self._fetched(different, tenant)
        wanted = [Small(c, _LOW_SIDE) if s.low else c for s, c in zip(different, contents, strict=True)]
        pictures = await asyncio.wrap_future(self._reader.read(wanted, tenant))
        found = dict(zip(different, pictures, strict=True))
        return [found[each] for each in sources]

    async def _fetched(self, sources: Sequence[ImageSource], tenant: str) -> list[bytes | str]:
        """What each source holds; those from elsewhere one after the other, so that no more is held than may be."""
        left = self._request_bytes
        contents: list[bytes | str] = []
        try:
            async with asyncio.timeout(self.limits.media_timeout):
                for source in sources:
                    if not is_address(source.text):
                        contents.append(source.text)
                        continue
                    limits = replace(self.limits, max_image_bytes=min(left, self.limits.max_image_bytes))
                    async with self._fetching.setdefault(tenant, asyncio.Semaphore(_FETCHES)):
                        content = await fetch(source.text, limits)
                    left -= len(content)
                    contents.append(content)
        except TimeoutError:
            raise RequestError(
                f"images did not come within {self.limits.media_timeout:g} seconds: send data URLs, or raise "
                "media_timeout"
            ) from None
        if left <= 0:
            raise RequestTooLarge(
                f"images of more than {self._request_bytes} bytes together: send fewer, or raise max_body_bytes"
            )
        return contents

    def close(self) -> None:
        """End what decodes."""
        self._reader.close()

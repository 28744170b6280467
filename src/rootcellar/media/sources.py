"""What a source of a picture is: the bytes of a file, wherever they are, or pixels already."""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rootcellar.errors import RequestError
from rootcellar.media.fetching import fetch_now, is_address
from rootcellar.media.limits import MediaLimits
from rootcellar.media.picture import Picture

PictureSource: TypeAlias = "Picture | str | bytes | os.PathLike[str] | Image.Image | NDArray[Any] | Small"
"""What pictures are made of."""


@dataclass(frozen=True, slots=True)
class Small:
    """A source whose picture is made to fit into a square of ``side`` pixels, where it does not."""

    source: str | bytes
    side: int


_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+\"-]+)*)(;base64)?,", re.ASCII | re.IGNORECASE)
_TYPES = ("image/bmp", "image/gif", "image/jpeg", "image/jpg", "image/png", "image/webp", "application/octet-stream")
# How SGLang tells the name of a file from base64.
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def content_of(source: PictureSource, limits: MediaLimits) -> bytes | Picture | Image.Image | NDArray[Any]:
    """The bytes of an image file, fetched or read if need be; what is pixels already stays as it is.

    A text is a data URL, an address, base64, or where ``limits.files`` says so the name of a file: ``file://...``, or
    what ends as one.

    Raises:
        RequestError: it is none of these, or not allowed; the message names the setting.
        RequestTooLarge: it has too many bytes.
    """
    match source:
        case Picture() | Image.Image() | np.ndarray():
            return source
        case bytes() | bytearray() | memoryview():
            return bytes(source)
        case str():
            return _of_text(source, limits)
        case os.PathLike():
            return _of_file(Path(source), limits)
        case _:
            raise RequestError(
                f"a {type(source).__name__} is no image: give bytes, a data URL, an address, a file, a PIL image or an "
                "array"
            )


def _of_text(text: str, limits: MediaLimits) -> bytes:
    if text[:5].lower() == "data:":
        return _of_data_url(text, limits)
    if is_address(text):
        return fetch_now(text, limits)
    if text[:7].lower() == "file://":
        return _of_file(Path(text[7:]), limits)
    if limits.files and text.lower().endswith(_ENDINGS):
        return _of_file(Path(text), limits)
    return _of_base64(text, limits, "an image's text is neither a data URL nor an address nor base64")


def _of_data_url(url: str, limits: MediaLimits) -> bytes:
    head = _DATA.match(url, endpos=256)
    if head is None or head[3] is None:
        raise RequestError("a data URL must begin as data:image/png;base64,")
    if head[1] is not None and head[1].lower() not in _TYPES:
        raise RequestError(f"a data URL of type {head[1][:80]!r} is no image that can be read: send PNG, JPEG or WebP")
    return _of_base64(url[head.end() :], limits, "a data URL whose content is no base64")


def _of_base64(text: str, limits: MediaLimits, wrong: str) -> bytes:
    limits.check_bytes(len(text) * 3 // 4 - 2)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(wrong) from None
    if not content:
        raise RequestError("an image without a byte")
    return content


def _of_file(path: Path, limits: MediaLimits) -> bytes:
    if not limits.files:
        raise RequestError("images from files are for the engine's own process: send a data URL")
    try:
        if not path.is_file():
            raise RequestError(f"no image file at {str(path)!r}")
        limits.check_bytes(path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"the image file {str(path)!r} cannot be read: {error.strerror}") from None

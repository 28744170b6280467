"""From sources to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media.decoding import array_pixels, opened, pixels_of
from rootcellar.media.limits import MediaLimits
from rootcellar.media.picture import Picture
from rootcellar.media.sources import PictureSource, Small, content_of

T = TypeVar("T")


def read(source: PictureSource, limits: MediaLimits) -> Picture:
    """The picture that ``source`` shows: upright, without transparency (laid over white), of several frames the first.

    Args:
        source: bytes of an image file (BMP, GIF, JPEG, PNG, WebP), a data URL, base64, an address, a PIL image, an
            array (uint8 [height, width, 3], or 1 or 4 channels), or a file's name where ``limits.files`` allows it.
        limits: what is refused, before anything is decoded.

    Raises:
        RequestError: it is broken, of an unknown kind, or from where nothing may come.
        RequestTooLarge: it has more bytes or pixels than it may; the message names the setting.
    """
    return next(read_all([source], limits))


def read_all(sources: Sequence[PictureSource], limits: MediaLimits) -> Iterator[Picture]:
    """The pictures of one request, one after the other as they are asked for; errors as those of :func:`read`.

    All are counted together before the first is decoded, and an error says which one is wrong.
    """
    _, waiting = counted(sources, limits)
    return (decode() for decode in waiting)


def counted(sources: Sequence[PictureSource], limits: MediaLimits) -> tuple[int, Iterator[Callable[[], Picture]]]:
    """How many pixels the pictures of one request have together, and what makes each of them; errors as those of
    :func:`read`, from both."""
    limits.check_count(len(sources))
    begun = [numbered(i, len(sources), partial(_begun, each, limits)) for i, each in enumerate(sources)]
    pixels = sum(number for number, _ in begun)
    limits.check_together(pixels)
    waiting = [partial(numbered, i, len(sources), decode) for i, (_, decode) in enumerate(begun)]
    begun.clear()
    waiting.reverse()
    return pixels, (waiting.pop() for _ in sources)  # and with it the file's bytes


def _begun(source: PictureSource, limits: MediaLimits) -> tuple[int, Callable[[], Picture]]:
    """How many pixels a source has, and what makes a picture of it."""
    if isinstance(source, Small):
        pixels, decode = _begun(source.source, limits)
        return pixels, partial(_fitted, decode, source.side)
    content = content_of(source, limits)
    match content:
        case Picture(prepared=True):  # which was counted before it was
            return 0, lambda: content
        case Picture():
            return limits.check_size(content.width, content.height), lambda: content
        case np.ndarray():
            # Counted by its shape, which is checked where it is used.
            return content.size // 3, lambda: Picture.of(array_pixels(content, limits))
        case Image.Image():
            return limits.check_size(*content.size), lambda: Picture.of(pixels_of(content))
        case _:
            image = opened(content, limits)
            return image.width * image.height, lambda: Picture.of(pixels_of(image))


def _fitted(decode: Callable[[], Picture], side: int) -> Picture:
    """A picture, made smaller where a side has more pixels than ``side``; its shape stays."""
    picture = decode()
    most = max(picture.height, picture.width)
    if most <= side:
        return picture
    size = [max(1, round(n * side / most)) for n in (picture.width, picture.height)]
    return Picture.of(np.array(Image.fromarray(picture.pixels).resize(size, Image.Resampling.BICUBIC)))


def numbered(i: int, of: int, do: Callable[[], T]) -> T:
    """What ``do`` gives; where there are several, an error says of which it is."""
    try:
        return do()
    except RequestError as error:
        kind = RequestTooLarge if isinstance(error, RequestTooLarge) else RequestError
        raise kind(f"image {i}: {error}" if of > 1 else str(error)) from None

"""From prompts with pictures to what is computed: ids, spans, and places for rotary embeddings of three axes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rootcellar.engine.build import Parts
from rootcellar.engine.encodings import Encodings
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media import MediaLimits, Picture, read_all
from rootcellar.media.sources import PictureSource
from rootcellar.models.encoders import Encoder
from rootcellar.scheduler import Span
from rootcellar.scheduler.placeholders import placeholder_ids

ImageData: TypeAlias = "PictureSource | Sequence[Sequence[PictureSource] | PictureSource | None] | None"
"""What ``Engine.generate`` takes as ``image_data``."""


@dataclass(frozen=True)
class Depicted:
    """A prompt as it is computed: ``ids`` int64 [N], ``spans``, and ``places`` int32 [3, N + 1] or None."""

    ids: NDArray[np.int64]
    spans: tuple[Span, ...] = ()
    places: NDArray[np.int32] | None = None


def spread_images(image_data: ImageData, prompts: int, *, one: bool) -> list[list[PictureSource]]:
    """The images of each prompt. ``one``: there is one prompt, and a list holds its images."""
    if image_data is None:
        return [[] for _ in range(prompts)]
    if one:
        return [list(image_data) if isinstance(image_data, list | tuple) else [image_data]]
    if not isinstance(image_data, list | tuple) or len(image_data) != prompts:
        raise RequestError(f"image_data must be a list of {prompts}, one for each prompt: an image, a list, or None")
    return [[] if e is None else list(e) if isinstance(e, list | tuple) else [e] for e in image_data]


def see(parts: Parts, ids: NDArray[np.int64], images: Sequence[PictureSource], where: str) -> Depicted:
    """A prompt with its ``images``; ``where`` begins the messages.

    Where an image is to be the prompt has the model's token for one, once or as often as the image takes places.

    Raises:
        RequestError: they do not fit each other, or an image cannot be read.
        RequestTooLarge: an image is more than a setting allows, which the message names.
    """
    encoder = parts.model.encoder
    if encoder is None:
        if images:
            raise RequestError(f"{where}{parts.model.architecture} knows no images: leave image_data out")
        return Depicted(ids)
    at = np.flatnonzero(ids == encoder.token)
    if not images and not len(at):
        return Depicted(ids)
    pictures = list(read_all(list(images), MediaLimits.of(parts.config, files=True)))
    shown = [prepared(encoder, picture) for picture in pictures]
    sizes = [encoder.size(pixels) for pixels in shown]
    for i, (pixels, size) in enumerate(zip(shown, sizes, strict=True)):
        _check_size(parts, encoder, pixels, size, f"{where}image {i}")
    starts = _starts(at, sizes)
    if starts is None:
        raise RequestError(
            f"{where}the prompt has token {encoder.token}, which stands for an image, {len(at)} times, and there are "
            f"{len(images)} images: have it once for each"
        )
    given = len(at) == len(sizes)  # else it is there as often as images have places
    out, spans, before, length = [], [], 0, 0
    for start, picture, pixels, size in zip(starts, pictures, shown, sizes, strict=True):
        content = _content(encoder, picture)
        out += [ids[before:start], placeholder_ids(content, size)]
        length += start - before
        spans.append(Span(length, length + size, content, pixels, encoder.token, encoder.atomic))
        length += size
        before = start + (1 if given else size)
    whole = np.concatenate([*out, ids[before:]])
    return Depicted(whole, tuple(spans), _places(encoder, spans, len(whole)) if parts.model.axes else None)


def prepared(encoder: Encoder, picture: Picture) -> NDArray[np.uint8]:
    """What ``encoder`` looks at of a picture. ``RequestError``: it cannot take it."""
    return picture.pixels if picture.prepared else encoder.prepare(picture.pixels)


def _content(encoder: Encoder, picture: Picture) -> bytes:
    """What an image shows and how it is encoded: 32 bytes. By which weights is said by the cache's namespace."""
    return hashlib.sha256(b"rootcellar.picture.v1" + picture.digest + repr(encoder).encode()).digest()


def _check_size(parts: Parts, encoder: Encoder, pixels: NDArray[np.uint8], size: int, name: str) -> None:
    step = parts.config.chunked_prefill_size
    if encoder.atomic and size > step:
        raise RequestTooLarge(
            f"{name} takes {size} tokens, which are computed in one step, and chunked_prefill_size={step}: raise it to "
            f"{size}, or send a smaller image"
        )
    nbytes, room = Encodings.bytes_of(encoder, parts.runner, pixels), parts.config.mm_cache_size * 2**20
    if nbytes > room:
        raise RequestTooLarge(
            f"{name} takes {nbytes} bytes when it is encoded, and mm_cache_size={parts.config.mm_cache_size} (MiB): "
            f"raise it to {-(-nbytes // 2**20)}, or send a smaller image"
        )


def _starts(at: NDArray[np.int64], sizes: Sequence[int]) -> list[int] | None:
    """Where each image's token first stands; None where there are not as many as there should be."""
    if len(at) == len(sizes):
        return [int(each) for each in at]
    if len(at) != sum(sizes):
        return None
    firsts = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.int64)
    runs = [at[first : first + size] for first, size in zip(firsts, sizes, strict=True)]
    if any(run[-1] - run[0] != len(run) - 1 for run in runs):
        return None
    return [int(run[0]) for run in runs]


def _places(encoder: Encoder, spans: Sequence[Span], length: int) -> NDArray[np.int32]:
    """Where each token is, and the one after them: int32 [3, length + 1]. Text goes on in each axis alike."""
    places = np.empty((3, length + 1), np.int32)
    at = now = 0
    for span in spans:
        places[:, at : span.start] = np.arange(now, now + span.start - at)
        now += span.start - at
        inside, after = encoder.places(span.pixels)
        places[:, span.start : span.stop] = now + inside
        at, now = span.stop, now + after
    places[:, at:] = np.arange(now, now + length + 1 - at)
    return places

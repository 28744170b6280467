"""What pictures may be, and where they may come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rootcellar.config import EngineConfig
from rootcellar.errors import RequestTooLarge


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """The settings of these names, and whether a source may be the name of a file on this machine (``files``)."""

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_image_side: int
    max_request_pixels: int
    allowed_media_domains: tuple[str, ...]
    media_timeout: float
    files: bool = False

    @classmethod
    def of(cls, config: EngineConfig, *, files: bool = False) -> Self:
        """Those of an engine. ``files``: whoever gives sources may read this machine's files, as its own user."""
        return cls(
            max_images=config.max_images,
            max_image_bytes=config.max_image_bytes,
            max_image_pixels=config.max_image_pixels,
            max_image_side=config.max_image_side,
            max_request_pixels=config.max_request_pixels,
            allowed_media_domains=config.allowed_media_domains,
            media_timeout=config.media_timeout,
            files=files,
        )

    def check_count(self, images: int) -> None:
        """``RequestTooLarge``: a request has more images than it may."""
        if images > self.max_images:
            raise RequestTooLarge(
                f"{images} images in one request: at most {self.max_images} are allowed; send fewer, or raise "
                "max_images"
            )

    def check_bytes(self, number: int) -> None:
        """``RequestTooLarge``: an image takes more bytes, as it comes, than it may."""
        if number > self.max_image_bytes:
            raise RequestTooLarge(
                f"an image of {number} bytes: at most {self.max_image_bytes} are allowed; send a smaller one, or raise "
                "max_image_bytes"
            )

    def check_size(self, width: int, height: int) -> int:
        """The pixels of an image of this size. ``RequestTooLarge``: they are more than they may be, or in one row."""
        if max(width, height) > self.max_image_side:
            raise RequestTooLarge(
                f"an image of {width} x {height} pixels: no side may have more than {self.max_image_side}; send a "
                "smaller one, or raise max_image_side"
            )
        if width * height > self.max_image_pixels:
            raise RequestTooLarge(
                f"an image of {width} x {height} pixels, {width * height} in all: at most {self.max_image_pixels} are "
                "allowed; send a smaller one, or raise max_image_pixels"
            )
        return width * height

    def check_together(self, pixels: int) -> None:
        """``RequestTooLarge``: all images of a request have more pixels than they may."""
        if pixels > self.max_request_pixels:
            raise RequestTooLarge(
                f"images of {pixels} pixels in one request: at most {self.max_request_pixels} are allowed together; "
                "send fewer or smaller ones, or raise max_request_pixels"
            )

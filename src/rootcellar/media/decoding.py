"""Image files to pixels, by Pillow: counted first, then decoded; whatever is wrong with a file is one kind of error.

The steps are those of transformers 5: ``image_utils.load_image`` turns a picture upright, and the image processors'
``convert_to_rgb`` lays what is transparent over white, as vLLM and Qwen's own code do. (SGLang does neither, and
``load_image`` drops the transparency: what colour happens to lie under it is shown.)
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media.limits import MediaLimits

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What is read. Pillow knows forty more, whose readers nobody attacks as often as these five."""
_KNOWN = ", ".join(FORMATS)
# Tag of EXIF that says how a camera was held; values as in the standard.
_ORIENTATION = 0x0112
_DEEP = ("I", "F")


def opened(content: bytes, limits: MediaLimits) -> Image.Image:
    """An image file whose head was read and whose size is allowed; nothing is decoded yet.

    Raises:
        RequestError: it is no image of a known kind, or a broken one.
        RequestTooLarge: it has too many bytes or pixels.
    """
    limits.check_bytes(len(content))
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise RequestError(f"not an image that can be read: it must be one of {_KNOWN}") from None
    except Image.DecompressionBombError:
        raise RequestTooLarge(
            f"an image of far too many pixels: at most {limits.max_image_pixels} are allowed (max_image_pixels)"
        ) from None
    except Exception as error:
        raise _broken(error) from None
    limits.check_size(*image.size)
    return image


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Upright, uint8 [height, width, 3]; of a moving image the first frame. ``RequestError``: it is broken."""
    try:
        image.load()
        return _upright(_flat(image), _orientation(image))
    except RequestError:
        raise
    except MemoryError:
        raise RequestTooLarge("an image takes more memory to decode than there is for it: send a smaller one") from None
    except Exception as error:  # what decoders make of hostile bytes is not to be listed
        raise _broken(error) from None


def array_pixels(array: NDArray[Any], limits: MediaLimits) -> NDArray[np.uint8]:
    """Pixels of an array, uint8 [height, width], or [height, width, 1, 3 or 4]; the fourth says how opaque they are."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise RequestError(
            f"an array of {array.dtype} {list(array.shape)}: it must be uint8 [height, width, 3] (or 1, or 4)"
        )
    if 0 in array.shape:
        raise RequestError(f"an array of {list(array.shape)} has no pixels")
    limits.check_size(array.shape[1], array.shape[0])
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array.copy() if array.shape[2] == 3 else _flat(Image.fromarray(array))


def _broken(error: Exception) -> RequestError:
    # Without line breaks and names of objects, and no longer than a line.
    return RequestError(f"a broken image: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}")


def _flat(image: Image.Image) -> NDArray[np.uint8]:
    """Red, green and blue of every pixel, uint8 [height, width, 3], over white."""
    if image.mode.startswith("I;16"):
        return _of_16_bits(image)
    if image.mode in _DEEP:
        raise RequestError("an image of 32 bits per pixel and channel: send one of 8 or 16")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _of_16_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Of grey pixels the upper eight bits, as Pillow takes them of coloured ones; its own conversion cuts them off."""
    deep = np.array(image).astype(np.uint16)
    grey = (deep >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[deep == clear] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # what a camera wrote beside an image is not the image
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Pixels as they were seen, by EXIF's eight ways to hold a camera."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)

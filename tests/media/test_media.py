"""Pictures, from whatever shows them: what comes out, what is refused, and that nothing else comes of it."""

import base64
import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile import encoded, image, picture, png, text
from PIL import Image, ImageOps

from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media import MediaLimits, Picture, read, read_all

# Pillow warns of what is refused a moment later.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF data")

LIMITS = MediaLimits.of(EngineConfig())
SMALL = replace(
    LIMITS, max_images=3, max_image_bytes=2**20, max_image_pixels=10_000, max_image_side=400, max_request_pixels=15_000
)


def shown(image: Image.Image) -> np.ndarray:
    """The slow and obvious way, by the steps of transformers 5."""
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_is_what_transformers_makes_of_it(mode):
    content = encoded(picture(random.Random(mode), mode), "PNG")
    np.testing.assert_array_equal(read(content, LIMITS).pixels, shown(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_however_the_camera_was_held(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(random.Random(1), "RGB"), "PNG", exif=exif.tobytes())
    np.testing.assert_array_equal(read(content, LIMITS).pixels, shown(Image.open(io.BytesIO(content))))


def test_other_kinds_of_file():
    rng = random.Random(2)
    for form, mode in (("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB")):
        content = encoded(picture(rng, mode), form)
        np.testing.assert_array_equal(read(content, LIMITS).pixels, shown(Image.open(io.BytesIO(content))))
    clear = picture(rng, "P")
    clear.info["transparency"] = 3
    content = encoded(clear, "GIF", transparency=3)
    np.testing.assert_array_equal(read(content, LIMITS).pixels, shown(Image.open(io.BytesIO(content))))


def test_sixteen_bits_become_their_upper_eight_and_no_white():
    deep = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    pixels = read(encoded(Image.fromarray(deep), "PNG"), LIMITS).pixels
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_of_a_moving_picture_the_first_frame():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        how = {"lossless": True} if form == "WEBP" else {}
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **how)
        assert (read(content, LIMITS).pixels == (255, 0, 0)).all(), form


def test_the_same_pixels_are_the_same_picture_from_wherever_they_come(tmp_path):
    image = picture(random.Random(3), "RGB")
    content = encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    coded = base64.b64encode(content).decode()
    here = replace(LIMITS, files=True)
    sources = [
        content, bytearray(content), coded, f"data:image/png;base64,{coded}", image, np.asarray(image),
        tmp_path / "a.png", str(tmp_path / "a.png"), f"file://{tmp_path / 'a.png'}", encoded(image, "BMP"),
    ]  # fmt: skip
    pictures = [*read_all(sources, here), read(read(content, LIMITS), LIMITS)]
    assert len(set(pictures)) == 1
    assert len(pictures[0].digest) == 32
    assert not pictures[0].pixels.flags.writeable
    other = np.array(image)
    other[-1, -1, -1] ^= 1
    assert read(other, LIMITS) != pictures[0]


def test_other_rows_of_the_same_bytes_are_another_picture():
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert Picture.of(pixels.copy()) != Picture.of(pixels.reshape(6, 4, 3))
    assert Picture.of(pixels.copy()) == Picture.of(pixels)


def test_what_a_caller_keeps_stays_its_own():
    mine = np.zeros((2, 2, 3), np.uint8)
    picture = read(mine, LIMITS)
    mine[:] = 7
    assert not picture.pixels.any()
    assert mine.flags.writeable


CODED = base64.b64encode(encoded(Image.new("RGB", (2, 2)), "PNG")).decode()


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        (png(101, 101, b""), RequestTooLarge, "max_image_pixels"),
        (png(60_000, 60_000, b""), RequestTooLarge, "max_image_side|max_image_pixels"),
        (png(401, 1, b""), RequestTooLarge, "max_image_side"),
        (bytes(2**20 + 1), RequestTooLarge, "max_image_bytes"),
        ("A" * 1_500_000, RequestTooLarge, "max_image_bytes"),
        (np.zeros((101, 101, 3), np.uint8), RequestTooLarge, "max_image_pixels"),
        (Image.new("L", (101, 101)), RequestTooLarge, "max_image_pixels"),
        (encoded(picture(random.Random(4), "RGB"), "PNG")[:-40], RequestError, "a broken image"),
        (encoded(Image.new("RGB", (9, 9)), "TIFF"), RequestError, "one of BMP, GIF, JPEG, PNG, WEBP"),
        (b"", RequestError, "one of BMP"),
        (np.zeros((3, 3, 3), np.float32), RequestError, "uint8"),
        (np.zeros((0, 3, 3), np.uint8), RequestError, "no pixels"),
        (Image.new("F", (2, 2)), RequestError, "32 bits"),
        (f"data:text/html;base64,{CODED}", RequestError, "'text/html'"),
        (f"data:image/png,{CODED}", RequestError, "data:image/png;base64,"),
        (f"data:image/png;base64,{CODED[:-1]}", RequestError, "no base64"),
        ("../secret.png", RequestError, "neither"),
        ("file:///etc/passwd", RequestError, "data URL"),
        (Path("/etc/passwd"), RequestError, "data URL"),
        ("http://example.com/a.png", RequestError, "allowed_media_domains"),
        (7, RequestError, "int"),
    ],
    ids=range(21),
)
def test_what_is_refused_says_why(source, kind, says):
    with pytest.raises(kind, match=says):
        read(source, SMALL)


def test_a_request_is_counted_before_anything_is_decoded():
    with pytest.raises(RequestTooLarge, match=r"4 images.*max_images"):
        read_all([np.zeros((1, 1, 3), np.uint8)] * 4, SMALL)
    with pytest.raises(RequestTooLarge, match="max_request_pixels"):
        read_all([png(100, 90, b"nothing to decode")] * 2, SMALL)
    with pytest.raises(RequestError, match="image 1: a broken image"):
        list(read_all([np.zeros((1, 1, 3), np.uint8), png(100, 90, b"nothing to decode")], SMALL))


def hostile(seeds: range) -> tuple[int, int]:
    """Read each by bytes and by text: a picture or an error of ours, and nothing else. How many of each."""
    read_well = refused = 0
    for seed in seeds:
        for source in (image(seed), text(seed)):
            try:
                found = read(source, SMALL)
            except RequestError as error:
                refused += 1
                said = str(error)
                ours = bool(said) and len(said) < 300 and "0x" not in said
            else:
                read_well += 1
                ours = found.pixels.dtype == np.uint8 and found.height * found.width <= SMALL.max_image_pixels
                said = f"{found.pixels.dtype} {found.pixels.shape}"
            assert ours, (seed, said)
    return read_well, refused


def test_hostile_images():
    read_well, refused = hostile(range(120))
    assert read_well > 20
    assert refused > 100


@pytest.mark.long
def test_thousands_of_hostile_images():
    hostile(range(120, 2_000))

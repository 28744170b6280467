"""Broken and hostile images by seed, as bytes or text: what a server's decoder meets when it is open to the world."""

import base64
import functools
import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("P", "L"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
}


def picture(rng: random.Random, mode: str, most: int = 40) -> Image.Image:
    """A small image of a mode."""
    height, width = rng.randint(1, most), rng.randint(1, most)
    noise = np.random.default_rng(rng.getrandbits(32))
    if mode == "I;16":
        return Image.fromarray(noise.integers(0, 2**16, (height, width), np.uint16))
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def honest(rng: random.Random) -> bytes:
    form = rng.choice(sorted(MODES))
    return encoded(picture(rng, rng.choice(MODES[form])), form)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, content: bytes, *extra: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG that says what it likes about its size."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _cut(rng: random.Random) -> bytes:
    content = honest(rng)
    return content[: rng.randrange(len(content))]


def _flipped(rng: random.Random) -> bytes:
    content = bytearray(honest(rng))
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _head_flipped(rng: random.Random) -> bytes:
    content = bytearray(honest(rng))
    for _ in range(rng.randint(1, 6)):
        content[rng.randrange(min(64, len(content)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(content)


def _spliced(rng: random.Random) -> bytes:
    one, other = honest(rng), honest(rng)
    return one[: rng.randrange(len(one))] + other[rng.randrange(len(other)) :]


def _repeated(rng: random.Random) -> bytes:
    content = honest(rng)
    start = rng.randrange(len(content))
    return content[:start] + content[start : start + rng.randint(1, 64)] * rng.randint(2, 500) + content[start:]


def _noise(rng: random.Random) -> bytes:
    return rng.choice((b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"BM", b"RIFF")) + rng.randbytes(
        rng.randint(0, 400)
    )


def _bomb(rng: random.Random) -> bytes:
    """Few bytes that say they are a great many pixels, most of which come."""
    side = rng.choice((5_000, 20_000, 60_000, 2**31 - 1))
    zeros = zlib.compress(bytes(2**20), 9) if rng.random() < 0.5 else b"\0"
    match rng.randrange(5):
        case 0:
            return png(side, side, zeros, bits=rng.choice((1, 8, 16)), colour=rng.choice((0, 2, 6)))
        case 1:
            screen = struct.pack("<HHBBB", side & 0xFFFF, side & 0xFFFF, 0x80, 0, 0)
            return b"GIF89a" + screen + bytes(6) + rng.randbytes(40)
        case 2:
            return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        case 3:
            content = bytearray(encoded(picture(rng, "RGB"), "JPEG"))
            at = content.index(b"\xff\xc0")
            content[at + 5 : at + 9] = struct.pack(">HH", min(side, 65_500), min(side, 65_500))
            return bytes(content)
        case _:
            body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2 + rng.randbytes(20)
            return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@functools.cache
def _zeros() -> bytes:
    """A thousand times as many when they are read."""
    return zlib.compress(bytes(2**24), 9)


def _laden(rng: random.Random) -> bytes:
    """A small image with much beside it: text and colour profiles that grow when they are read, a great many chunks."""
    zeros = _zeros()
    extra = {
        0: [chunk(b"zTXt", b"x\0\0" + zeros)] * 3,
        1: [chunk(b"iCCP", b"x\0\0" + zeros)],
        2: [chunk(b"tEXt", b"x\0y")] * 2000,
        3: [chunk(b"eXIf", rng.randbytes(200))],
        4: [chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))],
        5: [chunk(b"PLTE", bytes(rng.randint(0, 900)))],
    }[rng.randrange(6)]
    return png(2, 2, zlib.compress(bytes(6)), *extra)


def _moving(rng: random.Random) -> bytes:
    frames = [picture(rng, "P", 8).resize((8, 8)) for _ in range(rng.randint(2, 12))]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return content if rng.random() < 0.5 else content[: rng.randrange(len(content))]


def _other(rng: random.Random) -> bytes:
    form = rng.choice(("TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF"))
    words = (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"<!DOCTYPE html>", b"{}", b"\x7fELF", b"PK")
    return rng.choice(words) if rng.random() < 0.5 else encoded(picture(rng, "RGB"), form)


def _turned(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 1, 5, 6, 8, 9, 255))
    return encoded(picture(rng, "RGB"), "JPEG", exif=exif.tobytes()[: rng.choice((10, 20, None))])


KINDS = (
    _cut, _flipped, _head_flipped, _spliced, _repeated, _noise, _bomb, _laden, _moving, _other, _turned, honest,
)  # fmt: skip


def image(seed: int) -> bytes:
    """The image of a seed, of each kind in turn."""
    return KINDS[seed % len(KINDS)](random.Random(seed))


def text(seed: int) -> str:
    """The same as what a client would send for one: a data URL, base64, or something that only looks like either."""
    rng = random.Random(f"text {seed}")
    coded = base64.b64encode(image(seed)).decode()
    return rng.choice(
        (
            "data:image/png;base64," + coded,
            "data:image/jpeg;base64," + coded,
            "data:image/webp;charset=utf-8;base64," + coded,
            coded,
            "data:;base64," + coded,
            "data:image/png," + coded,
            "data:text/html;base64," + coded,
            "data:image/svg+xml;base64," + coded,
            "data:image/png;base64," + coded[:-1],
            "data:image/png;base64,,," + coded,
            "DATA:IMAGE/PNG;BASE64," + coded.replace("A", "\u0410"),
            "http://127.0.0.1/" + coded[:20],
            "http://169.254.169.254/latest/meta-data",
            "https://[::ffff:10.0.0.1]/a.png",
            "file:///etc/passwd",
            "../../etc/passwd.png",
            "ftp://example.com/a.png",
            "data:" + "a" * rng.randint(0, 300),
            "",
        )
    )

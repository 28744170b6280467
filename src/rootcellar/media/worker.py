"""The process that decodes pictures: what a hostile file does to a decoder, it does here, with little memory and time.

It serves a connection until that ends: first the limits, then one request's pictures after the other's.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection

from rootcellar.child import give_back, may_take, parent
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media.limits import MediaLimits
from rootcellar.media.reading import counted
from rootcellar.media.sources import Small

MEMORY_BYTES = 2**26, 24, 4
"""What the process may take beside its own code: always, for each pixel that an image may have, and for each byte that
the images of a request may have as they come. (An interlaced PNG with transparency took 19 bytes a pixel.)"""


def serve(connection: Connection) -> None:
    """Answer until the other side is gone.

    In: the limits and the most bytes of a request, then ``(seconds, sources)`` again and again. Out, for each of these:
    how many pixels all have, or an error; in, whether to go on; out, for each picture its height, width and digest, and
    its pixels, or an error. An error is ``(whether it is too large, message)``.
    """
    limits, request_bytes = connection.recv()
    connection.send(None)
    always, pixel, byte = MEMORY_BYTES
    may_take(always + pixel * limits.max_image_pixels + byte * request_bytes)
    while True:
        try:
            seconds, sources = connection.recv()
        except EOFError:
            return
        # Should the server be gone meanwhile, nobody else would end this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        try:
            _answer(connection, sources, limits)
        except RequestError as error:
            connection.send((isinstance(error, RequestTooLarge), str(error)))
        except MemoryError:
            connection.send((True, "an image takes more memory to decode than there is for it: send a smaller one"))
        signal.setitimer(signal.ITIMER_REAL, 0)
        del sources
        give_back()


def _answer(connection: Connection, sources: Sequence[bytes | str | Small], limits: MediaLimits) -> None:
    pixels, waiting = counted(sources, limits)
    connection.send(pixels)
    if not connection.recv():
        return
    for decode in waiting:
        picture = decode()
        connection.send((picture.height, picture.width, picture.digest))
        connection.send_bytes(picture.pixels.data.cast("B"))


def main() -> None:
    """Serve the process that began this one."""
    serve(parent())

"""Pictures of many requests, decoded in processes of their own, so that no thread of this one waits for a decoder.

Each tenant has a line, and the lines take turns: however many pictures one tenant sends, another waits for one request
of its. Of what was decoded only that is kept which a model looks at. It counts against its tenant until nobody holds
its pixels any more, and where that is as much as may be, the next in its line waits.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.child import Child
from rootcellar.errors import EngineError, QueueFull, RequestError, RequestTooLarge
from rootcellar.media.limits import MediaLimits
from rootcellar.media.picture import Picture
from rootcellar.media.reading import numbered
from rootcellar.media.sources import Small

log = logging.getLogger(__name__)

Prepare = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""From all pixels of a picture to those that are kept, uint8 [height, width, 3] both; ``RequestError``: none can be."""
WAITING_REQUESTS, WAITING_BYTES = 1024, 2**27
"""Most requests of a tenant that wait for their pictures, and most bytes of these as they came."""
# How often is looked whether pixels have been let go.
_LOOK_SECONDS = 0.02


@dataclass
class _Job:
    sources: Sequence[bytes | str | Small]
    tenant: str
    future: Future[list[Picture]] = field(default_factory=Future)
    pixels: int | None = None
    """As many as they were counted to be, before there was no room for them."""

    @property
    def bytes(self) -> int:
        return sum(len(each.source if isinstance(each, Small) else each) for each in self.sources)


class PictureReader:
    """Decodes pictures in as many processes as it may have, each started when first needed, and again when it ended."""

    def __init__(
        self, limits: MediaLimits, *, request_bytes: int, prepare: Prepare | None = None, processes: int | None = None
    ) -> None:
        """``request_bytes``: most bytes of a request's sources. ``processes``: None: one for two cores, up to four.

        ``prepare``: what is kept of a picture's pixels, or a ``RequestError``; None: all of them. A tenant's pictures
        may have ``max_request_pixels`` together, so prepared.
        """
        self._limits = limits
        self._prepare = prepare
        self._request_bytes = request_bytes
        self._most = processes or max(1, min(4, (os.cpu_count() or 2) // 2))
        self._changed = threading.Condition()
        self._lines: dict[str, deque[_Job]] = {}
        self._held: dict[str, int] = {}
        # What finalizers say, which may run in the middle of anything.
        self._let_go: deque[tuple[str, int]] = deque()
        self._threads: list[threading.Thread] = []
        self._children: list[Child] = []
        self._idle = 0
        self._closed = False

    def read(self, sources: Sequence[bytes | str | Small], tenant: str = "") -> Future[list[Picture]]:
        """The pictures of one request: of bytes of image files, data URLs and base64.

        The future fails as ``media.read`` does, and with ``EngineError`` when this is closed. What was not begun can be
        cancelled. ``QueueFull``: too many of the tenant's wait.
        """
        job = _Job(sources, tenant)
        with self._changed:
            if self._closed:
                raise EngineError("the server is shutting down")
            line = self._lines.setdefault(tenant, deque())
            if line and (len(line) >= WAITING_REQUESTS or sum(each.bytes for each in line) + job.bytes > WAITING_BYTES):
                raise QueueFull(f"too many requests: images of {len(line)} wait to be decoded; try again later")
            line.append(job)
            if not self._idle and len(self._threads) < self._most:
                child = Child("rootcellar.media.worker", "decodes images", (self._limits, self._request_bytes))
                thread = threading.Thread(target=self._work, args=(child,), name="rootcellar-pictures", daemon=True)
                self._children.append(child)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return job.future

    @property
    def held_pixels(self) -> int:
        """Pixels of all tenants' pictures that somebody holds."""
        with self._changed:
            self._count_let_go()
            return sum(self._held.values())

    def close(self) -> None:
        """End the processes. What still waits fails."""
        with self._changed:
            self._closed = True
            waiting = [job for line in self._lines.values() for job in line]
            self._lines.clear()
            self._changed.notify_all()
        for child in self._children:
            child.stop()
        for thread in self._threads:
            thread.join()
        for job in waiting:
            if job.pixels is not None or job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineError("the server is shutting down"))

    # -- on the threads -------------------------------------------------------------------------------------------

    def _work(self, child: Child) -> None:
        while (job := self._next()) is not None:
            try:
                pictures = self._pictures(child, job)
            except BaseException as error:
                job.future.set_exception(error)
            else:
                if pictures is None:
                    self._put_back(job)
                else:
                    job.future.set_result(pictures)
                del pictures
            del job
        child.close()

    def _next(self) -> _Job | None:
        """The first that may begin of the line whose turn it is; None at the end."""
        with self._changed:
            while not self._closed:
                self._count_let_go()
                full = False
                for tenant in list(self._lines):
                    line = self._lines[tenant]
                    job = line[0]
                    if not self._has_room(job):
                        full = True
                        continue
                    line.popleft()
                    del self._lines[tenant]
                    if line:
                        self._lines[tenant] = line  # behind the others
                    if job.pixels is not None or job.future.set_running_or_notify_cancel():
                        return job
                    break
                else:
                    self._idle += 1
                    self._changed.wait(_LOOK_SECONDS if full else None)
                    self._idle -= 1
            return None

    def _has_room(self, job: _Job) -> bool:
        held = self._held.get(job.tenant, 0)
        return job.pixels is None or not held or held + job.pixels <= self._limits.max_request_pixels

    def _put_back(self, job: _Job) -> None:
        """There was no room: it goes first when there is."""
        with self._changed:
            if not self._closed:
                self._lines.setdefault(job.tenant, deque()).appendleft(job)
                return
        job.future.set_exception(EngineError("the server is shutting down"))

    def _count_let_go(self) -> None:
        while self._let_go:
            tenant, pixels = self._let_go.popleft()
            self._held[tenant] = self._held.get(tenant, 0) - pixels
            if not self._held[tenant]:
                del self._held[tenant]

    def _take_room(self, job: _Job, pixels: int) -> bool:
        with self._changed:
            self._count_let_go()
            job.pixels = pixels
            if not self._has_room(job):
                return False
            self._held[job.tenant] = self._held.get(job.tenant, 0) + pixels
            return True

    def _pictures(self, child: Child, job: _Job) -> list[Picture] | None:
        """What a process makes of ``job``; None: there is no room for its pixels now."""
        connection = child.connection()
        end = time.monotonic() + self._limits.media_timeout

        def heard() -> Any:
            if not connection.poll(max(0.0, end - time.monotonic())):
                child.close()
                raise RequestError(
                    f"decoding images takes more than {self._limits.media_timeout:g} seconds: send smaller ones, or "
                    "raise media_timeout"
                )
            said = connection.recv()
            if isinstance(said, tuple) and len(said) == 2:
                raise (RequestTooLarge if said[0] else RequestError)(said[1])
            return said

        taken = 0
        try:
            connection.send((self._limits.media_timeout, job.sources))
            pixels = heard()
            assert isinstance(pixels, int)
            roomy = self._take_room(job, pixels)
            connection.send(roomy)
            if not roomy:
                return None
            taken = pixels
            pictures, wrong = [], None
            for i in range(len(job.sources)):
                height, width, digest = heard()
                image = np.empty((height, width, 3), np.uint8)
                connection.recv_bytes_into(image.data.cast("B"))
                if self._prepare is not None:
                    try:
                        image = numbered(i, len(job.sources), partial(self._prepare, image))
                    except RequestError as error:  # the process tells of the others nevertheless
                        wrong = wrong or error
                        continue
                image.flags.writeable = False
                kept = image.shape[0] * image.shape[1]
                weakref.finalize(image, self._let_go.append, (job.tenant, kept)).atexit = False
                self._let_go.append((job.tenant, height * width - kept))
                taken -= height * width
                pictures.append(Picture(image, digest, self._prepare is not None))
            if wrong is not None:
                raise wrong
            return pictures
        except (EOFError, OSError):
            words = child.said().partition("\n")[0]
            child.close()
            if self._closed:
                raise EngineError("the server is shutting down") from None
            log.warning("the process that decodes images died of one: %s", words or "it said nothing")
            raise RequestTooLarge("an image is refused: decoding it took more memory than there is for it") from None
        except RequestError:
            raise
        except BaseException:
            child.close()  # whatever it says next would be taken for an answer to another
            raise
        finally:
            self._let_go.append((job.tenant, taken))

"""Long prompts, read in a process of their own, so that no other thread of this one waits for Python's lock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rootcellar.child import Child
from rootcellar.errors import EngineError, QueueFull, RequestError, RequestTooLarge
from rootcellar.text.inert import each_text
from rootcellar.text.tokenizer import Chat

log = logging.getLogger(__name__)

SHORT = 8192
"""Characters, or tokens to decode, that take a few milliseconds: an event loop may stand still for as long."""
_FEW_TEXTS = 1000
_MOST_WAITING = 64

T = TypeVar("T")


def is_short(value: Any) -> bool:
    """Whether the strings inside of plain values are few and short. Looks at no more than it must."""
    texts = list(islice(each_text(value), _FEW_TEXTS))
    return len(texts) < _FEW_TEXTS and sum(map(len, texts)) <= SHORT


class Reader:
    """Reads prompts in a process, one after the other. Started when first needed, and again when it was ended.

    Every method gives a future at once, or raises ``QueueFull``. What was not begun can be cancelled. A job that takes
    too long, or more memory than the process may have, ends with a ``RequestError``.
    """

    def __init__(self, folder: Path, *, seconds: float, characters: int) -> None:
        """``folder`` of the model. ``seconds``: what one job may take; ``characters``: what it may hold together."""
        self._seconds = seconds
        self.characters = characters
        self._thread = ThreadPoolExecutor(1, "rootcellar-reader")
        self._lock = threading.Lock()
        self._closed = False
        self._waiting = 0
        self._child = Child("rootcellar.text.worker", "reads prompts", (str(folder), characters))

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> Future[list[list[int]]]:
        """Token ids of each text."""

        def work() -> list[list[int]]:
            return [_ids(each) for each in self._do("encode", texts, add_special_tokens)]

        return self._submit(work)

    def decode(self, lists: Sequence[Sequence[int]], skip_special_tokens: bool) -> Future[list[str]]:
        """The text of each list of token ids."""

        def work() -> list[str]:
            return list(self._do("decode", [np.asarray(ids, np.int32).tobytes() for ids in lists], skip_special_tokens))

        return self._submit(work)

    def chat(self, messages: Sequence[Any], **options: Any) -> Future[Chat]:
        """A conversation; ``options`` as those of ``Tokenizer.chat``."""

        def work() -> Chat:
            count = sum(map(len, each_text((messages, options))))
            if count > self.characters:
                raise RequestTooLarge(
                    f"the messages have {count} characters; this server takes {self.characters} (max_prompt_characters)"
                )
            text, ids = self._do("chat", messages, {**options, "seconds": self._seconds})
            return Chat(text, _ids(ids))

        return self._submit(work)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._waiting >= _MOST_WAITING:
            raise QueueFull(f"too many requests: {self._waiting} long prompts wait to be read; try again later")
        with self._lock:
            self._waiting += 1
        future = self._thread.submit(work)
        future.add_done_callback(self._done)
        return future

    def _done(self, _future: Future[Any]) -> None:
        with self._lock:
            self._waiting -= 1

    def close(self) -> None:
        """End the process. What still waits for it fails."""
        self._closed = True
        self._child.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._child.close()

    # -- on its thread --------------------------------------------------------------------------------------------

    def _do(self, job: str, *arguments: Any) -> Any:
        connection = self._child.connection()
        try:
            connection.send((self._seconds, job, arguments))
            # A template's own clock comes first, and leaves the process as it is.
            if not connection.poll(self._seconds + 0.5):
                self._child.close()
                raise RequestError(self._late())
            result, wrong = connection.recv()
        except (EOFError, OSError):
            words = self._child.said().partition("\n")[0]
            self._child.close()
            if self._closed:
                raise EngineError("the server is shutting down") from None
            log.warning("the process that reads prompts died of one: %s", words or "it said nothing")
            raise RequestError("the prompt is refused: reading it took more memory than there is for it") from None
        if wrong is not None:
            raise RequestError(wrong or self._late())
        return result

    def _late(self) -> str:
        return (
            f"reading the prompt takes more than {self._seconds:g} seconds: its chat template does not end, or it is "
            "very long; shorten it, or raise prompt_timeout"
        )


def _ids(content: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(content, np.int32).tolist()
    return ids

"""The process that reads long prompts: what takes it seconds stops nothing else, and what never ends is ended with it.

It serves a connection until that ends: first the model's folder, then one job after the other.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from rootcellar.child import give_back, may_take, parent
from rootcellar.errors import RequestError
from rootcellar.text.templates import TemplateTimeout
from rootcellar.text.tokenizer import Tokenizer

MEMORY_BYTES = 2**28, 2**10
"""What the process may take beside the tokenizer: always, and for each character that a job may have. (A character of
Chinese that is three tokens took 500 bytes, one of English 250.)"""


def encode(tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[bytes]:
    """Token ids of each text as int32."""
    return [np.asarray(ids, np.int32).tobytes() for ids in tokenizer.encode_all(texts, add_special_tokens)]


def decode(tokenizer: Tokenizer, lists: Sequence[bytes], skip_special_tokens: bool) -> list[str]:
    """The text of each list of int32 token ids."""
    return [tokenizer.decode(np.frombuffer(ids, np.int32).tolist(), skip_special_tokens) for ids in lists]


def chat(tokenizer: Tokenizer, messages: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, bytes]:
    """The text of a conversation, and its token ids as int32."""
    read = tokenizer.chat(messages, **options)
    return read.text, np.asarray(read.ids, np.int32).tobytes()


JOBS: Mapping[str, Callable[..., Any]] = {"encode": encode, "decode": decode, "chat": chat}


def serve(connection: Connection) -> None:
    """Answer until the other side is gone.

    In: the folder and the most characters of a job, then ``(seconds, job, arguments)`` again and again. Out, for each
    job: ``(result, what is wrong)``, one of them None; what is wrong is "" when it took too long.
    """
    folder, characters = connection.recv()
    tokenizer = Tokenizer(folder)
    connection.send(None)
    may_take(MEMORY_BYTES[0] + MEMORY_BYTES[1] * characters)
    while True:
        try:
            seconds, job, arguments = connection.recv()
        except EOFError:
            return
        # Should the server be gone meanwhile, nobody else would end this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        answer: tuple[Any, str | None]
        try:
            answer = JOBS[job](tokenizer, *arguments), None
        except TemplateTimeout:
            answer = None, ""
        except RequestError as error:
            answer = None, str(error)
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)
        del answer
        give_back()


def main() -> None:
    """Serve the process that began this one."""
    serve(parent())

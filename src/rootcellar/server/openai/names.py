"""Errors in the words of the client: OpenAI's names of parameters where the engine has SGLang's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rootcellar.errors import RequestError


@contextlib.contextmanager
def openai_names(**names: str) -> Iterator[None]:
    """Raise a ``RequestError`` again with parameters called as in ``names`` (the engine's name = the client's)."""
    try:
        yield
    except RequestError as error:
        text = str(error)
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        raise type(error)(text) from error

"""Errors in the words of the client: OpenAI's names of parameters where the engine has SGLang's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

from rootcellar.errors import RequestError


@contextlib.contextmanager
def openai_names(form: Callable[[], Mapping[str, str]], **names: str) -> Iterator[None]:
    """Raise a ``RequestError`` again with parameters called as in ``names`` (the engine's name = the client's).

    ``form`` gives the same for what the answer must follow, where the message begins with it: the rest is llguidance's.
    """
    try:
        yield
    except RequestError as error:
        text = str(error)
        for ours, theirs in form().items():
            text = re.sub(rf"\b{ours}\b", theirs, text, count=1)
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        raise type(error)(text) from error

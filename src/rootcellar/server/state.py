"""What every route knows: the engine, the settings, and how the server is doing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from rootcellar.engine import Engine
from rootcellar.engine.build import folder_of, sampling_defaults
from rootcellar.engine.identity import LONGEST_NAME
from rootcellar.server.browsers import Browsers
from rootcellar.server.callers import Caller, Callers
from rootcellar.server.errors import ApiError
from rootcellar.server.forwarding import PrefillNode
from rootcellar.server.images import Pictures
from rootcellar.server.observe import Observer
from rootcellar.server.pace import Pace
from rootcellar.server.responses.stored import Responses
from rootcellar.server.shared import Shared
from rootcellar.server.tools import Formats
from rootcellar.server_config import ServerConfig
from rootcellar.text.reader import Reader

# Of a request's prompts together, by default; what a process needs to tokenize them is about 0.15 GB.
_CHARACTERS = 2**18


@dataclass
class ServerState:
    """One server.

    Attributes:
        engine: what computes.
        config: the server's settings.
        draining: whether it is about to stop: new work is refused.
        active: POST requests that have no full answer yet.
        started: seconds since 1970.
        observer: shows what goes on.
        health: the one check that all who ask share.
        callers: who may call.
        browsers: which web pages may.
        reader: tokenizes what is long.
        images: fetches and decodes what requests show.
        pace: who used how much of the event loop.
        sampling: what OpenAI's routes sample with where a request does not say.
        formats: how the model writes calls of tools and what it thinks.
        responses: answers that others may go on from.
        prefill: who computes prompts; None: this server, or whoever a request names.
    """

    engine: Engine
    config: ServerConfig
    draining: bool = False
    active: int = 0
    started: float = field(default_factory=time.time)
    observer: Observer = field(init=False)
    health: Shared[dict[str, Any]] = field(init=False)
    callers: Callers = field(init=False)
    browsers: Browsers = field(init=False)
    reader: Reader = field(init=False)
    images: Pictures = field(init=False)
    pace: Pace = field(default_factory=Pace)
    sampling: dict[str, Any] = field(init=False)
    formats: Formats = field(init=False)
    responses: Responses = field(init=False)
    prefill: PrefillNode | None = field(init=False)
    _quiet: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        model = self.config.sampling_defaults == "model"
        self.sampling = sampling_defaults(self.engine.config.model_path) if model else {}
        tokenizer = None if self.engine.config.skip_tokenizer_init else self.engine.tokenizer
        self.formats = Formats.of(self.config, tokenizer)
        self.responses = Responses(self.config.response_ttl, self.config.max_stored_responses)
        url = self.config.prefill_url
        self.prefill = None if url is None else PrefillNode.at(url, self.engine)
        self.callers = Callers.of(self.config)
        self.browsers = Browsers.of(self.config, open=self.callers.open)
        self.reader = Reader(
            folder_of(self.engine.config.model_path),
            seconds=self.config.prompt_timeout,
            characters=self.config.max_prompt_characters or max(_CHARACTERS, 8 * self.longest_prompt),
        )
        self.images = Pictures(self.engine, self.config.max_body_bytes)
        self.observer = Observer(
            self.engine, model_name=self.model_name, sglang_metrics=self.config.enable_sglang_metrics
        )

    @property
    def model_name(self) -> str:
        """The model's name for clients."""
        return self.config.served_model_name or self.engine.config.model_path

    def require_model(self, name: str | None) -> None:
        """Refuse a request for another model: 404. Routers write "unknown" where their client named none."""
        if name not in (None, "", "default", "unknown", self.model_name, self.engine.config.model_path):
            raise ApiError(
                404,
                f"the model {name[:LONGEST_NAME]!r} is not served here; this is {self.model_name!r}",
                "model",
                "model_not_found",
            )

    def pinned_share(self, caller: Caller) -> float:
        """What part of what pins may hold ``caller``'s requests may: those without a name share half of it."""
        if caller.admin:
            return 1.0
        return 1 / len(self.callers.tenants) if caller.name else 0.5

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt."""
        limit = self.config.max_prompt_length
        return self.engine.longest_prompt if limit is None else min(limit, self.engine.longest_prompt)

    def close(self) -> None:
        """End what runs beside the engine."""
        self.reader.close()
        self.images.close()

    def enter(self) -> None:
        """A request begins."""
        self.active += 1
        self._quiet.clear()

    def leave(self) -> None:
        """A request has its answer."""
        self.active -= 1
        if not self.active:
            self._quiet.set()

    async def quiet(self, seconds: float) -> bool:
        """Wait until no request is active, at most so long; whether that is so."""
        if self.active:
            try:
                await asyncio.wait_for(self._quiet.wait(), seconds)
            except TimeoutError:
                return False
        return True


def state_of(request: Request) -> ServerState:
    """The state of the server that ``request`` came to."""
    state: ServerState = request.app.state.server
    return state

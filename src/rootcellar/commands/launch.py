"""``rootcellar launch``: what a coding agent or a client library has to be told to work against a server."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from rootcellar.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """Where a server is, what its model is called, and the key to it."""

    url: str
    model: str
    api_key: str


@dataclass(frozen=True)
class Launch:
    """How a program is started: what it finds in its environment, and its words."""

    environment: Mapping[str, str]
    words: tuple[str, ...] = ()


def _claude(server: Target) -> Launch:
    model = {f"ANTHROPIC_DEFAULT_{size}_MODEL": server.model for size in ("OPUS", "SONNET", "HAIKU")}
    return Launch(
        {
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": server.api_key,
            "ANTHROPIC_MODEL": server.model,
            **model,
            "CLAUDE_CODE_SUBAGENT_MODEL": server.model,
            # What changes with each request would begin the prompt.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        ("claude",),
    )


def _codex(server: Target) -> Launch:
    provider = "model_providers.rootcellar"
    settings = {
        "model_provider": "rootcellar",
        f"{provider}.name": "rootcellar",
        f"{provider}.base_url": f"{server.url}/v1",
        f"{provider}.wire_api": "responses",
        f"{provider}.env_key": "ROOTCELLAR_API_KEY",
        "web_search": "disabled",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={json.dumps(value)}")]
    return Launch({"ROOTCELLAR_API_KEY": server.api_key}, ("codex", *options, "-m", server.model))


def _opencode(server: Target) -> Launch:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "rootcellar",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": server.api_key},
        "models": {server.model: {"name": server.model}},
    }
    content = {"provider": {"rootcellar": provider}, "model": f"rootcellar/{server.model}"}
    return Launch({"OPENCODE_CONFIG_CONTENT": json.dumps(content)}, ("opencode",))


def _aider(server: Target) -> Launch:
    environment = {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": server.api_key}
    return Launch(environment, ("aider", "--model", f"openai/{server.model}"))


def _openai(server: Target) -> Launch:
    return Launch({"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": server.api_key})


def _anthropic(server: Target) -> Launch:
    return Launch({"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": server.api_key})


CLIENTS: Mapping[str, Callable[[Target], Launch]] = {
    "claude": _claude,
    "codex": _codex,
    "opencode": _opencode,
    "aider": _aider,
    "openai": _openai,
    "anthropic": _anthropic,
}
"""By the name of the program; the last two are libraries, which are told and not started."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar launch``."""
    parser.description = "Print what a client needs to work against a server, as lines for a shell; or start it so."
    parser.add_argument("client", choices=list(CLIENTS), help="the program or library")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where the server is (default: %(default)s)")
    parser.add_argument("--model", default="default", help="what its model is called (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("ROOTCELLAR_API_KEY", "none"), help="the key (default: $ROOTCELLAR_API_KEY)"
    )
    parser.add_argument("--run", action="store_true", help="start the program")
    parser.add_argument("words", nargs="*", metavar="-- WORD", help="what it is started with beside")


def run(args: argparse.Namespace) -> int:
    """Print, or become the program."""
    server = Target(args.url.rstrip("/"), args.model, args.api_key)
    launch = CLIENTS[args.client](server)
    words = [*launch.words, *args.words]
    if not args.run:
        for name, value in launch.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        if launch.words:
            print(shlex.join(words))
        return 0
    if not launch.words:
        raise ConfigError(f"{args.client} is a library: leave out --run, and set what is printed where yours runs")
    program = shutil.which(launch.words[0])
    if program is None:
        raise ConfigError(f"{launch.words[0]} is not installed: there is no such program on the PATH")
    return _become(program, words, {**os.environ, **launch.environment})


def _become(program: str, words: list[str], environment: Mapping[str, str]) -> NoReturn:
    os.execve(program, words, environment)

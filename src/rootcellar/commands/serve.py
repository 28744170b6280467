"""``rootcellar serve``: the HTTP server."""

from __future__ import annotations

import argparse

from rootcellar import options
from rootcellar.config import EngineConfig
from rootcellar.server_config import ServerConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar serve``."""
    parser.description = "Serve over HTTP, to clients of OpenAI, SGLang and vLLM (docs/serving.md)."
    options.add_arguments(parser, ServerConfig, "server")
    options.add_arguments(parser, EngineConfig, "engine")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop. A wrong value is reported before the seconds that loading JAX and a model take."""
    engine_options = options.given(args, EngineConfig)
    EngineConfig.from_kwargs(**engine_options)
    config = ServerConfig(**options.given(args, ServerConfig))
    from rootcellar.server.run import serve

    return serve(engine_options, config)

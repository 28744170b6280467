"""The ``rootcellar`` command.

Each command's options are declared, and its modules imported, only when that command is chosen: ``rootcellar version``
answers without loading JAX. A mistake that rootcellar itself reports ends the program with one line on stderr and
status 2.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import rootcellar
from rootcellar import options
from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError, RootcellarError
from rootcellar.sampling_params import SamplingParams
from rootcellar.server_config import ServerConfig

if TYPE_CHECKING:
    from rootcellar import Engine

Answer = dict[str, Any]

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: what the overview says of it, how its parser is filled (if it has options), and what it does."""

    help: str
    configure: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: the process's own). Returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser(words).parse_args(words)
    try:
        return COMMANDS[args.command].run(args)
    except RootcellarError as error:
        print(f"rootcellar: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the command that `words` name; other commands are listed only."""
    parser = argparse.ArgumentParser(prog="rootcellar", description=rootcellar.__doc__.partition("\n")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        if name == chosen == "replay":
            from rootcellar.sim import cli as replay

            replay.add_parser(subparsers)
            continue
        if name == chosen == "plan":
            from rootcellar.sim import plan_cli

            plan_cli.add_parser(subparsers)
            continue
        # A usage line of forty options helps nobody; the list below it does.
        subparser = subparsers.add_parser(name, help=command.help, usage=f"rootcellar {name} [options]")
        if name == chosen and command.configure is not None:
            command.configure(subparser)
    return parser


# --- generate ---------------------------------------------------------------------------------------------------------


def _configure_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Complete prompts, or chat. Without --prompt the prompt is read from standard input."
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="A prompt; repeat it for several at once.")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="Treat each prompt, or each line of standard input, as the next turn of one conversation.",
    )
    parser.add_argument("--system", metavar="TEXT", help="The system message of a chat.")
    parser.add_argument(
        "--json", action="store_true", help="Print each answer as one line of JSON, with its meta_info."
    )
    options.add_arguments(parser, SamplingParams, "sampling")
    options.add_arguments(parser, EngineConfig, "engine")


def _generate(args: argparse.Namespace) -> int:
    engine_options = options.given(args, EngineConfig)
    sampling = options.given(args, SamplingParams)
    # A wrong value is reported before the seconds that loading JAX and a model take.
    EngineConfig.from_kwargs(**engine_options)
    SamplingParams.from_dict(sampling)
    if args.system is not None and not args.chat:
        raise RequestError("--system is part of a chat: add --chat.")
    with rootcellar.Engine(**engine_options) as engine:
        if args.chat:
            _chat(engine, args.system, args.prompt or _turns_from_stdin(), sampling, args.json)
        else:
            _complete(engine, args.prompt or [sys.stdin.read()], sampling, args.json)
    return 0


def _turns_from_stdin() -> Iterable[str]:
    """Each line that is not blank; with a prompt sign when a person is typing."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _chat(
    engine: "Engine", system: str | None, turns: Iterable[str], sampling: dict[str, object], as_json: bool
) -> None:
    """One conversation: each turn sees the ones before, whose keys and values the cache still holds."""
    if sampling.get("n", 1) != 1:
        raise RequestError("n must be 1 in a chat: a conversation goes on from one answer.")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = _answer(engine, engine.chat_prompt(messages), sampling, as_json)
        messages.append({"role": "assistant", "content": answer})


def _complete(engine: "Engine", prompts: list[str], sampling: dict[str, object], as_json: bool) -> None:
    """Independent prompts. One is streamed; several, or several answers, are computed together and printed in order."""
    if len(prompts) == 1 and sampling.get("n", 1) == 1:
        _answer(engine, prompts[0], sampling, as_json)
        return
    answers = cast("list[Answer]", engine.generate(prompt=prompts, sampling_params=sampling))
    for i, answer in enumerate(answers):
        if as_json:
            print(json.dumps(answer))
        else:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {len(answers)}\n{answer['text']}")


def _answer(engine: "Engine", prompt: str, sampling: dict[str, object], as_json: bool) -> str:
    """Print the answer to one prompt, as it comes or as JSON at the end. Returns its text."""
    shown = ""
    last: Answer = {}
    for last in cast("Iterator[Answer]", engine.generate(prompt=prompt, sampling_params=sampling, stream=True)):
        if not as_json:
            print(last["text"][len(shown) :], end="", flush=True)
        shown = last["text"]
    print(json.dumps(last) if as_json else "", flush=True)
    return shown


# --- the other commands -----------------------------------------------------------------------------------------------


def _configure_bench(parser: argparse.ArgumentParser) -> None:
    from rootcellar.engine import bench

    bench.add_arguments(parser)
    options.add_arguments(parser, EngineConfig, "engine")


def _bench(args: argparse.Namespace) -> int:
    from rootcellar.engine import bench

    EngineConfig.from_kwargs(**options.given(args, EngineConfig))
    return bench.run(args)


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve over HTTP, to clients of OpenAI, SGLang and vLLM (docs/serving.md)."
    options.add_arguments(parser, ServerConfig, "server")
    options.add_arguments(parser, EngineConfig, "engine")


def _serve(args: argparse.Namespace) -> int:
    engine_options = options.given(args, EngineConfig)
    EngineConfig.from_kwargs(**engine_options)
    config = ServerConfig(**options.given(args, ServerConfig))
    from rootcellar.server.run import serve

    return serve(engine_options, config)


def _demo(_args: argparse.Namespace) -> int:
    from rootcellar.demo import show

    return show.run()


def _replay(args: argparse.Namespace) -> int:
    from rootcellar.sim import cli as replay

    return replay.run(args)


def _plan(args: argparse.Namespace) -> int:
    from rootcellar.sim import plan_cli

    return plan_cli.run(args)


def _version(_args: argparse.Namespace) -> int:
    from rootcellar.cache import CORE

    print(f"rootcellar {rootcellar.__version__}")
    for package in ("jax", "jaxlib", "numpy"):
        print(f"{package} {importlib.metadata.version(package)}")
    print(f"Python {platform.python_version()}")
    print(f"cache core: {CORE}")
    return 0


COMMANDS = {
    "generate": Command("complete prompts or chat", _configure_generate, _generate),
    "serve": Command("serve over HTTP", _configure_serve, _serve),
    "bench": Command("measure prefill, decode and time to first token", _configure_bench, _bench),
    "demo": Command("see the cache at work with the model that ships with the package", None, _demo),
    "replay": Command("replay a trace of requests through the cache, without a model", None, _replay),
    "plan": Command("how many tokens and requests fit, from a model's config and the hardware", None, _plan),
    "version": Command("print the versions of rootcellar and of what it stands on", None, _version),
}

if __name__ == "__main__":
    sys.exit(main())

"""The ``rootcellar`` command.

A command is a module of ``commands/``, imported only when it is chosen: ``rootcellar version`` answers without
loading JAX. A mistake that rootcellar itself reports ends the program with one line on stderr and status 2.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import rootcellar
from rootcellar.errors import RootcellarError

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

COMMANDS = {
    "generate": "complete prompts or chat",
    "serve": "serve over HTTP",
    "bench": "measure prefill, decode and time to first token",
    "demo": "see the cache at work with the model that ships with the package",
    "replay": "replay a trace of requests through the cache, without a model",
    "explain": "what the prompts of a recorded log compute again, and why, without a model",
    "plan": "how many tokens and requests fit, from a model's config and the hardware",
    "launch": "print what an agent such as claude or codex needs to work against a server, or start it so",
    "trace": "what servers did lately, as one timeline for Perfetto",
    "store": "look at, verify and prune the folder of a file store",
    "version": "print the versions of rootcellar and of what it stands on",
}
"""What the overview says of each command, by the name of its module."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: the process's own). Returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    module = importlib.import_module(f"rootcellar.commands.{chosen}") if chosen in COMMANDS else None
    args = _parser(chosen, module).parse_args(words)
    assert module is not None, "the parser requires a command that it knows"
    try:
        return int(module.run(args))
    except RootcellarError as error:
        print(f"rootcellar: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(chosen: str | None, module: ModuleType | None) -> argparse.ArgumentParser:
    """The parser, with the options of the chosen command; other commands are listed only."""
    parser = argparse.ArgumentParser(prog="rootcellar", description=rootcellar.__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"rootcellar {rootcellar.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        # A usage line of forty options helps nobody; the list below it does.
        subparser = subparsers.add_parser(name, help=help, usage=f"rootcellar {name} [options]")
        if name == chosen and module is not None:
            module.configure(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())

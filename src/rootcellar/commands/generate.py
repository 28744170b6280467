"""``rootcellar generate``: complete prompts, or chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import rootcellar
from rootcellar import options
from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError
from rootcellar.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rootcellar import Engine

Result = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar generate``."""
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


def run(args: argparse.Namespace) -> int:
    """Run ``rootcellar generate``."""
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


def _chat(engine: Engine, system: str | None, turns: Iterable[str], sampling: dict[str, object], as_json: bool) -> None:
    """One conversation: each turn sees the ones before, whose keys and values the cache still holds."""
    if sampling.get("n", 1) != 1:
        raise RequestError("n must be 1 in a chat: a conversation goes on from one answer.")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = _answer(engine, {"input_ids": engine.chat_ids(messages)}, sampling, as_json)
        messages.append({"role": "assistant", "content": answer})


def _complete(engine: Engine, prompts: list[str], sampling: dict[str, object], as_json: bool) -> None:
    """Independent prompts. One is streamed; several, or several answers, are computed together and printed in order."""
    if len(prompts) == 1 and sampling.get("n", 1) == 1:
        _answer(engine, {"prompt": prompts[0]}, sampling, as_json)
        return
    answers = cast("list[Result]", engine.generate(prompt=prompts, sampling_params=sampling))
    for i, answer in enumerate(answers):
        if as_json:
            print(json.dumps(answer))
        else:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {len(answers)}\n{answer['text']}")


def _answer(engine: Engine, prompt: dict[str, Any], sampling: dict[str, object], as_json: bool) -> str:
    """Print the answer to one prompt (``prompt`` or ``input_ids``), as it comes or as JSON. Returns its text."""
    shown = ""
    last: Result = {}
    for last in cast("Iterator[Result]", engine.generate(**prompt, sampling_params=sampling, stream=True)):
        if not as_json:
            print(last["text"][len(shown) :], end="", flush=True)
        shown = last["text"]
    print(json.dumps(last) if as_json else "", flush=True)
    return shown

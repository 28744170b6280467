"""Write tests/text/speech.json: what each family's own chat template makes of an assistant that thinks and calls tools.

python scripts/make_speech.py FOLDER

FOLDER holds chat templates as NAME.jinja: those of the wheel of trl 1.16 (`trl/chat_templates/`), and DeepSeek V3.1's
own as deepseekv31.jinja; families whose template is not there stay as they were. With `mistral_common` and
`sentencepiece` installed Mistral's own library writes its forms.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rootcellar.text.inert import Arguments
from rootcellar.text.templates import Templates

TARGET = Path(__file__).parents[1] / "tests" / "text" / "speech.json"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where."},
                    "days": {"type": "integer", "description": "How many."},
                    "where": {"type": "object", "description": "Closer.", "properties": {}},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
CALLS: list[list[tuple[str, dict[str, Any]]]] = [
    [],
    [("get_weather", {"city": "Paris"})],
    [
        (
            "get_weather",
            {"city": 'Köln "am" Rhein, }]\\ <b>', "days": 3, "where": {"list": [1, 2.5, {"a": "b"}], "yes": True}},
        )
    ],
    [("get_weather", {"city": "Rom", "days": -1}), ("now", {}), ("get_weather", {"city": "東京"})],
]
SPOKEN = [("", ""), ("", "Let me look."), ("They ask for\n\nthe weather.", ""), ("Simple.", "I look it up:\n- here")]
# By the names of trl's files: SGLang's names of the formats of calls and of thoughts.
FAMILIES = {
    "qwen2_5": ("qwen25", None),
    "qwen3": ("qwen25", "qwen3"),
    "qwen3_5_think": ("qwen3_coder", "qwen3"),
    "qwen3_8": ("qwen3_coder", "qwen3"),
    "deepseekv3": ("deepseekv3", "deepseek-v3"),
    "deepseekv31": ("deepseekv31", "deepseek-v3"),
    "llama3_1": ("llama3", None),
    "llama3_2": ("llama3", None),
    "gptoss": ("gpt-oss", "gpt-oss"),
    "gemma4_v5": ("gemma4", "gemma4"),
    "lfm2_v2": ("lfm2", None),
}
# By the versions of Mistral's tokenizers: lists of 2024; names and arguments since 2025, with the call's id at first.
MISTRAL = {
    "v3": ("mistral", None),
    "v7": ("mistral", None),
    "v11": ("mistral-args", None),
    "v13": ("mistral-args", "mistral"),
}
USER = {"role": "user", "content": "What is the weather?"}
# What ends a turn is a stop token, which an answer's text does not have.
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "<|tool_response>",
    "<turn|>",
    "<|call|>",
    "<|return|>",
    "</s>",
)


def by_template(path: Path) -> list[dict[str, Any]]:
    """Each of what is said and called, as the template at ``path`` writes it behind its prompt."""
    templates = Templates.__new__(Templates)
    templates.sources, templates._compiled = {"default": path.read_text(encoding="utf-8")}, {}
    found = []
    for thought, text in SPOKEN:
        for calls in CALLS:
            turn: dict[str, Any] = {"role": "assistant", "content": text}
            if calls:
                turn["tool_calls"] = [
                    {"id": f"call{i:05d}", "type": "function",
                     "function": {"name": name, "arguments": Arguments(given, json.dumps(given, ensure_ascii=False))}}
                    for i, (name, given) in enumerate(calls)
                ]  # fmt: skip
            if thought:
                turn |= {"reasoning_content": thought, "thinking": thought}
            given = {"tools": TOOLS, "bos_token": "<s>", "eos_token": "</s>", "enable_thinking": bool(thought)}
            try:
                prompt = templates.render(
                    True, None, {**given, "thinking": bool(thought), "messages": [USER], "add_generation_prompt": True}
                )
                whole = templates.render(
                    True, None, {**given, "messages": [USER, turn], "add_generation_prompt": False}
                )
            except Exception as error:
                print(f"{path.stem} writes no {thought!r}, {text!r}, {len(calls)} calls: {error}", file=sys.stderr)
                continue
            # A prompt that opens or leaves out thoughts which the template does not repeat ends with them.
            shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
            rest = prompt[:shared].endswith("<")
            shared -= bool(rest)
            answer = whole[shared:].rstrip("\n")
            for end in ENDS:
                answer = answer.removesuffix(end)
            # A template may leave out what was thought, or said.
            kept = thought if thought and thought in answer else ""
            said = text if text and text in answer else ""
            as_thought = path.stem == "gptoss" and text and calls  # gpt-oss's says it on the channel of thoughts
            if (kept, said) == (thought, text) and not as_thought and all(name in answer for name, _ in calls):
                found.append(_case(prompt[:shared][-80:], answer, kept, said, calls))
    return found


def _case(prompt: str, answer: str, thought: str, text: str, calls: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "thought": thought, "text": text, "calls": calls}


def by_mistral(version: str, thinks: bool, folder: Path) -> list[dict[str, Any]]:
    """The same by Mistral's own library, as its models of ``version`` write it; ``folder`` is written to."""
    from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall

    tools = [Tool(function=Function(**tool["function"])) for tool in TOOLS]
    tokenizer = _mistral(version, folder)
    found = []
    for (thought, text), calls in itertools.product(SPOKEN if thinks else SPOKEN[:2], CALLS):
        made = [
            ToolCall(id=f"call{i:05d}", function=FunctionCall(name=name, arguments=json.dumps(given)))
            for i, (name, given) in enumerate(calls)
        ]
        results = [ToolMessage(content="3", tool_call_id=call.id, name=call.function.name) for call in made]
        said = [ThinkChunk(thinking=thought), *([TextChunk(text=text)] if text else [])] if thought else text or None
        turns = [UserMessage(content="Weather?"), AssistantMessage(content=said, tool_calls=made or None), *results]
        turns += [] if calls else [UserMessage(content="And tomorrow?")]
        try:
            tokens = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=turns, tools=tools))
        except Exception as error:
            print(f"Mistral {version} writes no {thought!r}, {text!r}, {len(calls)} calls: {error}", file=sys.stderr)
            continue
        # SentencePiece's own way to write a space and a line.
        answer = tokens.text.replace("▁", " ").replace("<0x0A>", "\n")
        answer = answer.partition("[/INST]")[2].partition("</s>")[0]
        # What it leaves out is no case; SentencePiece's first word has a space.
        if text in answer and thought in answer:
            spaced = " " + text if text and answer.startswith(" " + text) else text
            found.append(_case("[/INST]", answer, thought, spaced, calls))
    return found


def _mistral(version: str, folder: Path) -> Any:
    """Mistral's tokenizer of ``version``: the library has no file of the newer ones, whose special tokens are more."""
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.base import SpecialTokens
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    own = {"v3": MistralTokenizer.v3, "v7": MistralTokenizer.v7}
    if version in own:
        return own[version]()
    data = Path(sys.modules["mistral_common"].__path__[0]) / "data" / "tekken_240718.json"
    file = json.loads(data.read_text(encoding="utf-8"))
    file["config"]["version"] = version
    special = [{"rank": i, "token_str": mark.value, "is_control": True} for i, mark in enumerate(SpecialTokens)]
    (folder / "tekken.json").write_text(json.dumps({**file, "special_tokens": special}), encoding="utf-8")
    return MistralTokenizer.from_file(str(folder / "tekken.json"), mode=ValidationMode.test)


def main() -> None:
    """Write the file."""
    folder = Path(sys.argv[1])
    cases = json.loads(TARGET.read_text(encoding="utf-8"))["families"]
    for name, (calls, thoughts) in FAMILIES.items():
        if (path := folder / f"{name}.jinja").exists():
            cases[name] = {"calls": calls, "thoughts": thoughts, "cases": by_template(path)}
    if importlib.util.find_spec("mistral_common"):
        with tempfile.TemporaryDirectory() as scratch:
            for version, (calls, thoughts) in MISTRAL.items():
                written = by_mistral(version, thoughts is not None, Path(scratch))
                cases[f"mistral_{version}"] = {"calls": calls, "thoughts": thoughts, "cases": written}
    TARGET.write_text(json.dumps({"tools": TOOLS, "families": cases}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A real coding agent, unmodified: OpenAI's codex, of npm, in a loop of tools over /v1/responses.

The embedded model is too weak to want a tool and has room for 4,096 tokens: a script asks for a command until three
results are there, from a list of harmless ones, and leaves out the agent's other tools and the longest of its texts.
All else is the agent and the server as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import rootcellar
from rootcellar.server.responses import responses
from serving import idle, on_thread

CODEX = os.environ.get("ROOTCELLAR_CODEX") or shutil.which("codex")
RUN = "exec_command", "shell_command", "shell"
COMMANDS = {"echo jars": "jars", "echo apples": "apples", "true": ""}
TURNS = 3
LONGEST = 1500

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not CODEX, reason="needs codex: npm install @openai/codex, and ROOTCELLAR_CODEX or PATH"),
]


@pytest.fixture(scope="module")
def engine():
    with rootcellar.Engine(model_path="demo", max_total_tokens=8192, max_queued_requests=64) as engine:
        yield engine


def short(content):
    """A text, or the texts of parts, as far as there is room for them."""
    if isinstance(content, str):
        return content[:LONGEST]
    return [{**part, "text": part["text"][:LONGEST]} if "text" in part else part for part in content or []]


@pytest.fixture
def scripted(monkeypatch):
    """What was asked, as (results so far, names of tools)."""
    read, seen = responses.read_chat_request, []

    async def decide(state, body, *arguments, **options):
        results = sum(message["role"] == "tool" for message in body.messages)
        seen.append((results, [tool.function.name for tool in body.tools or []]))
        tools = [tool for tool in body.tools or [] if tool.function.name in RUN][:1]
        for tool in tools:
            name = "cmd" if tool.function.name == "exec_command" else "command"
            one = {"type": "string", "enum": list(COMMANDS)}
            several = {"type": "array", "items": one, "minItems": 1, "maxItems": 1}
            kind = several if tool.function.name == "shell" else one
            schema = {"type": "object", "properties": {name: kind}, "required": [name], "additionalProperties": False}
            tool.function.parameters = schema
            tool.function.description = "Run it."
        messages = [
            {**each, "content": short(each["content"])} if each["role"] != "tool" and each.get("content") else each
            for each in body.messages
        ]
        changed = {"tools": tools, "messages": messages, "max_tokens": 100}
        if results < TURNS:
            changed |= {"tool_choice": "required", "parallel_tool_calls": False}
        else:
            changed |= {"tool_choice": "none"}
        return await read(state, body.model_copy(update=changed), *arguments, **options)

    monkeypatch.setattr(responses, "read_chat_request", decide)
    return seen


def test_codex_runs_three_commands_and_each_turn_has_more_of_its_prompt_cached(engine, scripted, tmp_path):
    (tmp_path / "home").mkdir()
    words = ["--skip-git-repo-check", "--json", "--dangerously-bypass-approvals-and-sandbox", "-C", str(tmp_path)]
    environment = {**os.environ, "CODEX_HOME": str(tmp_path / "home")}
    environment["PATH"] = os.pathsep.join([os.path.dirname(CODEX), environment["PATH"]])
    with on_thread(engine, api_key="secret") as url:
        command = [sys.executable, "-m", "rootcellar", "launch", "--url", url, "--api-key", "secret", "--model", "demo"]
        command += ["--run", "codex", "--", "exec", *words, "How many jars are left?"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=180, check=False, env=environment, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:], scripted)
        idle(engine)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ran = [e["item"] for e in events if e["type"] == "item.completed" and e["item"]["type"] == "command_execution"]
    told = [(item["exit_code"], item["aggregated_output"].strip()) for item in ran]
    assert len(told) == TURNS
    assert {status for status, _ in told} == {0}
    assert {output for _, output in told} <= {*COMMANDS.values()}
    requests, _, _ = engine._loop.call(lambda: engine.sight._newest(64, None))
    turns = sorted(requests, key=lambda each: each.prompt_tokens)[-4:]
    cached = [turn.cached_tokens for turn in turns]
    assert cached == sorted(cached)
    assert cached[0] < cached[1] < cached[-1]
    usage = next(event["usage"] for event in reversed(events) if event["type"] == "turn.completed")
    assert usage["cached_input_tokens"] > usage["input_tokens"] // 2

"""What agents are told: lines for a shell, or a program that is started so."""

import json
import os
import shlex
import stat
import subprocess
import sys

import pytest

from rootcellar.cli import main
from rootcellar.commands.launch import CLIENTS

AT = ["--url", "http://127.0.0.1:8/", "--model", "m", "--api-key", "a b"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_shell_can_read_what_is_printed(client, capsys):
    assert main(["launch", client, *AT]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(lines)
    assert "http://127.0.0.1:8" in said
    assert "8//" not in said
    environment = dict(shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export "))
    done = subprocess.run(
        ["bash", "-c", "\n".join([*(line for line in lines if line.startswith("export ")), "env -0"])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert shown.items() >= environment.items()
    assert any("a b" in value for value in environment.values())


def test_a_program_is_started_so(tmp_path):
    program = tmp_path / "codex"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [sys.executable, "-m", "rootcellar", "launch", *AT, "--run", "codex", "--", "exec", "--json", "hi"],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    words, environment = json.loads(done.stdout)
    assert words[-5:] == ["-m", "m", "exec", "--json", "hi"]
    assert 'model_providers.rootcellar.base_url="http://127.0.0.1:8/v1"' in words
    assert environment["ROOTCELLAR_API_KEY"] == "a b"


@pytest.mark.parametrize(("client", "words"), [("openai", "library"), ("aider", "not installed")])
def test_what_cannot_be_started_is_said(client, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", client, "--run"]) == 2
    assert words in capsys.readouterr().err

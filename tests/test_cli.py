"""The command line, over an engine that only records what it is asked."""

import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rootcellar
from rootcellar import cli
from rootcellar.errors import EngineError
from rootcellar.sim.workloads import workload

ROOT = Path(__file__).parents[1]


class EchoEngine:
    """Stands in for Engine: answers with the prompt in capitals, two characters at a time when streaming."""

    made: list["EchoEngine"]

    def __init__(self, **kwargs):
        self.kwargs, self.calls, self.closed = kwargs, [], False
        EchoEngine.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def generate(self, *, prompt=None, input_ids=None, sampling_params, stream=False):
        prompt = bytes(input_ids).decode() if prompt is None else prompt
        self.calls.append((prompt, sampling_params, stream))
        if prompt == "fail":
            raise EngineError("no answer today")
        if stream:
            text = prompt.upper()
            return ({"text": text[: i + 2], "meta_info": {}} for i in range(0, len(text), 2))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [{"text": p.upper(), "meta_info": {}} for p in prompts for _ in range(sampling_params.get("n", 1))]

    def chat_ids(self, messages):
        return list("|".join(f"{m['role'][0]}:{m['content']}" for m in messages).encode())


@pytest.fixture
def engine(monkeypatch):
    """Commands build an EchoEngine; the fixture is the list of those built."""
    EchoEngine.made = []
    monkeypatch.setitem(vars(rootcellar), "Engine", EchoEngine)
    return EchoEngine.made


def test_generate_streams_the_text_and_passes_only_what_was_written(engine, capsys):
    assert cli.main(["generate", "--prompt", "hello", "--page-size", "4", "--temperature", "0", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == "HELLO\n"
    assert engine[0].kwargs == {"page_size": 4}
    assert engine[0].calls == [("hello", {"temperature": 0.0, "ignore_eos": True}, True)]
    assert engine[0].closed


def test_generate_computes_several_prompts_in_one_call(engine, capsys):
    assert cli.main(["generate", "--prompt", "a", "--prompt", "b", "--disable-radix-cache"]) == 0
    assert capsys.readouterr().out == "--- 1 of 2\nA\n\n--- 2 of 2\nB\n"
    assert [call[0] for call in engine[0].calls] == [["a", "b"]]
    assert engine[0].kwargs == {"disable_radix_cache": True}


def test_generate_prints_every_one_of_n_answers(engine, capsys):
    assert cli.main(["generate", "--prompt", "a", "--n", "3", "--json"]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["A", "A", "A"]


def test_generate_prints_one_line_of_json(engine, capsys):
    assert cli.main(["generate", "--prompt", "ab cd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "AB CD", "meta_info": {}}


def test_generate_reads_the_prompt_from_standard_input(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert cli.main(["generate"]) == 0
    assert capsys.readouterr().out == "TWO\nLINES\n"


def test_a_chat_is_one_conversation(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n\ny\n"))
    assert cli.main(["generate", "--chat", "--system", "s"]) == 0
    assert [call[0] for call in engine[0].calls] == ["s:s|u:x", "s:s|u:x|a:S:S|U:X|u:y"]
    assert capsys.readouterr().out.startswith("S:S|U:X\n")


def test_lists_and_negated_switches(engine):
    words = ["--stop", "END", "STOP", "--stop", "x", "--stop-token-ids", "1", "2", "--no-skip-special-tokens"]
    assert cli.main(["generate", "--prompt", "p", *words]) == 0
    assert engine[0].calls[0][1] == {
        "stop": ["END", "STOP", "x"],
        "stop_token_ids": [1, 2],
        "skip_special_tokens": False,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--page-size", "0"], "page_size=0 is not allowed"),
        (["--page-size", "many"], "page_size='many' is not allowed: it must be an integer"),
        (["--top-p", "nan"], "top_p=nan is not allowed"),
        (["--schedule-policy", "fcsf"], "Did you mean 'fcfs'?"),
        (["--system", "be brief"], "add --chat"),
        (["--chat", "--prompt", "p", "--n", "2"], "n must be 1 in a chat"),
        (["--prompt", "fail"], "no answer today"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(engine, capsys, words, said):
    assert cli.main(["generate", *words]) == cli.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert err.startswith("rootcellar: ")
    assert said in err
    assert err.count("\n") == 1
    assert all(built.closed for built in engine)


def test_an_interruption_is_quiet(engine, monkeypatch, capsys):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(EchoEngine, "generate", interrupt)
    assert cli.main(["generate", "--prompt", "p"]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr().err == ""
    assert engine[0].closed


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == cli.EXIT_MISTAKE
    assert "COMMAND" in capsys.readouterr().err


def test_help_lists_every_command_and_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    page = capsys.readouterr().out
    assert "--max-total-tokens N" in page
    assert "[default: 512]" in page
    assert "--min-p X" in page


WRITTEN = [
    (path.name, line)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for line in re.findall(r"^\.venv/bin/rootcellar .*$", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(("page", "line"), WRITTEN, ids=[f"{page}-{i}" for i, (page, _) in enumerate(WRITTEN)])
def test_every_command_that_is_written_down_is_understood(page, line):
    command, *words = shlex.split(line, comments=True)[1:]
    if "--help" in words:
        return
    module = importlib.import_module(f"rootcellar.commands.{command}")
    args = cli._parser(command, module).parse_args([command, *words])
    if command == "replay":  # the trace is there, and the figure can be drawn
        assert all(workload(trace.removeprefix("generated:")) for trace in args.trace)
        assert args.figure.suffix == ".html"


def test_the_readme_leads_to_files_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert (ROOT / "docs" / "figures" / "page.png").stat().st_size < 150_000


def test_it_runs_as_a_module_and_tells_its_version():
    for words in (["-m", "rootcellar", "--version"], ["-m", "rootcellar.cli", "--version"]):
        shown = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout
        assert shown == f"rootcellar {rootcellar.__version__}\n"


def test_the_version_needs_no_jax():
    code = "import sys; from rootcellar import cli; cli.main(['version']); sys.exit('jax' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.startswith(f"rootcellar {rootcellar.__version__}\njax ")


@pytest.mark.parametrize("command", ["bench", "replay", "plan"])
def test_commands_of_other_rooms_join_the_parser(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out

"""The documentation as a site: every page is in it once, its links lead somewhere, and what it lists is up to date."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rootcellar.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
sys.path.insert(0, str(ROOT / "scripts"))

from write_llms import llms_txt, pages  # noqa: E402


def anchors(text):
    """What the headings of a page are called."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", each.lower()).strip()) for each in headings}


def test_every_page_is_in_the_site_once():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(file for file, _ in pages(nav)) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page if not file else (page.parent / file).resolve()
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_the_list_for_language_models_is_up_to_date():
    assert (DOCS / "llms.txt").read_text(encoding="utf-8") == llms_txt(), "make docs writes it again"


@pytest.mark.parametrize("name", ["index.md", "rl.md"])
def test_python_of_the_guides_runs(name):
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.M | re.S):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr


def commands():
    """Every command of every page, as (page, words); what a shell would not give to the program is left out."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                inner = re.sub(r'^eval "\$\((.*)\)".*', r"\1", line)
                words = shlex.split(inner, comments=True)
                if words:
                    yield page.name, words


def said(each):
    """What a command is called in a list of tests."""
    return each if isinstance(each, str) else " ".join(each)[:60]


ROOTCELLAR = [(page, words[1:]) for page, words in commands() if Path(words[0]).name == "rootcellar"]
OWN = [
    (page, words)
    for page, words in commands()
    if any(word.startswith(("benchmarks/", "examples/", "deploy/")) and "=" not in word for word in words[:2])
]


@pytest.mark.parametrize(("page", "words"), ROOTCELLAR, ids=said)
def test_the_program_knows_every_command_of_every_page(page, words, monkeypatch, capsys):
    """What plans and tells is run, what serves is understood; ``tests/server/test_docs.py`` runs the `curl` lines."""
    module = importlib.import_module(f"rootcellar.commands.{words[0]}")
    does = module.run if words[0] in ("plan", "launch") and "path/to/config.json" not in words else None
    if does is not None and "--run" not in words:
        assert main(words) == 0
        assert capsys.readouterr().out
    else:
        asked = []
        monkeypatch.setattr(module, "run", lambda args: asked.append(args) or 0)
        assert main(words) == 0
        assert asked


@pytest.mark.parametrize(("page", "words"), OWN, ids=said)
def test_every_script_that_a_page_names_is_there_with_its_options(page, words):
    script = next(ROOT / word for word in words[:2] if "/" in word and not word.startswith("."))
    text = script.read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert option in text, f"{script.name} has no {option}"


def test_make_knows_every_target_of_every_page():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    asked = {words[1] for _, words in commands() if words[0] == "make"}
    assert asked
    assert asked <= targets

"""The documentation as a site: every page is in it once, its links lead somewhere, and what it lists is up to date."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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

"""The pictures of docs/: drawn by the script beside them, of things that are there."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import draw_figures  # noqa: E402

SOURCES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "src" / "rootcellar").rglob("*.py"))]


@pytest.mark.parametrize("name", sorted(draw_figures.PICTURES))
def test_a_picture_is_what_its_script_draws(name):
    kept = (draw_figures.FIGURES / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == draw_figures.PICTURES[name]().svg(), "run scripts/draw_figures.py"


@pytest.mark.parametrize("name", sorted(draw_figures.PICTURES))
def test_each_name_in_a_picture_is_one_of_the_code(name):
    words = {word for text in SOURCES for word in re.findall(r"[A-Za-z_]\w*", text)}
    names = draw_figures.PICTURES[name]().names
    assert names
    assert not names - words

"""Write docs/llms.txt, a list of the documentation's pages for language models (https://llmstxt.org)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def pages(nav: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(file, section) of each page, in the order of ``nav``; pages of the top have the section ``""``."""
    for entry in nav:
        for name, value in entry.items():
            if isinstance(value, str):
                yield value, ""
            else:
                yield from ((file, section or name) for file, section in pages(value))


def told(text: str) -> tuple[str, str]:
    """The title of a page, and its first sentence without links and marks."""
    title = text.partition("\n")[0].removeprefix("# ").strip()
    paragraph = next(part for part in text.split("\n\n")[1:] if re.match(r"\w|[*[]|`(?!``)", part))
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
    return title, re.split(r"(?<=[a-z0-9`)])[.:](?=\s|$)", plain, maxsplit=1)[0]


def llms_txt() -> str:
    """The whole file."""
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    lines = [f"# {project['site_name']}", "", f"> {project['site_description']}"]
    section = None
    for file, name in pages(project["nav"]):
        if name != section:
            section = name
            lines += ["", f"## {name or 'Start'}", ""]
        title, sentence = told((ROOT / "docs" / file).read_text(encoding="utf-8"))
        path = "./" if file == "index.md" else file.removesuffix(".md") + "/"
        lines.append(f"- [{title}]({path}): {sentence}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "llms.txt").write_text(llms_txt(), encoding="utf-8")

"""Draws the pictures of docs/architecture.md: docs/figures/request.svg and docs/figures/bytes.svg.

    .venv/bin/python scripts/draw_figures.py

The same bytes each time. Text between backquotes is code: a test sees to it that each such name exists in the sources.
Colours follow the reader's light or dark scheme; each picture has its own background, so it can be read on any page.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "docs" / "figures"

# By room: what decides, computes, moves and speaks, and the engine that wires them; light and dark.
COLORS = {
    "decide": ("#2f6fb3", "#7db7f0"),
    "compute": ("#c2571a", "#f2a56b"),
    "move": ("#2c7d4f", "#72cf9a"),
    "speak": ("#8a3f9e", "#d79be6"),
    "wire": ("#5b6470", "#a9b4c0"),
}
STYLE = """
text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
.code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.head, .head .code { font-weight: 600; font-size: 14px; }
.head .code { font-size: 13px; }
.inverse { fill: #ffffff; }
.note { fill: #59636e; font-size: 12px; }
.card { fill: #ffffff; stroke: #d1d9e0; }
.lane { fill: #f6f8fa; stroke: none; }
.way { fill: none; stroke: #59636e; stroke-width: 1.6; }
.tip { fill: #59636e; }
.plain { fill: #ffffff; stroke: #afb8c1; }
.none { fill: url(#hatch); stroke: #afb8c1; }
.line { stroke: #afb8c1; stroke-width: 1; stroke-dasharray: 4 3; fill: none; }
"""
DARK = """
.inverse { fill: #0d1117; }
text { fill: #e6edf3; } .note { fill: #9198a1; } .card { fill: #0d1117; stroke: #3d444d; } .lane { fill: #151b23; }
.way { stroke: #9198a1; } .tip { fill: #9198a1; } .plain { fill: #0d1117; stroke: #59636e; } .none { stroke: #59636e; }
.line { stroke: #59636e; }
"""


class Picture:
    """Elements of one SVG, in the order in which they are drawn."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.size = width, height
        self.words = title, description
        self.parts: list[str] = []
        self.names: set[str] = set()

    def rect(self, x: float, y: float, w: float, h: float, kind: str, radius: float = 6) -> None:
        """A rectangle with round corners, of a class of ``STYLE``."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" class="{kind}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """One line; what is between backquotes is code."""
        pieces = []
        for i, piece in enumerate(text.split("`")):
            if i % 2:
                self.names.update(re.findall(r"[A-Za-z_]\w*", piece))
                pieces.append(f'<tspan class="code">{escape(piece)}</tspan>')
            else:
                pieces.append(escape(piece))
        style = f' class="{kind}"' if kind else ""
        place = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{style}{place} xml:space="preserve">{"".join(pieces)}</text>')

    def box(self, x: float, y: float, w: float, room: str, *lines: str, head: str = "", h: float = 0) -> None:
        """A box in the colour of a room: a heading and lines of text."""
        n = len(lines) + bool(head)
        self.rect(x, y, w, h or 16 + 18 * n, f"box {room}")
        at = y + 22
        if head:
            self.text(x + 12, at, head, "head")
            at += 19
        for line in lines:
            self.text(x + 12, at, line)
            at += 18

    def way(self, *points: tuple[float, float], label: str = "", at: tuple[float, float] | None = None) -> None:
        """An arrow through these points, its corners rounded."""
        d = [f"M{points[0][0]:g} {points[0][1]:g}"]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            (ax, ay), (bx, by) = _toward(corner, before), _toward(corner, after)
            d.append(f"L{ax:g} {ay:g}Q{corner[0]:g} {corner[1]:g} {bx:g} {by:g}")
        (px, py), (x, y) = points[-2], points[-1]
        ux, uy = _unit(px, py, x, y)
        d.append(f"L{x - 5 * ux:g} {y - 5 * uy:g}")
        self.parts.append(f'<path d="{"".join(d)}" class="way"/>')
        left, right = (x - 9 * ux - 4.5 * uy, y - 9 * uy + 4.5 * ux), (x - 9 * ux + 4.5 * uy, y - 9 * uy - 4.5 * ux)
        self.parts.append(f'<path d="M{x:g} {y:g}L{left[0]:g} {left[1]:g}L{right[0]:g} {right[1]:g}Z" class="tip"/>')
        if label:
            assert at is not None
            self.text(*at, label, "note")

    def both(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        """A line with a tip at each end."""
        ux, uy = _unit(*start, *stop)
        a, b = (start[0] + 4 * ux, start[1] + 4 * uy), (stop[0] - 4 * ux, stop[1] - 4 * uy)
        self.way(b, start)
        self.way(a, stop)

    def upward(self, x: float, y: float, text: str) -> None:
        """A line of text from below to above, its middle at (x, y)."""
        self.text(x, y, text, "", "middle")
        self.parts[-1] = self.parts[-1].replace("<text ", f'<text transform="rotate(-90 {x:g} {y:g})" ', 1)

    def dashes(self, *points: tuple[float, float]) -> None:
        """A broken line through these points: the same thing, seen elsewhere."""
        d = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{d}" class="line"/>')

    def svg(self) -> str:
        """The whole file."""
        (w, h), (title, description) = self.size, self.words
        light = "".join(f".{room} {{ stroke: {color}; fill: {color}; }}" for room, (color, _) in COLORS.items())
        dark = "".join(f".{room} {{ stroke: {color}; fill: {color}; }}" for room, (_, color) in COLORS.items())
        box = ".box { fill-opacity: 0.09; stroke-width: 1.4; } .full { fill-opacity: 0.85; stroke-width: 1; }"
        half = " .half { fill-opacity: 0.22; stroke-width: 1; }"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
            'aria-labelledby="t d">\n'
            f'<title id="t">{escape(title)}</title>\n<desc id="d">{escape(description)}</desc>\n'
            f"<style>{STYLE}{light} {box}{half}\n@media (prefers-color-scheme: dark) {{{DARK}{dark}}}\n</style>\n"
            '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><path d="M0 0V6" stroke="#8c959f" stroke-width="2"/></pattern></defs>\n'
            f'<rect x="0.5" y="0.5" width="{w - 1}" height="{h - 1}" rx="10" class="card"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def _unit(x: float, y: float, to_x: float, to_y: float) -> tuple[float, float]:
    length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
    return (to_x - x) / length, (to_y - y) / length


def _toward(corner: tuple[float, float], other: tuple[float, float], by: float = 8) -> tuple[float, float]:
    ux, uy = _unit(*corner, *other)
    return corner[0] + by * ux, corner[1] + by * uy


def request() -> Picture:
    """A request's way through the threads."""
    p = Picture(
        1000,
        744,
        "A request's way",
        "Left, the caller's thread: a prompt is read and becomes a Submit command; outputs come back through a mailbox "
        "and are rendered. Middle, the engine's thread: it carries out commands between steps; each step learns, "
        "plans, dispatches, runs and takes, and the cache is asked or told each time. Right: the mover copies pages "
        "between tiers, and the device runs the compiled step over the pools. Below, the stages that a request goes "
        "through.",
    )
    for x, w, whose in (
        (16, 236, "caller's thread or event loop"),
        (264, 482, "engine's thread: a `Loop` drives a `Machine`"),
        (758, 226, "beside it"),
    ):
        p.rect(x, 16, w, 612, "lane", 8)
        p.text(x + 12, 40, whose, "head")
    _steps(p)
    _there_and_back(p)
    _movers_and_device(p)
    _stages(p)
    return p


def _there_and_back(p: Picture) -> None:
    p.box(28, 56, 212, "speak", "or an HTTP request: `server/`", head="`Engine.generate`")
    p.way((134, 108), (134, 132))
    p.box(28, 132, 212, "wire", "ids, limits, namespace", head="`read_inputs`")
    p.way((134, 184), (134, 208))
    p.box(28, 208, 212, "wire", "a command; for each request", "a `Tracker` of its output", head="`Submit`")
    p.way((240, 242), (258, 242), (258, 82), (276, 82))
    p.way((288, 501), (240, 501))
    p.box(28, 466, 212, "wire", "the newest output of each;", "a slow reader holds up nobody", head="`Mailbox`")
    p.way((134, 537), (134, 561))
    p.box(28, 561, 212, "speak", "text, logprobs, times", head="`RequestOutput.render`")


def _steps(p: Picture) -> None:
    p.box(276, 56, 458, "wire", "carries out commands, in their order, between two steps", head="`Machine.do`")
    p.way((505, 108), (505, 132))
    p.rect(276, 132, 458, 416, "plain", 8)
    p.text(288, 154, "a step", "head")
    p.text(722, 154, "again and again, while there is work", "note", "end")
    p.rect(288, 166, 44, 286, "box decide")
    p.upward(315, 309, "`RadixCache`: tree, leases, page tables")
    for y, room, verb, *lines in (
        (166, "decide", "learn", "`Done`, `Failed`, `Found`, `Lost`:", "which leases are ready"),
        (
            232,
            "decide",
            "plan",
            "`match`, `open`, `grow`: a `Lease`",
            "for each request, and slots",
            "for each `Chunk` of the `Plan`",
        ),
        (316, "move", "dispatch", "the `moves` that the cache wants,", "before their slots are reused"),
        (382, "compute", "run", "`Batch.build`, `Runner.step`,", "`Runner.sample`; waits for nothing"),
        (
            464,
            "decide",
            "take",
            "`Scheduler.advance`: tokens are",
            "added; `commit`: whole pages are",
            "shared; `close`, where one ended",
        ),
    ):
        left = 288 if verb == "take" else 356
        p.rect(left, y, 722 - left, 20 + 18 * len(lines), f"box {room}")
        p.text(368, y + 24, verb, "head")
        for i, line in enumerate(lines):
            p.text(446, y + 23 + 18 * i, line)
    p.way((356, 194), (332, 194))
    p.both((332, 269), (356, 269))
    p.way((332, 344), (356, 344))
    p.way((332, 417), (356, 417))
    p.way((310, 464), (310, 452))
    p.way((505, 548), (505, 564))
    followed = "`Metrics`, `Timeline`, `History`, `StatsLogger`; `Sight` reads them"
    p.box(276, 564, 458, "wire", followed, head="`Recorder`")


def _movers_and_device(p: Picture) -> None:
    for i, (room, verb) in enumerate(
        (("decide", "decides"), ("compute", "computes"), ("move", "moves"), ("speak", "speaks"))
    ):
        x, y = 770 + 100 * (i % 2), 62 + 26 * (i // 2)
        p.rect(x, y, 16, 16, f"box {room}", 4)
        p.text(x + 24, y + 13, verb, "note")
    p.box(770, 166, 202, "move", "copies pages between tiers", head="`Mover`", h=206)
    for tier, x, y in (("DEVICE", 782, 236), ("HOST", 888, 236), ("PEER", 782, 316), ("STORAGE", 888, 316)):
        p.rect(x, y, 72, 30, "half move", 15)
        p.text(x + 36, y + 19, f"`{tier}`", "", "middle")
    p.both((854, 251), (888, 251))
    p.both((924, 266), (924, 316))
    p.way((818, 316), (818, 266))
    p.way((770, 194), (722, 194))
    p.way((722, 344), (770, 344))
    lines = ("`Programs.step` on donated", "`Pool.buffers`: keys and", "values are written in place;")
    lines += ("tokens are chosen there; the", "next step may run while", "they are taken")
    p.box(770, 382, 202, "compute", *lines, head="the device", h=156)
    p.way((722, 410), (770, 410))
    p.way((770, 501), (722, 501))


def _stages(p: Picture) -> None:
    stages = ("TOKENIZE", "PREFILL_WAITING", "LOADING", "PREFILL_CHUNKED_FORWARD", "PREFILL_FORWARD", "DECODE_LOOP")
    p.text(28, 658, "stages", "head")
    middles, x = [], 28.0
    for stage in (*stages, "FINISHED"):
        if middles:
            p.way((x - 17, 684), (x, 684))
        w = 7.25 * len(stage) + 18
        p.rect(x, 670, w, 28, "box decide", 14)
        middles.append(x + w / 2)
        p.text(middles[-1], 688, f"`{stage}`", "", "middle")
        x += w + 17
    p.way((middles[5], 698), (middles[5], 716), (middles[1], 716), (middles[1], 698))
    p.text(
        (middles[1] + middles[5]) / 2, 732, "retracted: it waits again, with the tokens that it has", "note", "middle"
    )


TOKEN = 6  # the one that is followed
OWNED = (5, 7, 2)  # the request's pages, in order
FOLLOWED = OWNED[TOKEN // 4]
PAGE_LEFT, PAGE_STEP = 40, 49
MIDDLE = PAGE_LEFT + PAGE_STEP * FOLLOWED + 23  # of the followed page


def page_bytes() -> Picture:
    """Where the bytes of a token are."""
    p = Picture(
        1000,
        664,
        "A page's bytes",
        "A request's tokens are cut into pages; its row of the page table says which page of the pool each is. A pool "
        "has a buffer for each layer, and a page is the same index in all of them; page 0 is for padding. In one layer "
        "a page of keys and values by head has four axes: keys or values, head, token, element. Away from the device "
        "a page is one block of bytes, its image: layer after layer.",
    )
    _tokens(p)
    _pool(p)
    _layer(p)
    _image(p)
    return p


def _tokens(p: Picture) -> None:
    p.text(28, 40, "a request's tokens", "head")
    for i in range(12):
        x = 28 + 34 * i + 10 * (i // 4)
        room = "compute" if OWNED[i // 4] == FOLLOWED else "decide"
        p.rect(x, 52, 32, 26, "none" if i > 9 else f"full {room}" if i == TOKEN else f"half {room}", 4)
        if i < 10:
            p.text(x + 16, 69, str(i), "code inverse" if i == TOKEN else "code", "middle")
    p.text(486, 60, "in pages of `page_size` tokens, here 4; the two", "note")
    p.text(486, 77, "that are hatched are slots that `grow` gave for what comes", "note")
    for i, number in enumerate(OWNED):
        x = 28 + 146 * i
        p.way((x + 67, 80), (x + 67, 112))
        p.rect(x, 112, 134, 26, "half compute" if number == FOLLOWED else "half decide", 4)
        p.text(x + 67, 129, f"page {number}", "code", "middle")
    p.text(486, 120, "its row of the page table, `ReqToTokenPool`:", "note")
    p.text(486, 137, "there is one table for each `Kind` of layers", "note")


def _pool(p: Picture) -> None:
    p.rect(16, 168, 434, 336, "lane", 8)
    p.text(28, 194, "a `Pool`: `buffers`, one for each layer", "head")
    for layer in range(3):
        y = 242 + 84 * layer
        p.text(PAGE_LEFT, y - 8, f"layer {layer}", "note")
        for n in range(8):
            x = PAGE_LEFT + PAGE_STEP * n
            kind = "half compute" if n == FOLLOWED else "half decide" if n in OWNED else "plain" if n else "none"
            p.rect(x, y, PAGE_STEP - 3, 40, kind, 3)
            if n:
                p.text(x + 23, y + 25, str(n), "code", "middle")
    p.way((241, 138), (241, 154), (MIDDLE, 154), (MIDDLE, 242))
    p.dashes((MIDDLE, 282), (MIDDLE, 326))
    p.dashes((MIDDLE, 366), (MIDDLE, 410))
    p.dashes((MIDDLE, 450), (MIDDLE, 562))
    p.text(40, 474, "a page is one index in all layers;", "note")
    p.text(40, 491, "page 0 takes padding, and is nobody's", "note")


def _layer(p: Picture) -> None:
    p.rect(474, 168, 510, 336, "lane", 8)
    p.text(486, 194, f"page {FOLLOWED} of one layer, as its `Layout` has it", "head")
    p.text(486, 215, "here `PagedHeads`, `[2, kv_heads, page_size, head_dim]`", "note")
    p.dashes((MIDDLE + 23, 242), (474, 176))
    p.dashes((MIDDLE + 23, 282), (474, 496))
    for half, word in enumerate(("keys", "values")):
        left = 552 + 220 * half
        p.text(left + 99, 250, word, "note", "middle")
        for head in range(2):
            top = 260 + 106 * head
            if not half:
                p.text(542, top + 48, f"head {head}", "note", "end")
            for row in range(4):
                for cell in range(8):
                    kind = "full compute" if row == TOKEN % 4 else "half compute"
                    p.rect(left + 25 * cell, top + 22 * row, 23, 20, kind, 2)
    p.text(486, 488, f"token {TOKEN} has `2 * kv_heads * head_dim` elements in each layer", "note")


def _image(p: Picture) -> None:
    p.text(28, 542, "its image, away from the device", "head")
    for layer in range(3):
        for half, word in enumerate(("keys", "values")):
            x = 28 + 240 * layer + 114 * half
            p.rect(x, 562, 112, 34, "half move", 3)
            p.text(x + 56, 583, f"layer {layer}, {word}", "note", "middle")
    p.rect(748, 562, 224, 34, "half move", 3)
    p.text(860, 583, "and so on", "note", "middle")
    held = "one block of bytes, whatever the backend and however many devices share the heads: what `HOST`, `STORAGE`"
    p.text(28, 622, held, "note")
    p.text(28, 640, "and `PEER` hold, copied between them as it is", "note")


PICTURES = {"request": request, "bytes": page_bytes}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")

"""The miss-ratio curve of a replay: one line per policy, capacity in tokens and, given a model, in GB."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

from rootcellar.sim.replay import Outcome

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 80
COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#997700", "#555555")
OPTIMAL = "#000000"


def curves(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[int, float]]]:
    """By policy, ``(capacity in tokens, miss ratio 0 to 1)`` in order of capacity."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for outcome in outcomes:
        lines.setdefault(outcome.policy, []).append((outcome.capacity_tokens, 1 - outcome.hit_rate))
    return {policy: sorted(points) for policy, points in lines.items()}


def short(tokens: float) -> str:
    """A number of tokens as people write it: 512, 64k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def _colors(policies: Sequence[str]) -> dict[str, str]:
    fixed = [policy for policy in policies if policy != "optimal"]
    return {policy: COLORS[i % len(COLORS)] for i, policy in enumerate(fixed)} | {"optimal": OPTIMAL}


def to_html(outcomes: Sequence[Outcome], title: str, token_bytes: float | None = None) -> str:
    """A page of its own with the curve as SVG and the numbers as a table; nothing is loaded from anywhere."""
    rows = "".join(
        f"<tr><td>{escape(o.policy)}</td><td>{o.capacity_tokens:,}</td>"
        + (f"<td>{o.capacity_tokens * token_bytes / 1e9:.2f}</td>" if token_bytes else "")
        + f"<td>{o.page_size}</td><td>{100 * o.hit_rate:.2f} %</td><td>{o.evicted_tokens:,}</td></tr>"
        for o in outcomes
    )
    gigabytes = "<th>GB</th>" if token_bytes else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:15px sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child{text-align:left}</style>"
        f"<h1>{escape(title)}</h1>{to_svg(outcomes, token_bytes)}<table><tr><th>policy</th><th>capacity (tokens)</th>"
        f"{gigabytes}<th>page</th><th>hit rate</th><th>evicted tokens</th></tr>{rows}</table></html>\n"
    )


def to_svg(outcomes: Sequence[Outcome], token_bytes: float | None = None) -> str:
    """The curve as an SVG element: capacity on a logarithmic axis, miss ratio from 0 to 1."""
    lines = curves(outcomes)
    ticks = sorted({capacity for points in lines.values() for capacity, _ in points})
    low, high = log10(max(1, ticks[0])), log10(max(2, ticks[-1]))
    span = max(high - low, 0.1)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    floor = min(0.9, *(miss for points in lines.values() for _, miss in points)) // 0.1 * 0.1

    def x(capacity: float) -> float:
        return LEFT + width * (log10(max(1, capacity)) - low) / span

    def y(miss: float) -> float:
        return TOP + height * (1 - miss) / (1 - floor)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for step in range(round(floor * 10), 11):
        at = y(step / 10)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{step * 10} %</text>')
    for capacity in ticks:
        gigabytes = _gigabytes(capacity * token_bytes) if token_bytes else ""
        for line, text in enumerate((short(capacity), gigabytes)):
            at = TOP + height + 20 + 17 * line
            parts.append(f'<text x="{x(capacity):.1f}" y="{at}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 14}" text-anchor="middle">capacity (tokens)</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 14}">miss ratio (tokens computed / tokens asked for)</text>')
    colors = _colors(list(lines))
    for i, (policy, points) in enumerate(lines.items()):
        dashes = ' stroke-dasharray="6 4"' if policy == "optimal" else ""
        path = " ".join(f"{x(capacity):.1f},{y(miss):.1f}" for capacity, miss in points)
        style = f'stroke="{colors[policy]}"'
        parts.append(f'<polyline points="{path}" fill="none" {style} stroke-width="2"{dashes}/>')
        parts += [f'<circle cx="{x(c):.1f}" cy="{y(m):.1f}" r="3" fill="{colors[policy]}"/>' for c, m in points]
        at, left = TOP + 20 * i, WIDTH - RIGHT + 20
        parts.append(f'<line x1="{left}" x2="{left + 25}" y1="{at}" y2="{at}" {style} stroke-width="2"{dashes}/>')
        parts.append(f'<text x="{left + 32}" y="{at + 4}">{escape(policy)}</text>')
    return "".join([*parts, "</svg>"])


def to_png(outcomes: Sequence[Outcome], title: str, path: str, token_bytes: float | None = None) -> None:
    """The same curve through matplotlib. Raises ``ImportError`` when it is not installed."""
    from matplotlib.figure import Figure  # an optional dependency, slow to load

    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.subplots()
    lines = curves(outcomes)
    colors = _colors(list(lines))
    for policy, points in lines.items():
        style = "--" if policy == "optimal" else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colors[policy], label=policy)
    axes.set(xscale="log", xlabel="capacity (tokens)", ylabel="miss ratio", title=title)
    ticks = sorted({capacity for points in lines.values() for capacity, _ in points})
    axes.set_xticks(ticks, [short(capacity) for capacity in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    if token_bytes:
        second = axes.secondary_xaxis("top")
        second.set_xticks(ticks, [f"{capacity * token_bytes / 1e9:.3g}" for capacity in ticks])
        second.set_xlabel("GB")
    figure.savefig(path)


def _gigabytes(nbytes: float) -> str:
    """At least three digits, never an exponent: ``36.9 GB``, ``1,843 GB``."""
    value = nbytes / 1e9
    return f"{value:,.0f} GB" if value >= 1000 else f"{value:.3g} GB"

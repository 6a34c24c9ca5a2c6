"""The comparison as an SVG picture: bars of medians, whiskers from low to high."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from results import Figures, Results, Spread

LABELS, BARS, VALUES = 330, 380, 130
ROW, TITLE, GAP = 22, 44, 26
OURS, THEIRS, INK = "#2b6cb0", "#a0aec0", "#1a202c"


@dataclass(frozen=True)
class Panel:
    """One measure."""

    title: str
    value: Callable[[Figures], Spread | None]
    digits: int = 2


def _seeing(figures: Figures) -> Spread | None:
    encode, project = figures.encode, figures.project
    if encode is None or project is None:
        return encode
    return Spread(
        encode.median + project.median, encode.low + project.low, encode.high + project.high
    )


PANELS: Sequence[Panel] = (
    Panel("Picture, prompt of 200 and answer, seconds (less is better)", lambda f: f.total, 1),
    Panel("Decode, tokens a second (more is better)", lambda f: f.tokens_per_second, 1),
    Panel("Prefill of 200 tokens, seconds (less is better)", lambda f: f.prefill),
    Panel("Encode and project, seconds (less is better)", _seeing),
)


def svg(results: Results, heading: str) -> str:
    """A panel for each measure; an engine without it has no bar there."""
    rows, y = [], 30.0
    rows.append(_text(12, y, heading, "start", 15, bold=True))
    for panel in PANELS:
        bars = [
            (figures, spread)
            for figures in results.all_figures()
            if (spread := panel.value(figures)) is not None
        ]
        if not bars:
            continue
        y += TITLE
        rows.append(_text(12, y, panel.title, "start", 13, bold=True))
        y += 10
        longest = max(spread.high for _, spread in bars)
        for figures, spread in bars:
            rows += _bar(figures, spread, y, BARS / longest, panel.digits)
            y += ROW
    width, height = LABELS + BARS + VALUES, y + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
        f'width="{width}" height="{height:.0f}" font-family="sans-serif" fill="{INK}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


def _bar(figures: Figures, spread: Spread, y: float, scale: float, digits: int) -> list[str]:
    color = OURS if figures.subject.name.startswith("ours-") else THEIRS
    low, high = (LABELS + value * scale for value in (spread.low, spread.high))
    middle, text_y = y + ROW / 2, y + ROW / 2 + 4
    return [
        _text(LABELS - 8, text_y, figures.subject.title, "end", 11),
        f'<rect x="{LABELS}" y="{y + 4:.1f}" width="{spread.median * scale:.1f}" '
        f'height="{ROW - 8}" fill="{color}"/>',
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="{INK}"/>',
        _text(high + 6, text_y, f"{spread.median:.{digits}f}", "start", 11),
    ]


def _text(x: float, y: float, content: str, anchor: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>'
        f"{escape(content)}</text>"
    )

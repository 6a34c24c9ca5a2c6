"""The comparison as plain text: a Markdown table and the ratios of the best of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from results import MEASURES, Figures, Results, Spread

NONE = ""


def _seconds(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return NONE
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def _speed(figures: Figures) -> str:
    text = _seconds(figures.tokens_per_second, 1)
    short = figures.tokens is not None and figures.total is None
    return f"{text}, {figures.tokens} tokens" if short and text else text


def _percent(spread: Spread | None) -> str:
    return NONE if spread is None else f"{spread.median:.0%}"


def _megabytes(count: float | None) -> str:
    return NONE if count is None else f"{count / 1e6:,.0f}"


def _cosines(figures: Figures) -> str:
    found = figures.subject.cosine or {}
    return ", ".join(f"{value:.4f}" for value in found.values())


COLUMNS: Sequence[tuple[str, Callable[[Figures], str]]] = (
    ("engine", lambda f: f.subject.title),
    ("encode s", lambda f: _seconds(f.encode)),
    ("project s", lambda f: _seconds(f.project, 3)),
    ("prefill 200 s", lambda f: _seconds(f.prefill)),
    ("decode tok/s", _speed),
    ("of bandwidth", lambda f: _percent(f.share_of_bandwidth)),
    ("total s", lambda f: _seconds(f.total, 1)),
    ("whole s", lambda f: _seconds(f.whole, 1)),
    ("load s", lambda f: _seconds(f.load, 1)),
    ("peak MB", lambda f: _megabytes(f.peak_rss.median if f.peak_rss else None)),
    ("files MB", lambda f: _megabytes(f.subject.file_bytes)),
    ("cosine", _cosines),
)


def markdown(results: Results) -> str:
    """One row an engine; medians, lows and highs in brackets."""
    lines = [
        "| " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for figures in results.all_figures():
        lines.append("| " + " | ".join(cell(figures) for _, cell in COLUMNS) + " |")
    return "\n".join(lines)


def ratios(results: Results, name: str) -> str:
    """How many times faster ``name`` is than each other engine."""
    lines = [
        f"| {results.subjects[name].title} against | " + " | ".join(MEASURES) + " |",
        "|" + "---|" * (1 + len(MEASURES)),
    ]
    for other in results.subjects:
        found = [results.ratio(name, other, measure) for measure in MEASURES]
        if other != name and any(found):
            cells = [NONE if s is None else _seconds(s) + "x" for s in found]
            lines.append(f"| {results.subjects[other].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

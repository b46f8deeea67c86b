"""The table of `make bench`: a row for each figure, printed as soon as it is known, with what is aimed at beside it."""

from __future__ import annotations

import sys

from tests.bench.load import Figures, percentile

HEAD = "| what | p50 ms | p95 ms | rate, size or ratio | aim |\n|---|---|---|---|---|"


def row(what: str, p50: str = "", p95: str = "", figure: str = "", aim: str = "") -> None:
    print("| " + " | ".join((what, p50, p95, figure, aim)) + " |", flush=True)


def show(what: str, figures: Figures, figure: str = "", aim: str = "") -> Figures:
    """A row of times; ends the bench where something has failed."""
    row(
        what,
        f"{figures.p50_ms:.2f}",
        f"{figures.p95_ms:.2f}",
        figure or f"{figures.rate:.{0 if figures.rate > 10 else 1}f}/s",
        aim,
    )
    if figures.failed:
        sys.exit(f"{what}: {figures.failed} failed")
    return figures


def timed(taken: list[float]) -> Figures:
    """The figures of so many seconds each, one after the other."""
    taken = sorted(taken)
    return Figures(len(taken) / sum(taken), percentile(taken, 0.5) * 1000, percentile(taken, 0.95) * 1000, 0)


def at_most(limit: float, value: float, unit: str = "ms") -> str:
    return f"≤ {limit:g} {unit}: {'met' if value <= limit else 'missed'}"


def at_least(limit: float, value: float, unit: str = "times") -> str:
    return f"≥ {limit:g} {unit}: {'met' if value >= limit else 'missed'}"


def times(what: str, faster: float, than: float, least: float = 0) -> None:
    """A row that says how many times faster one is than the other."""
    ratio = than / faster
    row(what, figure=f"{ratio:.1f} times", aim=at_least(least, ratio) if least else "")

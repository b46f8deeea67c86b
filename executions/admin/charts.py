"""Charts for Unfold's Chart.js, each made from a table that is shown beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from executions.costs import NANO

SERIES = ("--sg-chart-1", "--sg-chart-2", "--sg-chart-3", "--sg-chart-4")
CENTS_FROM = NANO // 20  # five ticks, a cent each
TICKS = {"color": "#7c7c88", "autoSkip": True, "maxRotation": 0}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by time, columns by series: `cells[row][column]`."""

    rows: list[Any]
    columns: list[str]
    cells: list[list[int]]

    @property
    def lines(self) -> list[tuple[Any, list[int], int]]:
        """(row, its cells, their sum), the newest first, without the empty ones."""
        found = [(row, cells, sum(cells)) for row, cells in zip(self.rows, self.cells, strict=True)]
        return [line for line in reversed(found) if line[2]]

    @property
    def total(self) -> int:
        return sum(map(sum, self.cells))


def table(rows: list[Any], found: Iterable[tuple[Any, str, int]], columns: Iterable[str] = ()) -> Table:
    """A table of what was found; columns in the order given, then by name."""
    values = {(row, column): value for row, column, value in found}
    names = list(dict.fromkeys([*columns, *sorted({column for _, column in values})]))
    return Table(rows, names, [[values.get((row, name), 0) for name in names] for row in rows])


def spend(data: Table) -> dict[str, str]:
    """Dollars a day, stacked by backend."""
    colours = [SERIES[n % len(SERIES)] for n in range(len(data.columns))]
    return _stacked(data, [f"{day:%b} {day.day}" for day in data.rows], colours, NANO, _dollars(data))


def _dollars(data: Table) -> dict[str, Any]:
    """How Intl.NumberFormat writes the axis and the hints: cents, or four digits that count where cents would be all zero."""
    cents = max(map(sum, data.cells), default=0) >= CENTS_FROM
    digits = {"minimumFractionDigits": 2, "maximumFractionDigits": 2} if cents else {"maximumSignificantDigits": 4}
    return {"style": "currency", "currency": "USD", "currencyDisplay": "narrowSymbol", "notation": "standard", **digits}


def runs(data: Table) -> dict[str, str]:
    """Runs an hour, stacked by how they ended."""
    return _stacked(
        data, [f"{hour:%H:%M}" for hour in data.rows], [f"--sg-{name.replace('_', '-')}" for name in data.columns], 1
    )


def _stacked(
    data: Table, labels: list[str], colours: list[str], unit: int, numbers: dict[str, Any] | None = None
) -> dict[str, str]:
    datasets = [
        {
            "label": name.replace("_", " "),
            "data": [cells[n] / unit if unit > 1 else cells[n] for cells in data.cells],
            "backgroundColor": f"var({colours[n]})",
            "maxBarThickness": 28,
        }
        for n, name in enumerate(data.columns)
    ]
    scale: dict[str, Any] = {"stacked": True, "border": {"display": False}}
    options = {
        "animation": False,
        "responsive": True,
        "maintainAspectRatio": False,
        "plugins": {
            "legend": {
                "display": True,
                "align": "end",
                "labels": {"boxWidth": 8, "boxHeight": 8, "color": TICKS["color"], "usePointStyle": True},
            }
        },
        "scales": {
            "x": {**scale, "grid": {"display": False}, "ticks": TICKS},
            "y": {
                **scale,
                "beginAtZero": True,
                "ticks": {**TICKS, "precision": None if unit > 1 else 0, "maxTicksLimit": 5, "format": numbers or {}},
            },
        },
    }
    return {"data": json.dumps({"labels": labels, "datasets": datasets}), "options": json.dumps(options)}

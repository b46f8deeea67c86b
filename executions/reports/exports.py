"""Cost lines as files: CSV, JSON, and FOCUS 1.2 with the columns of its specification."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from django.db.models import Sum

from executions.costs import NANO
from executions.reports.spend import KINDS, Line, Period
from executions.reports.totals import midnight

MEASURES = ("seconds", "cost_usd", "cost_nano_usd", "unpriced_seconds", "unpriced_charged_nano_usd")


def as_dict(line: Line, groups: Sequence[str]) -> dict[str, Any]:
    """A line as every door sends it. `cost_usd` is null where nothing in it had a known price."""
    shown = line.shown_nano_usd
    told: dict[str, Any] = dict(zip(groups, line.keys, strict=True))
    told |= {
        "seconds": _fixed(line.duration_us, 1_000_000),
        "cost_usd": None if shown is None else _fixed(shown, NANO),
        "cost_nano_usd": shown,
        "unpriced_seconds": _fixed(line.unpriced_us, 1_000_000),
        "unpriced_charged_nano_usd": line.unpriced_nano_usd,
    }
    if "kind" not in groups:
        told |= {f"{kind}_nano_usd": line.shown_of(kind) for kind in KINDS}
    return told


def as_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows with a head line; no cell is a formula to a spreadsheet, and what has no price says so."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([harmless(row[column]) for column in columns])
    return text.getvalue()


def harmless(cell: Any) -> Any:
    """A spreadsheet must not take a name for a formula; numbers are left as they are."""
    if cell is None:
        return ""
    if isinstance(cell, int | Decimal) and not isinstance(cell, bool):
        return f"{cell:f}" if isinstance(cell, Decimal) else cell
    text = cell.isoformat() if isinstance(cell, date) else str(cell)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def plain(value: Any) -> Any:
    """For json.dumps: exact decimals as text, days and moments in ISO 8601."""
    return f"{value:f}" if isinstance(value, Decimal) else value.isoformat() if isinstance(value, date) else str(value)


def csv_of(found: Iterable[Line], groups: Sequence[str]) -> str:
    columns = [*groups, *MEASURES, *(() if "kind" in groups else (f"{kind}_nano_usd" for kind in KINDS))]
    rows = ({**as_dict(line, groups)} for line in found)
    return as_csv(
        ({**row, "cost_usd": "unpriced" if row["cost_usd"] is None else row["cost_usd"]} for row in rows), columns
    )


def _fixed(amount: int, unit: int) -> Decimal:
    return Decimal(amount) / unit


# FOCUS


@cache
def focus_columns() -> dict[str, tuple[str, str, bool]]:
    """Name to (feature level, type, whether null is allowed), in the specification's order."""
    told = json.loads((Path(__file__).parent / "focus_1_2.json").read_text())
    return {name: (level, kind, nulls) for name, level, kind, nulls in told["columns"]}


OWN = ("x_AgentId", "x_AgentName", "x_Backend", "x_IsPriced", "x_Kind", "x_Language", "x_NanoUsd")
LEFT_OUT = (  # nothing here has such a thing: zones, reservations, commitments, a second currency, negotiated prices
    "AvailabilityZone", "Region", "CapacityReservation", "CommitmentDiscount", "PricingCurrency", "ContractedUnitPrice",
    "Resource", "BillingAccountType", "SubAccountType",
)  # fmt: skip
PROVIDERS = {"e2b": "E2B", "local": "Self-hosted"}  # by the first word of the alias


def focus_header() -> list[str]:
    return [name for name in focus_columns() if not name.startswith(LEFT_OUT)] + list(OWN)


def focus_rows(period: Period) -> list[dict[str, Any]]:
    """A row for each day, agent, backend, kind, language and size; BilledCost adds up to what the ledger has spent.

    A charge without a known price is billed at the ceiling rate, as the ledger does; its unit price is null.
    """
    found = (
        period.totals()
        .order_by("day", "team_id", "agent_id", "backend", "kind", "language", "cpu_count", "memory_mib", "is_priced")
        .values_list(
            "day", "team_id", "team__name", "team__time_zone", "agent_id", "agent__name", "backend", "kind", "language",
            "cpu_count", "memory_mib", "is_priced",
        )
        .annotate(us=Sum("duration_us"), nano=Sum("cost_nano_usd"))
    )  # fmt: skip
    return [_focus(*row) for row in found]


def _focus(
    day: date, team: str, team_name: str, zone: str, agent: str, agent_name: str, backend: str, kind: str, language: str,
    cpu_count: int, memory_mib: int, is_priced: bool, us: int, nano_usd: int,
) -> dict[str, Any]:  # fmt: skip
    cost, seconds = _fixed(nano_usd, NANO), _fixed(us, 1_000_000)
    month = day.replace(day=1)
    provider = PROVIDERS.get(backend.split("-")[0].split("_")[0], backend)
    size = f"{cpu_count} vCPU, {memory_mib} MiB"
    return {
        "BilledCost": cost,
        "BillingAccountId": backend,
        "BillingAccountName": backend,
        "BillingCurrency": "USD",
        "BillingPeriodEnd": midnight((month + timedelta(days=31)).replace(day=1), zone),
        "BillingPeriodStart": midnight(month, zone),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{kind} time of sandboxes with {size} on {backend}" + (f", {language}" * bool(language)),
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": midnight(day + timedelta(days=1), zone),
        "ChargePeriodStart": midnight(day, zone),
        "ConsumedQuantity": seconds,
        "ConsumedUnit": "Seconds",
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "InvoiceId": None,
        "InvoiceIssuerName": provider,
        "ListCost": cost,
        "ListUnitPrice": round(cost / seconds, 15).normalize() if is_priced and us else None,
        "PricingCategory": "Standard",
        "PricingQuantity": seconds,
        "PricingUnit": "Seconds",
        "ProviderName": provider,
        "PublisherName": provider,
        "ServiceCategory": "Compute",
        "ServiceName": "Code sandboxes",
        "ServiceSubcategory": "Serverless Compute",
        "SkuId": f"{backend}/{cpu_count}x{memory_mib}",
        "SkuMeter": "Sandbox time",
        "SkuPriceDetails": {"CoreCount": cpu_count, "MemorySize": f"{memory_mib} MiB"},
        "SkuPriceId": f"{backend}/{cpu_count}x{memory_mib}/second",
        "SubAccountId": team,
        "SubAccountName": team_name,
        "Tags": {"agent": agent_name, "kind": kind, "language": language},
        "x_AgentId": agent,
        "x_AgentName": agent_name,
        "x_Backend": backend,
        "x_IsPriced": is_priced,
        "x_Kind": kind,
        "x_Language": language,
        "x_NanoUsd": nano_usd,
    }


def focus_csv(period: Period) -> str:
    """FOCUS 1.2 as CSV: moments in ISO 8601 UTC, decimals with a point, an empty cell for null."""

    def cell(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if isinstance(value, dict):
            return json.dumps(value, sort_keys=True)
        return str(value).lower() if isinstance(value, bool) else value

    rows = ({name: cell(value) for name, value in row.items()} for row in focus_rows(period))
    return as_csv(rows, focus_header())

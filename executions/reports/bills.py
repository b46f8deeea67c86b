"""What the provider says beside what the ledger says: bills are imported, and the difference is told in dollars a day."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

from django.db import transaction
from django.db.models import Sum

from executions.costs import NANO
from executions.errors import Invalid
from executions.models import CostTotal, ProviderCharge, Sandbox, Team
from executions.reports.totals import HOUR, cut, utc_hour

MOST_BYTES = 20_000_000
DAYS = ("date", "day", "timestamp", "start", "start_time", "chargeperiodstart", "usage_date")
MONEY = ("cost", "usd", "amount", "cost_usd", "total", "billedcost", "price")
NAMES = ("sandbox", "sandbox_id", "sandboxid", "resourceid")

NAMED = ("e2b_id", "sandbox_id")  # in a handle: what its backend calls the sandbox

Charges = dict[tuple[date, str], int]


def import_bill(backend: str, source: str, content: bytes) -> int:
    """Keep a provider's bill; what it says of its days replaces what was known of them. Returns the days. Raises Invalid.

    CSV with a column for the day, one for the dollars and, where there is one, the sandbox; or the JSON of a meter with
    `sandboxes` that each have `sandboxID`, `began`, `ended` and `nano_usd`.
    """
    if len(content) > MOST_BYTES:
        raise Invalid(f"A bill of more than {MOST_BYTES // 1_000_000} MB: import it month by month.", field="file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Invalid("The file is not text in UTF-8.", field="file") from None
    charges = _of_meter(text) if text.lstrip().startswith("{") else _of_csv(text)
    if not charges:
        raise Invalid("There is no charge in the file.", field="file")
    days = {day for day, _ in charges}
    with transaction.atomic():
        ProviderCharge.objects.filter(backend=backend, day__in=days).delete()
        ProviderCharge.objects.bulk_create(
            ProviderCharge(backend=backend, day=day, sandbox=sandbox[:100], nano_usd=nano_usd, source=source[:200])
            for (day, sandbox), nano_usd in sorted(charges.items())
        )
    return len(days)


def _of_csv(text: str) -> Charges:
    reader = csv.DictReader(io.StringIO(text))
    columns = {(name or "").strip().lower().replace(" ", "_"): name for name in reader.fieldnames or []}
    day_column, money_column, name_column = (
        next((columns[name] for name in known if name in columns), None) for known in (DAYS, MONEY, NAMES)
    )
    if day_column is None or money_column is None:
        raise Invalid(
            f"Its columns are {', '.join(columns) or 'none'}: one must be the day ({', '.join(DAYS)}) "
            f"and one the dollars ({', '.join(MONEY)}).",
            field="file",
        )
    charges: Charges = defaultdict(int)
    for number, row in enumerate(reader, start=2):
        try:
            day = date.fromisoformat((row[day_column] or "").strip()[:10])
            nano_usd = Decimal((row[money_column] or "").strip().lstrip("$").replace(",", "")) * NANO
            charges[day, (row[name_column] or "").strip() if name_column else ""] += round(nano_usd)
        except (ValueError, InvalidOperation, OverflowError):
            raise Invalid(f"Line {number}: it needs a day such as 2026-11-24 and dollars.", field="file") from None
    return charges


def _of_meter(text: str) -> Charges:
    charges: Charges = defaultdict(int)
    try:
        for one in json.loads(text)["sandboxes"]:
            since = datetime.fromisoformat(one["began"])
            until = datetime.fromisoformat(one["ended"]) if one["ended"] else datetime.now(UTC)
            for start, _, _, part in cut(since, max(since, until), int(one["nano_usd"]), utc_hour, lambda h: h + HOUR):
                charges[start.date(), str(one["sandboxID"])] += part
    except (ValueError, KeyError, TypeError):
        raise Invalid(
            "The JSON is not that of a meter: sandboxes with began, ended and nano_usd.", field="file"
        ) from None
    return charges


@dataclass(frozen=True, slots=True)
class Day:
    """One UTC day on both sides; None where that side says nothing."""

    day: date
    ours_nano_usd: int
    theirs_nano_usd: int | None

    @property
    def difference_nano_usd(self) -> int | None:
        """What they bill beyond the ledger; negative where they bill less."""
        return None if self.theirs_nano_usd is None else self.theirs_nano_usd - self.ours_nano_usd


def reconcile(backend: str, first: date, last: date, team: Team | None = None) -> list[Day]:
    """Each UTC day of the period on which one of the two sides has something, the newest first.

    With a team, what the bill says of sandboxes that are its own: as far as it names them.
    """
    hours = CostTotal.objects.filter(grain=CostTotal.HOUR, by="", day__gte=first, day__lte=last, backend=backend)
    bills = ProviderCharge.objects.filter(backend=backend, day__gte=first, day__lte=last)
    if team is not None:
        hours, bills = hours.filter(team=team), bills.filter(sandbox__in=_names(backend, first, last, team))
    ours = dict(hours.order_by().values_list("day").annotate(nano=Sum("cost_nano_usd")))
    theirs = dict(bills.order_by().values_list("day").annotate(nano=Sum("nano_usd")))
    return [Day(day, ours.get(day, 0), theirs.get(day)) for day in sorted(ours.keys() | theirs.keys(), reverse=True)]


def _names(backend: str, first: date, last: date, team: Team | None = None) -> set[str]:
    """What the provider calls the sandboxes that were made here about that time."""
    since, until = first - timedelta(days=31), last + timedelta(days=1)
    ours = Sandbox.objects.filter(backend=backend, created_at__date__gte=since, created_at__date__lte=until)
    ours = ours.filter(team=team) if team is not None else ours
    handles = ours.filter(handle__isnull=False).values_list("handle", flat=True)
    return {name for handle in handles for key in NAMED if (name := (handle or {}).get(key))}


def strangers(backend: str, first: date, last: date) -> list[dict[str, Any]]:
    """Sandboxes on the provider's bill of which there is no row here, the dearest first: nobody here has made them."""
    bills = ProviderCharge.objects.filter(backend=backend, day__gte=first, day__lte=last).exclude(sandbox="")
    billed = dict(bills.order_by().values_list("sandbox").annotate(nano=Sum("nano_usd")))
    if not billed:
        return []
    known = _names(backend, first, last)
    found = [{"sandbox": name, "nano_usd": nano} for name, nano in billed.items() if name not in known]
    return sorted(found, key=lambda one: (-one["nano_usd"], one["sandbox"]))

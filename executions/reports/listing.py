"""What a provider lists now beside what is open here, and what the difference costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.utils import timezone

from executions import costs
from executions.backends.base import Listed
from executions.models import Sandbox, Team

SETTLED = timedelta(seconds=30)  # after which a list is sure to name what was made, and not to name what was ended


@dataclass(frozen=True, slots=True)
class Odd:
    """A sandbox that one of the two sides does not know."""

    sandbox: str  # ours where it is known, else the provider's
    is_listed: bool  # there, and not open here; else open here, and not there
    nano_usd: int | None  # what the provider bills, or what is held here for nothing; None where no rate is known


@dataclass(frozen=True, slots=True)
class Listing:
    """How many both sides know, and those that one does not."""

    both: int
    odd: list[Odd]

    @property
    def nano_usd(self) -> int:
        """What the provider bills for those that are not open here, so far."""
        return sum(one.nano_usd or 0 for one in self.odd if one.is_listed)


def compare(alias: str, listed: Iterable[Listed], asked_at: datetime, team: Team | None = None) -> Listing:
    """`listed` is what the backend answered when it was asked; with a team, as far as rows of that team tell."""
    theirs = {item.sandbox_id or _name(item): item for item in listed}
    rows = Sandbox.objects.filter(backend=alias)
    rows = rows.filter(team=team) if team is not None else rows
    known = {row.provider_name: row for row in rows.filter(pk__in=[name.replace("sbx", "sbx_", 1) for name in theirs])}
    open_here = rows.open().filter(handle__isnull=False, ready_at__lt=asked_at - SETTLED)
    odd = [
        Odd(row.pk, False, row.reserved_nano_usd if row.is_priced else None)
        for row in open_here.order_by("pk")
        if row.provider_name not in theirs
    ]
    both = 0
    for name, item in sorted(theirs.items()):
        row = known.get(name)
        if row is not None and (row.ended_at is None or row.ended_at > asked_at - SETTLED):
            both += 1
        elif row is not None or team is None:
            odd.append(Odd(row.pk if row else name, True, _so_far(item, row)))
    return Listing(both, odd)


def _name(item: Listed) -> str:
    return str(item.handle.get("e2b_id") or item.handle.get("sandbox_id") or "")


def _so_far(item: Listed, row: Sandbox | None) -> int | None:
    if row is None or not row.is_priced or not item.started_at:
        return None
    lived = timezone.now() - datetime.fromisoformat(item.started_at)
    return costs.cost(max(0, lived // timedelta(microseconds=1)), row.rate_nano_usd_per_second)

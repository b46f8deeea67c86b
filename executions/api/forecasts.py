"""What a month will cost, what the same time would cost elsewhere, and what the provider says beside the ledger."""

from __future__ import annotations

import json
from datetime import UTC, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from executions import backends
from executions.api.auth import caller_of
from executions.api.costs import BATCHES, QUERY, agent_of, day_of, period_of
from executions.api.operation import operation
from executions.costs import NANO
from executions.errors import Forbidden, Invalid
from executions.hop import rows
from executions.keys import Caller
from executions.reports import bills, exports, listing, spend, totals
from executions.states import Scope

BILL_DAYS = 90


@operation(
    "What this month will come to", gives={200: dict}, query={name: QUERY[name] for name in ("agent", "backend")}
)
async def forecast(request: HttpRequest) -> HttpResponse:
    """GET /costs/forecast: this month, if each coming day costs what the same weekday cost in the last seven."""
    return await rows(_forecast, request)


@operation(
    "The same time at other backends and plans",
    gives={200: dict},
    query={name: QUERY[name] for name in ("from", "to", "agent", "backend")},
)
async def what_if(request: HttpRequest) -> HttpResponse:
    """GET /costs/what-if: the period's sandbox time at the present prices of each backend and published plan."""
    return await rows(_what_if, request)


@operation(
    "The provider's bill, and what it lists now, beside the ledger",
    gives={200: dict},
    query={name: QUERY[name] for name in ("from", "to", "backend")}
    | {"listed": {"type": "string", "description": "1: also ask the backend what it has now."}},
)
async def bill(request: HttpRequest) -> HttpResponse:
    """GET /costs/bills: the provider's bill beside the ledger, day by day; with `listed=1` also what it lists now."""
    caller, alias, told = await rows(_bill, request)
    if request.GET.get("listed"):
        asked_at = timezone.now()
        found = await backends.get(alias).list()
        told["listed"] = _listing(await rows(listing.compare, alias, found, asked_at, caller.team))
    return _json(told)


def _forecast(request: HttpRequest) -> HttpResponse:
    caller = _reader(request, {"agent", "backend"})
    totals.roll_up(batches=BATCHES)
    today = timezone.now().astimezone(ZoneInfo(caller.team.time_zone)).date()
    scope: dict[str, Any] = {"team": caller.team, "agent": agent_of(request, caller)}
    scope["backend"] = request.GET.get("backend", "")
    told = spend.forecast(today, **scope)
    so_far = spend.total(spend.Period(today.replace(day=1), today, **scope))
    return _json(
        {
            "month": f"{today:%Y-%m}",
            "usd": _dollars(told.nano_usd),
            "so_far_usd": _dollars(told.so_far_nano_usd),
            "rest_usd": _dollars(told.rest_nano_usd),
            "days_known": told.days_known,
            "unpriced_charged_usd": _dollars(so_far.unpriced_nano_usd),  # of so_far, at the ceiling rate
        }
    )


def _what_if(request: HttpRequest) -> HttpResponse:
    caller = _reader(request, {"agent", "backend", "from", "to"})
    totals.roll_up(batches=BATCHES)
    period = period_of(request, caller, hourly=False)
    aliases = dict.fromkeys([*settings.SANDBOXES, *(plan.backend for plan in spend.PLANS)])
    return _json(
        {
            "from": period.first,
            "to": period.last,
            "charged_usd": _dollars(spend.total(period).charged_nano_usd),
            "plans_source": spend.PLANS_SOURCE,
            "results": [
                {
                    "backend": choice.backend,
                    "plan": choice.plan,
                    "usage_usd": _priced(choice.usage_nano_usd),
                    "standing_usd": _priced(choice.standing_nano_usd),
                    "usd": _priced(choice.nano_usd),
                    "limits": choice.limits,
                }
                for choice in spend.what_if(period, aliases)
            ],
        }
    )


def _bill(request: HttpRequest) -> tuple[Caller, str, dict[str, Any]]:
    caller = _reader(request, {"backend", "from", "to", "listed"})
    alias = request.GET.get("backend", "e2b")
    if alias not in settings.SANDBOXES:
        raise Invalid(f"backend: {alias!r} is none of {', '.join(settings.SANDBOXES)}.", field="backend")
    if caller.key is not None and caller.key.agent_id:
        raise caller.denied(Forbidden("A bill is the whole team's: use a key of the team."))
    totals.roll_up(batches=BATCHES)
    last = day_of(request, "to") or timezone.now().astimezone(UTC).date()
    first = day_of(request, "from") or last - timedelta(days=BILL_DAYS - 1)
    if not 0 <= (last - first).days < spend.MOST_DAYS:
        raise Invalid(f"from, to: both days included, and at most {spend.MOST_DAYS} of them.", field="from")
    found = bills.reconcile(alias, first, last, caller.team)
    known = [day for day in found if day.theirs_nano_usd is not None]
    return caller, alias, {
        "backend": alias,
        "from": first,
        "to": last,
        "results": [
            {
                "day": day.day,
                "ledger_usd": _dollars(day.ours_nano_usd),
                "bill_usd": _known(day.theirs_nano_usd),
                "difference_usd": _known(day.difference_nano_usd),
            }
            for day in found
        ],
        "difference_usd": _known(sum(day.difference_nano_usd or 0 for day in known) if known else None),
    }  # fmt: skip


def _listing(found: listing.Listing) -> dict[str, Any]:
    odd = [{"sandbox_id": one.sandbox, "is_listed": one.is_listed, "usd": _priced(one.nano_usd)} for one in found.odd]
    return {"both": found.both, "odd": odd, "usd": _dollars(found.nano_usd)}


def _reader(request: HttpRequest, known: set[str]) -> Caller:
    caller = caller_of(request)
    caller.needs(Scope.READ)
    if unknown := sorted(request.GET.keys() - known):
        raise Invalid(f"{unknown[0]}: not known here; known are {', '.join(sorted(known))}.", field=unknown[0])
    return caller


def _dollars(nano_usd: int) -> Decimal:
    return Decimal(nano_usd) / NANO


def _known(nano_usd: int | None) -> Decimal | None:
    return None if nano_usd is None else _dollars(nano_usd)


def _priced(nano_usd: int | None) -> Decimal | str:
    return "unpriced" if nano_usd is None else _dollars(nano_usd)


def _json(told: dict[str, Any]) -> HttpResponse:
    return HttpResponse(json.dumps(told, default=exports.plain), content_type="application/json")

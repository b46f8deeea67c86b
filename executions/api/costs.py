"""What was used and what it cost, told apart by whatever is asked; as JSON, CSV or FOCUS 1.2."""

from __future__ import annotations

import json
from datetime import date, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from executions.api.auth import caller_of
from executions.api.operation import operation
from executions.errors import Invalid, NotFound
from executions.hop import rows
from executions.keys import Caller
from executions.models import Agent
from executions.reports import exports, spend, totals
from executions.states import Scope

DAYS = 30
GROUPS = ("day", "hour", "agent", "backend", "kind", "language", "user", "workflow", *spend.ONE_BY_ONE)
KNOWN = {"group_by", "from", "to", "format", "agent", "backend"}
DAY = {"type": "string", "format": "date", "description": "By the team's clock."}
QUERY: dict[str, dict[str, Any]] = {
    "group_by": {"type": "string", "default": "day", "description": f"Up to 4 of {', '.join(GROUPS)}."},
    "from": DAY,
    "to": DAY,
    "format": {"type": "string", "enum": ["json", "csv", "focus"]},
    "agent": {"type": "string"},
    "backend": {"type": "string"},
}
MOST_GROUPS = 4
BATCHES = 2  # of usage rows that an answer may still add up itself


@operation("Money, told apart", gives={200: (dict, "text/csv")}, query=QUERY)
async def costs(request: HttpRequest) -> HttpResponse:
    """GET /costs: money, split into run, boot, idle and pool; what has no known price is told apart."""
    return await rows(_answer, request, _cost)


@operation("Seconds of sandboxes, told apart", gives={200: (dict, "text/csv")}, query=QUERY)
async def usage(request: HttpRequest) -> HttpResponse:
    """GET /usage: seconds, vCPU-seconds and GiB-seconds of sandboxes, the same way told apart."""
    return await rows(_answer, request, _use)


def _cost(line: spend.Line, groups: list[str]) -> dict[str, Any]:
    return exports.as_dict(line, groups)


def _use(line: spend.Line, groups: list[str]) -> dict[str, Any]:
    told = dict(zip(groups, line.keys, strict=True)) | {
        "seconds": line.seconds,
        "vcpu_seconds": line.vcpu_us / 1_000_000,
        "gib_seconds": line.mib_ms / 1_024_000,
        "stretches": line.stretches,
    }
    if "kind" not in groups:
        told |= {f"{kind}_seconds": line.split_us[kind] / 1_000_000 for kind in spend.KINDS}
    return told


def _answer(request: HttpRequest, told: Any) -> HttpResponse:
    caller = caller_of(request)
    caller.needs(Scope.READ)
    if unknown := sorted(request.GET.keys() - KNOWN):
        raise Invalid(f"{unknown[0]}: not known here; known are {', '.join(sorted(KNOWN))}.", field=unknown[0])
    form = request.GET.get("format", "json")
    if form not in ("json", "csv", "focus") or (form == "focus" and told is not _cost):
        raise Invalid("format: json or csv; of costs also focus.", field="format")
    groups = _groups(request.GET.get("group_by", "day"))
    period = period_of(request, caller, hourly="hour" in groups)
    totals.roll_up(batches=BATCHES)
    if form == "focus":
        return _file(exports.focus_csv(period), "focus-1.2.csv", period)
    found = spend.lines(period, *groups)
    results = [told(line, groups) for line in found]
    if form == "csv":
        if told is _cost:
            return _file(exports.csv_of(found, groups), "costs.csv", period)
        return _file(exports.as_csv(results, [*told(spend.Line(("",) * len(groups)), groups)]), "usage.csv", period)
    body = {
        "from": period.first,
        "to": period.last,
        "time_zone": caller.team.time_zone,
        "group_by": groups,
        "results": results,
        "total": told(spend.total(period), []),
        "truncated": groups[0] in spend.ONE_BY_ONE and len(found) == spend.MOST_LINES,
        "uncounted": totals.pending(),
    }
    return HttpResponse(json.dumps(body, default=exports.plain), content_type="application/json")


def _groups(text: str) -> list[str]:
    groups = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [group for group in groups if group not in GROUPS]:
        raise Invalid(f"group_by: {wrong[0]!r} is none of {', '.join(GROUPS)}.", field="group_by")
    alone = set(groups) & spend.ONE_BY_ONE.keys()
    hourly_labels = "hour" in groups and {"user", "workflow"} & set(groups)
    if not groups or len(set(groups)) < len(groups) or len(groups) > MOST_GROUPS or (alone and len(groups) > 1):
        raise Invalid(
            f"group_by: one to {MOST_GROUPS} different groups; execution, sandbox and session stand alone.",
            field="group_by",
        )
    if hourly_labels or {"user", "workflow"} <= set(groups):
        raise Invalid("group_by: user and workflow go with days, and not with each other.", field="group_by")
    return groups


def period_of(request: HttpRequest, caller: Caller, *, hourly: bool) -> spend.Period:
    today = timezone.now().astimezone(ZoneInfo(caller.team.time_zone)).date()
    last = day_of(request, "to") or today
    first = day_of(request, "from") or last - timedelta(days=DAYS - 1)
    most = spend.MOST_HOURLY_DAYS if hourly else spend.MOST_DAYS
    if not 0 <= (last - first).days < most:
        raise Invalid(f"from, to: both days included, and at most {most} of them.", field="from")
    return spend.Period(first, last, caller.team, agent_of(request, caller), request.GET.get("backend", ""))


def day_of(request: HttpRequest, name: str) -> date | None:
    text = request.GET.get(name)
    if not text:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise Invalid(f"{name}: a day such as 2026-11-24, by the team's clock.", field=name) from None
    if not 2000 <= day.year < 2200:
        raise Invalid(f"{name}: a day of this century.", field=name)
    return day


def agent_of(request: HttpRequest, caller: Caller) -> Agent | None:
    """The agent whose costs are asked for: the key's own, or the one that a team's key names."""
    asked = request.GET.get("agent", "")
    if caller.key is not None and caller.key.agent_id:
        if asked and caller.agent is not None and asked not in (caller.agent.name, caller.agent.pk):
            raise NotFound(f"There is no agent {asked!r} for this key.", field="agent")
        return caller.agent
    if not asked:
        return None
    found = Agent.objects.filter(team=caller.team, name=asked) | Agent.objects.filter(team=caller.team, pk=asked)
    if (agent := found.first()) is None:
        raise NotFound(f"There is no agent {asked!r} in this team.", field="agent")
    return agent


def _file(content: str, name: str, period: spend.Period) -> HttpResponse:
    response = HttpResponse(content, content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{period.first}-{period.last}-{name}"'
    return response

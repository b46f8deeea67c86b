"""The pages: sessions, runs, usage, keys. Each reads rows, or pulls one verb and redirects."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.db.models import Count, Q, QuerySet, Sum
from django.http import HttpResponse, QueryDict
from django.utils import timezone
from django.views.decorators.clickjacking import xframe_options_sameorigin
from django.views.decorators.http import require_GET

from executions import audit, backends, demand, newest, quotas, routes
from executions.console.copies import copies, curl
from executions.console.frame import EXAMPLE, MemberRequest, agents_of, key_of, member, page, spend_today
from executions.console.tags import agent_name
from executions.costs import usd
from executions.egress import words
from executions.errors import NotFound, SandgateError
from executions.keys import Caller
from executions.models import Agent, Execution, Quota, Sandbox, Template
from executions.operations import artifacts_of, find_session
from executions.reports import spend, totals
from executions.states import EXECUTION_ENDED, LANGUAGES, EventKind, ExecutionState, Scope, Unit

PAGE = 50
DAYS = 14
KEPT_SHOWN = 100
# An isolated origin of its own, that reaches neither the console nor any network.
FRAME_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; frame-ancestors 'self'"
)


@member
@require_GET
def sessions(request: MemberRequest) -> HttpResponse:
    caller = request.caller
    found = Sandbox.objects.sessions().filter(team=caller.team).select_related("agent__person", "template")
    if caller.agent is not None:
        demand.wish(caller.agent)  # whoever looks here may run something soon
    return page(
        request,
        "console/sessions.html",
        "sessions",
        sessions=_with_runs(found.order_by("-created_at", "-id")[:PAGE]),
        agents=agents_of(caller),
        templates=Template.objects.filter(is_active=True).order_by("name"),
        key=key_of(caller),
        example=EXAMPLE,
        curl=curl(),
    )


def _with_runs(found: QuerySet[Sandbox]) -> list[Any]:
    """The sessions, each with how many `runs` it has had."""
    sessions: list[Any] = list(found)
    within = Execution.objects.filter(sandbox__in=[one.pk for one in sessions]).order_by()
    runs = dict(within.values_list("sandbox").annotate(Count("pk")))
    for one in sessions:
        one.runs = runs.get(one.pk, 0)
    return sessions


@member
@require_GET
def session(request: MemberRequest, session_id: str) -> HttpResponse:
    caller = request.caller
    found = find_session(caller, session_id)
    live = found.ended_at is None
    backend = backends.get(found.backend) if found.backend in backends.aliases() else None
    can = backend.capabilities.languages if backend else frozenset({"python"})
    may_run = Scope.RUN in caller.scopes and found.agent.person_id in (None, request.user.pk)
    data = {
        "id": found.id,
        "open": live,
        "can_run": may_run,
        "languages": [name for name in LANGUAGES if name in can and name in (found.agent.languages or LANGUAGES)],
        "end_at": found.leased_until.isoformat(),
        "example": EXAMPLE,
    }
    packages = found.packages.filter(verdict="allowed", requested=True).order_by("name")
    context = {
        "session": found,
        "network": words(found.network_allow),
        "session_here": found.id,
        "live": live,
        "data": data,
        "packages": packages,
        "can_run": may_run,
        "can_pause": backend is not None and backend.capabilities.pause,
        "kept": artifacts_of(caller, session=found)[:KEPT_SHOWN],
    }
    return page(request, "console/session.html", "sessions", **context)


@member
@require_GET
def runs(request: MemberRequest) -> HttpResponse:
    caller = request.caller
    filters = {name: request.GET.get(name, "")[:200] for name in ("q", "state", "agent", "backend", "language")}
    before = request.GET.get("before", "")
    listed, further = _found(caller, filters, newest.place(before))
    query = QueryDict(mutable=True)
    query.update({name: value for name, value in filters.items() if value})
    first_page = query.urlencode()
    if further:
        query["before"] = str(further)
    agents = [(a.name, agent_name(a)) for a in agents_of(caller)]
    choices = [
        ("state", "State", [(s.value, s.value.replace("_", " ")) for s in ExecutionState]),
        ("agent", "Agent", agents),
        ("backend", "Backend", [(alias, alias) for alias in backends.aliases()]),
        ("language", "Language", [(name, name) for name in LANGUAGES]),
    ]
    return page(
        request,
        "console/runs.html",
        "runs",
        runs=listed,
        filters=filters,
        filtered=any(filters.values()),
        choices=[{"name": n, "label": label, "options": o, "value": filters[n]} for n, label, o in choices],
        before=before,
        first_page=first_page,
        older=query.urlencode() if further else "",
        looked_at=f"{newest.LOOKED_AT:,}",
        key=key_of(caller),
        curl=curl(),
    )


def _found(
    caller: Caller, filters: dict[str, str], after: newest.Place | None
) -> tuple[list[Execution], newest.Place | None]:
    """A page of the team's runs that match, and where the next begins."""
    every = Execution.objects.select_related("agent__person", "sandbox").defer("files", "env")
    of = every.filter(team=caller.team)
    text, state = filters["q"].strip(), filters["state"]
    if text.startswith("exe_") and (one := of.filter(id=text).first()):
        return [one], None
    if name := filters["agent"]:
        agent = Agent.objects.filter(team=caller.team, name=name).first()
        of = every.filter(agent=agent) if agent else every.none()
    found = newest.also(of, team_id=caller.team.pk)
    for name in ("state", "backend", "language"):
        if filters[name]:
            found = found.filter(**{name: filters[name]})
    if text:
        found = found.filter(Q(workflow=text) | Q(code__icontains=text))
    if state and state not in EXECUTION_ENDED:
        return newest.few(found.filter(ended_at__isnull=True), PAGE, after=after)
    return newest.page(found, PAGE, of=of, after=after)


def find_run(caller: Caller, execution_id: str) -> Execution:
    """A run of the caller's team; another team's is not found."""
    related = ("agent__person", "key", "actor", "sandbox")
    run = Execution.objects.select_related(*related).filter(team=caller.team, id=execution_id).first()
    if run is None:
        raise NotFound(f"There is no run {execution_id}.")
    return run


@member
@require_GET
def run(request: MemberRequest, execution_id: str) -> HttpResponse:
    found = find_run(request.caller, execution_id)
    audit.seen("code", caller=request.caller, of=found)
    problem = f"{found.error_value} ({found.error_code})" if found.error_code else ""
    said = [EventKind.STDOUT, EventKind.STDERR, EventKind.RESULT, EventKind.ERROR]
    return page(
        request,
        "console/run.html",
        "runs",
        run=found,
        problem=problem,
        has_output=found.events.filter(kind__in=said).exists(),
        attempts=found.attempts.all(),
        kept=artifacts_of(request.caller, execution=found)[:KEPT_SHOWN],
        network=words(found.sandbox.network_allow) if found.sandbox else "",
        egress=found.egress.order_by("pk")[:200],
        usage=found.usage.order_by("id"),
        timeline=timeline(found),
        copies=copies(found),
        places=places(request.caller, found) if found.ended_at else [],
        once=secrets.token_hex(16),
    )


def places(caller: Caller, run: Execution) -> list[tuple[str, str]]:
    """(backend, why it cannot run there) of each where this person may run it again; empty: they may not."""
    try:
        caller.needs(Scope.RUN)
        acting = caller.acting_as(run.agent_id)
    except SandgateError:
        return []
    return [(alias, _unfit(acting, run, alias)) for alias in backends.aliases()]


def _unfit(caller: Caller, run: Execution, alias: str) -> str:
    network = run.sandbox.network_allow if run.sandbox else None
    try:
        routes.plan(caller, asked=[alias], language=run.language, commands=run.command, network=network)
    except SandgateError as refused:
        skipped = refused.facts.get("skipped") or [[alias, refused.detail]]
        return str(skipped[0][1])
    return ""


def timeline(run: Execution) -> dict[str, Any]:
    """Where the time went: queue, boot, run, settle, each at least a sliver of 1,000 wide."""
    settled = max(run.usage.values_list("at", flat=True), default=None)
    marks = [
        ("queue", run.created_at, run.started_at),
        ("boot", run.started_at, run.running_at),
        ("run", run.running_at, run.ended_at),
        ("settle", run.ended_at, settled if settled and run.ended_at and settled > run.ended_at else run.ended_at),
    ]
    spans = [(name, (end - start).total_seconds() * 1000) for name, start, end in marks if start and end]
    whole = sum(ms for _, ms in spans) or 1
    bars, x = [], 0.0
    for name, ms in spans:
        width = max(2.0 if ms else 0.0, ms / whole * 1000)
        bars.append({"name": name, "ms": ms, "x": f"{x:.1f}", "width": f"{width:.1f}"})
        x += width
    return {"bars": bars, "words": ", ".join(f"{bar['name']} {bar['ms']:.0f} ms" for bar in bars)}


@member
@require_GET
def output(request: MemberRequest, execution_id: str) -> HttpResponse:
    """All that it printed, stdout and stderr in order, as a file."""
    found = find_run(request.caller, execution_id)
    audit.seen("output", caller=request.caller, of=found)
    texts = found.events.filter(kind__in=[EventKind.STDOUT, EventKind.STDERR]).order_by("seq")
    whole = "".join(data["text"] for data in texts.values_list("data", flat=True))
    response = HttpResponse(whole.encode(errors="replace"), content_type="text/plain; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{found.id}.txt"'
    return response


@member
@xframe_options_sameorigin
@require_GET
def frame(request: MemberRequest, execution_id: str, seq: int) -> HttpResponse:
    """One HTML result as its author meant it, scripts and all, in an origin of its own."""
    event = find_run(request.caller, execution_id).events.filter(seq=seq, kind=EventKind.RESULT).first()
    html = event.data["mime"].get("text/html") if event else None
    if html is None:
        raise NotFound("There is no HTML result here.")
    response = HttpResponse(html)
    response["Content-Security-Policy"] = FRAME_POLICY
    return response


@member
@require_GET
def usage(request: MemberRequest) -> HttpResponse:
    caller = request.caller
    zone = ZoneInfo(caller.team.time_zone)
    today = timezone.now().astimezone(zone).date()
    days = [today - timedelta(days=back) for back in reversed(range(DAYS))]
    totals.roll_up(batches=2)
    names = {a.pk: agent_name(a) for a in Agent.objects.filter(team=caller.team).select_related("person")}
    spent = spend.lines(spend.Period(days[0], today, caller.team), "day", "agent_id", "backend")
    by_day = dict.fromkeys(days, 0)
    lines = []
    for line in spent:
        day, agent, backend = line.keys
        by_day[day] += line.charged_nano_usd
        lines.append({"day": day, "agent": names[agent], "backend": backend, "line": line})
    lines.sort(key=lambda line: (-line["day"].toordinal(), line["agent"], line["backend"]))
    midnight = datetime.combine(today, datetime.min.time(), tzinfo=zone)
    ran_today = Execution.objects.filter(team=caller.team, created_at__gte=midnight)
    open_sandboxes = Sandbox.objects.open().filter(team=caller.team)
    return page(
        request,
        "console/usage.html",
        "usage",
        days=_bars(by_day),
        lines=lines,
        total=sum(line.charged_nano_usd for line in spent),
        total_seconds=sum(line.duration_us for line in spent),
        reserved=open_sandboxes.aggregate(total=Sum("reserved_nano_usd"))["total"] or 0,
        runs_today=newest.counted(ran_today),
        quotas=[_quota_line(quota) for quota in quotas.of(caller)],
        spend=spend_today(caller),
        key=key_of(caller),
        curl=curl(),
    )


def _bars(by_day: dict) -> list[dict[str, Any]]:
    most = max(by_day.values()) or 1
    step = 840 / len(by_day)
    return [
        {
            "date": day,
            "cost_nano_usd": cost,
            "x": f"{n * step + 6:.0f}",
            "width": f"{step - 12:.0f}",
            "height": f"{cost / most * 150:.1f}",
            "y": f"{159 - cost / most * 150:.1f}",
        }
        for n, (day, cost) in enumerate(by_day.items())
    ]


def _quota_line(quota: Quota) -> dict[str, Any]:
    used = quotas.in_use(quota)
    write = usd if quota.unit == Unit.NANO_USD else lambda n: f"{n:,}"
    what = "Spend" if quota.unit == Unit.NANO_USD else quota.get_unit_display().capitalize()
    return {
        "scope": quota.scope_name,
        "what": what if quota.window == "total" else f"{what} per {quota.window}",
        "used": write(used),
        "reserved": write(quota.reserved),
        "limit": write(quota.limit),
        "share": min(100, round((used + quota.reserved) / quota.limit * 100)) if quota.limit else 100,
    }

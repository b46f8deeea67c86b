"""The first page: what runs now, what failed, what it costs, which backends are up, and what needs somebody."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.cache import cache
from django.db.models import Count, Sum
from django.db.models.functions import TruncHour
from django.http import HttpRequest
from django.utils import timezone

from executions import backends, breaker
from executions.admin import charts, filters, show
from executions.costs import usd
from executions.models import ApiKey, Execution, MetricTotal, Refusal, Sandbox
from executions.operations import outages
from executions.reports import spend
from executions.states import EXECUTION_ENDED, ExecutionState, SandboxState

E, S = ExecutionState, SandboxState
PATIENCE_SECONDS = 2
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
KEPT_SECONDS = 26 * 3600
TIMED = 1000  # runs of which the run times are told
RECENT = f"the newest {TIMED:,} of 24 hours"
SPEND_DAYS = 14
FAILURES = (E.ERRORED, E.FAILED, E.TIMED_OUT)
ENDS = (E.SUCCEEDED, E.FAILED, E.TIMED_OUT, E.CANCELLED, E.ERRORED)

LITTLE = 100_000  # nano-dollars; exact ones stand in the hint and behind the link


def first_page(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """Unfold's dashboard callback."""
    if not request.user.has_perm("executions.view_execution"):
        return context
    now = timezone.now()
    ran = runs_of_day(now)
    live = list(Sandbox.objects.open().values_list("backend", "state").annotate(rows=Count("pk")))
    sandboxes = {"live": sum(n for *_, n in live), "retiring": sum(n for _, state, n in live if state == S.RETIRING)}
    return {
        **context,
        "fresh": not Execution.objects.exists(),
        "has_key": ApiKey.objects.exists(),
        "public_url": settings.PUBLIC_URL,
        "numbers": numbers(sandboxes, now),
        "outages": outages(),
        "needs": needs(sandboxes["retiring"], now),
        "verified": verified(),
        "backends": backend_rows([(backend, state, n) for _, backend, state, n in ran], live),
        "runs": (hours := runs_by_hour(ran, now)),
        "runs_chart": charts.runs(hours),
        "spend": (days := spend_by_day(now)),
        "spend_chart": charts.spend(days),
    }


def numbers(sandboxes: dict[str, int], now: datetime) -> list[dict[str, str]]:
    """The row of numbers, each with the list behind it."""
    states = dict(Execution.objects.open().values_list("state").annotate(rows=Count("pk")))
    half, most = percentiles(now, 0.5, 0.95)
    today = spend.today()
    took = show.rows_of("execution", since="day", open="no", o=f"-{column('took')}")
    day = timezone.localdate().isoformat()
    waiting = states.get(E.QUEUED, 0) + states.get(E.STARTING, 0)
    queued_link = show.rows_of("execution", open="yes", state__exact="queued" if states.get(E.QUEUED) else "starting")
    return [
        {
            "label": "Running",
            "value": str(states.get(E.RUNNING, 0)),
            "href": show.rows_of("execution", state__exact="running"),
        },
        {"label": "Waiting to run", "value": str(waiting), "href": queued_link},
        {"label": "Run time, half within", "value": show.seconds(half), "href": took, "hint": f"p50 of {RECENT}"},
        {"label": "Run time, 95 % within", "value": show.seconds(most), "href": took, "hint": f"p95 of {RECENT}"},
        {"label": "Live sandboxes", "value": str(sandboxes["live"]), "href": show.rows_of("sandbox", open="yes")},
        {
            "label": "Spend today",
            "value": usd(today) if not 0 < today < LITTLE else f"< {usd(LITTLE)}",
            "href": f"{show.rows_of('usage')}costs/?first={day}&last={day}",
            "hint": f"{today:,} nano-dollars",
        },
    ]


def column(name: str) -> int:
    """The number by which the list of executions is ordered by this column."""
    from executions.admin.runs import ExecutionPage

    return ExecutionPage.list_display.index(name) + 1


def percentiles(now: datetime, *parts: float) -> list[timedelta | None]:
    """Run times below which these parts of the newest ended runs of 24 hours lie; None without any."""
    ended = Execution.objects.filter(created_at__gte=now - DAY, ended_at__isnull=False, running_at__isnull=False)
    moments = ended.order_by("-created_at").values_list("running_at", "ended_at")[:TIMED]
    lengths = sorted(end - began for began, end in moments if began and end)
    return [lengths[min(len(lengths) - 1, int(len(lengths) * part))] if lengths else None for part in parts]


def needs(retiring: int, now: datetime) -> list[dict[str, Any]]:
    """What somebody should look at; nothing when all is well."""
    stale = filters.stale(Execution.objects.all()).count()
    overdue = filters.overdue(Sandbox.objects.all()).count()
    refused = Refusal.objects.filter(last_at__gte=now - timedelta(hours=1)).aggregate(times=Sum("times"))["times"] or 0
    found = [
        (
            stale,
            "without a sign of life",
            "execution",
            {"open": "stuck"},
            "The runner died. The background loop closes them within seconds, while it runs.",
        ),
        (
            overdue,
            "beyond the end of the lease",
            "sandbox",
            {"open": "stuck"},
            "The background loop ends them; kill them here when it does not run.",
        ),
        (
            retiring,
            "waiting for a confirmed kill",
            "sandbox",
            {"state__exact": "retiring"},
            "The backend has not said that they are gone; it is asked again.",
        ),
        (
            refused,
            "in the last hour",
            "refusal",
            {"since": "hour"},
            "Quotas, budgets and policies said no; each row says which.",
        ),
    ]
    words = {"execution": "execution", "sandbox": "sandbox", "refusal": "request refused"}
    many = {"execution": "executions", "sandbox": "sandboxes", "refusal": "requests refused"}
    return [
        {
            "count": count,
            "words": f"{words[model] if count == 1 else many[model]} {what}",
            "why": why,
            "href": show.rows_of(model, **query),
        }
        for count, what, model, query, why in found
        if count
    ]


def verified() -> dict[str, Any] | None:
    """When `manage.py verify` last looked, and how many of its checks found a wrong row; None before it ever has."""
    row = MetricTotal.objects.filter(name="sandgate_verify_failed_checks").first()
    return {"failed": int(row.value), "when": show.when(row.at)} if row else None


def backend_rows(ended: list[tuple], live: list[tuple]) -> list[dict[str, Any]]:
    """Each backend: whether it answers, what lives there, what failed there in 24 hours. E2B is named even without a key."""
    rows = []
    for state in async_to_sync(backend_states)():
        alias = state["alias"]
        own: Counter[str] = Counter()
        for backend, name, n in ended:
            own[name] += n if backend == alias else 0
        failures = [
            (name, own[name], show.rows_of("execution", since="day", backend=alias, state__exact=name))
            for name in FAILURES
            if own.get(name)
        ]
        out = breaker.outage(alias)
        rows.append(
            {
                **state,
                **({"state": "out", "detail": out} if out else {}),
                "live": sum(n for backend, _, n in live if backend == alias),
                "live_link": show.rows_of("sandbox", open="yes", backend=alias),
                "runs": sum(own.values()),
                "runs_link": show.rows_of("execution", since="day", backend=alias),
                "failures": failures,
            }
        )
    return rows


async def backend_states() -> list[dict[str, Any]]:
    """What each backend says of itself, all asked at once; a dead one costs two seconds, and not the others' answers."""

    async def one(alias: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                backend = backends.get(alias)
                found = await backend.check()
        except TimeoutError:
            return {"alias": alias, "state": "not answering", "detail": f"Nothing came within {PATIENCE_SECONDS} s."}
        except Exception as e:  # a broken backend must not take the page down that would say so
            return {"alias": alias, "state": "down", "detail": str(e) or type(e).__name__}
        return {
            "alias": alias,
            "state": "up" if found.ok else "down",
            "detail": found.detail,
            "isolation": found.isolation or backend.isolation,
        }

    states = list(await asyncio.gather(*map(one, backends.aliases())))
    if "e2b" not in backends.aliases():
        says = "Set E2B_API_KEY, and E2B's cloud takes the same requests."
        states.insert(0, {"alias": "e2b", "state": "not configured", "detail": says})
    return states


def runs_of_day(now: datetime) -> list[tuple[datetime, str, str, int]]:
    """(hour, backend, state, how many began) of the last 24 hours and of this one.

    An hour in which all that began has ended changes no more: it is counted once, and kept.
    """
    last = timezone.localtime(now).replace(minute=0, second=0, microsecond=0)
    hours = [last - n * HOUR for n in range(24, -1, -1)]
    known = cache.get_many([_kept_as(hour) for hour in hours])
    unknown = [hour for hour in hours if _kept_as(hour) not in known]
    began = Execution.objects.filter(created_at__gte=unknown[0]) if unknown else Execution.objects.none()
    counted: dict[datetime, list[tuple[str, str, int]]] = {hour: [] for hour in unknown}
    by_hour = began.annotate(hour=TruncHour("created_at")).values_list("hour", "backend", "state")
    for hour, *line in by_hour.annotate(rows=Count("pk")).order_by():
        if hour in counted:
            counted[hour].append(tuple(line))
    over = {hour: lines for hour, lines in counted.items() if hour < last - HOUR and _has_ended(lines)}
    cache.set_many({_kept_as(hour): lines for hour, lines in over.items()}, KEPT_SECONDS)
    return [(hour, *line) for hour in hours for line in known.get(_kept_as(hour), counted.get(hour, []))]


def _kept_as(hour: datetime) -> str:
    return f"runs-began-{hour.timestamp():.0f}"


def _has_ended(lines: list[tuple[str, str, int]]) -> bool:
    return all(state in EXECUTION_ENDED for _, state, _ in lines)


def runs_by_hour(ran: list[tuple[datetime, str, str, int]], now: datetime) -> charts.Table:
    last = timezone.localtime(now).replace(minute=0, second=0, microsecond=0)
    hours = [last - n * HOUR for n in range(24, -1, -1)]
    ends = [(hour, state if state in ENDS else "running", n) for hour, _, state, n in ran]
    seen = {state for _, state, _ in ends}
    return charts.table(hours, _summed(ends), [name for name in (*ENDS, E.RUNNING) if name in seen])


def _summed(found: list[tuple[Any, str, int]]) -> list[tuple[Any, str, int]]:
    sums: dict[tuple[Any, str], int] = {}
    for row, name, value in found:
        sums[row, name] = sums.get((row, name), 0) + value
    return [(row, name, value) for (row, name), value in sums.items()]


def spend_by_day(now: datetime) -> charts.Table:
    days = [timezone.localdate(now) - timedelta(days=n) for n in range(SPEND_DAYS - 1, -1, -1)]
    found = spend.lines(spend.Period(days[0], days[-1]), "day", "backend")
    return charts.table(days, [(*line.keys, line.charged_nano_usd) for line in found])

"""The page that Prometheus scrapes: the totals of all processes, and what the rows say at this moment."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta

from django.conf import settings
from django.db import DatabaseError
from django.db.models import Count, Exists, Min, OuterRef, Q, Sum
from django.utils import timezone

from executions import breaker, metrics
from executions.metrics.families import FAMILIES, SUM, Family
from executions.models import Delivery, Execution, MetricTotal, Sandbox, Transition
from executions.states import EXECUTION_ENDED, SANDBOX_ENDED, BreakerState, ExecutionState, SandboxState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FRESH_SECONDS = 1.0  # several scrapers cost as much as one
STUCK_AFTER = timedelta(minutes=1)
KINDS_TOLD = 200  # rows of the pool: a hundred templates that are warm on one backend

Samples = dict[str, dict[tuple[str, ...], float]]  # by name, by the values of its labels
Histograms = dict[str, dict[tuple[str, ...], dict[str, float]]]

_reading = threading.Lock()
_last: tuple[float, str] = (0.0, "")


def page() -> str:
    """Prometheus' text format 0.0.4, at most a second old. A database that is away is a sample, not an error."""
    global _last
    with _reading:
        if _last[1] and time.monotonic() - _last[0] < FRESH_SECONDS:
            return _last[1]
        try:
            metrics.flush()
            samples, histograms = _totals()
            samples |= _live() | {"sandgate_database_up": {(): 1}}
        except DatabaseError:
            samples, histograms = {"sandgate_database_up": {(): 0}}, {}
        text = "".join(_lines(samples, histograms))
        _last = time.monotonic(), text
        return text


def _totals() -> tuple[Samples, Histograms]:
    samples: Samples = defaultdict(dict)
    histograms: Histograms = defaultdict(lambda: defaultdict(dict))
    for row in MetricTotal.objects.filter(name__in=FAMILIES):
        labels = tuple(json.loads(row.labels))
        if len(labels) != len(FAMILIES[row.name].labels):  # of an earlier release
            continue
        if row.part:
            histograms[row.name][labels][row.part] = row.value
        else:
            samples[row.name][labels] = row.value
    leaked = samples["sandgate_sandboxes_leaked"]
    samples["sandgate_sandboxes_leaked"] = {(alias,): leaked.get((alias,), 0) for alias in settings.SANDBOXES}
    return samples, histograms


def _live() -> Samples:
    """What open rows say. Each query reads a partial index of open rows only."""
    now = timezone.now()
    running = Execution.objects.open().values_list("backend", "state").annotate(n=Count("pk"))
    in_flight = _zeros(ExecutionState.values, EXECUTION_ENDED) | {(b, s): n for b, s, n in running}
    waiting = Execution.objects.open().filter(heartbeat_at__isnull=True)
    queue = waiting.aggregate(n=Count("pk"), oldest=Min("created_at"))
    there = Sandbox.objects.open().values_list("backend", "state")
    waits = Q(state__in=[SandboxState.IDLE, SandboxState.BOOTING]) & ~Q(made_of="")
    warm = Sandbox.objects.open().filter(waits).values_list("backend", "template__name", "state")
    sandboxes, reserved = _zeros(SandboxState.values, SANDBOX_ENDED), dict.fromkeys(_aliases(), 0)
    for backend, state, n, money in there.annotate(n=Count("pk"), money=Sum("reserved_nano_usd")):
        sandboxes[backend, state] = n
        reserved[(backend,)] = reserved.get((backend,), 0) + money
    step = Transition.objects.filter(sandbox=OuterRef("pk"), after=SandboxState.RETIRING, at__lt=now - STUCK_AFTER)
    dying = Sandbox.objects.open().filter(Exists(step), state=SandboxState.RETIRING)  # a join would begin at the steps
    stuck = dying.values_list("backend").annotate(n=Count("pk"))
    messages = Delivery.objects.pending().filter(webhook__is_active=True)
    untold = messages.aggregate(n=Count("pk"), oldest=Min("created_at"))
    breakers = _zeros(BreakerState.values) | {(alias, BreakerState.CLOSED): 1 for alias in settings.SANDBOXES}
    for alias, row in breaker.look(again=True).items():
        if alias in settings.SANDBOXES:
            breakers |= {(alias, other): int(other == row.state) for other in BreakerState.values}
    return {
        "sandgate_executions_in_flight": in_flight,
        "sandgate_queue_length": {(): queue["n"]},
        "sandgate_queue_oldest_seconds": {(): _age(queue["oldest"], now)},
        "sandgate_sandboxes_open": sandboxes,
        "sandgate_sandboxes_stuck": dict.fromkeys(_aliases(), 0) | {(backend,): n for backend, n in stuck},
        "sandgate_pool_sandboxes": {
            (b, t, s): n for b, t, s, n in warm.annotate(n=Count("pk")).order_by("-n")[:KINDS_TOLD]
        },
        "sandgate_breaker_state": breakers,
        "sandgate_webhook_backlog": {(): untold["n"]},
        "sandgate_webhook_oldest_seconds": {(): _age(untold["oldest"], now)},
        "sandgate_reserved_nano_usd": reserved,
    }


def _age(since: datetime | None, now: datetime) -> float:
    return (now - since).total_seconds() if since else 0


def _aliases() -> list[tuple[str]]:
    return [(alias,) for alias in settings.SANDBOXES]


def _zeros(states: list[str], ended: frozenset[str] = frozenset()) -> dict[tuple[str, ...], float]:
    """A zero for each backend and open state, so that a rule has something to compare before anything happens."""
    return {(alias, state): 0 for alias in settings.SANDBOXES for state in states if state not in ended}


def _lines(samples: Samples, histograms: Histograms) -> Iterator[str]:
    for name, family in FAMILIES.items():
        yield f"# HELP {name} {family.meaning}\n# TYPE {name} {family.type}\n"
        for labels, value in sorted(samples.get(name, {}).items()):
            yield _line(name, family, labels, value)
        for labels, parts in sorted(histograms.get(name, {}).items()):
            total = 0.0
            for bound in metrics.PARTS:
                total += parts.get(bound, 0)
                yield _line(f"{name}_bucket", family, labels, total, bound)
            yield _line(f"{name}_count", family, labels, total)
            yield _line(f"{name}_sum", family, labels, parts.get(SUM, 0))


def _line(name: str, family: Family, labels: tuple[str, ...], value: float, bound: str = "") -> str:
    told = [f'{label}="{_escaped(text)}"' for label, text in zip(family.labels, labels, strict=True)]
    told += [f'le="{bound}"'] if bound else []
    number = f"{int(value)}" if value == int(value) else repr(value)
    return f"{name}{{{','.join(told)}}} {number}\n" if told else f"{name} {number}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

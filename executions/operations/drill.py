"""An outage that is only played: nothing is made at one backend for a while, and what became of the runs is written down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import Count, Q
from django.utils import timezone

from executions import audit, backends, breaker
from executions.errors import BackendError, Invalid
from executions.hop import rows
from executions.models import Attempt, Execution, Refusal, Sandbox
from executions.states import AttemptOutcome, BreakerState, ExecutionState, SandboxState

LOOK_SECONDS = 0.1
RECOVERY_SECONDS = 30  # an outage that was lifted is over by then, or the report says that it is not
SETTLE_SECONDS = 10  # what is still being ended is no leak
EASED_SECONDS = 1.0  # a sandbox younger than this may be made while its backend is asked


@dataclass
class Report:
    """What a drill has shown. `opened_after_seconds` is empty where nothing ran that could have opened the breaker."""

    alias: str
    began_at: datetime
    lifted_at: datetime | None = None
    opened_after_seconds: float | None = None
    recovered_after_seconds: float | None = None
    served_again_after_seconds: float | None = None  # until a run went there
    executions: int = 0
    states: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)  # by the backend that took them instead
    stayed: int = 0  # in sandboxes that were there before
    refused: dict[str, int] = field(default_factory=dict)  # by code and sentence
    not_served: list[str] = field(default_factory=list)  # executions that ended without a backend
    ran_twice: list[str] = field(default_factory=list)
    leaked_there: dict[str, list[str]] = field(default_factory=dict)  # alive at a backend, ended here
    leaked_here: dict[str, list[str]] = field(default_factory=dict)  # open here, unknown to the backend

    @property
    def passed(self) -> bool:
        """Nothing ran twice, nothing leaked, and the backend is in use again."""
        recovered = self.opened_after_seconds is None or self.recovered_after_seconds is not None
        return recovered and not (self.ran_twice or self.leaked_there or self.leaked_here)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


async def outage_drill(
    *, alias: str, seconds: float, by: str, hear: Callable[[str], None] = lambda line: None
) -> Report:
    """Play an outage of this backend for so long, on the running system, and report. Raises Invalid; always lifts it."""
    if alias not in backends.aliases():
        raise Invalid(f"There is no backend {alias!r}; there are {', '.join(backends.aliases())}.")
    if not 1 <= seconds <= breaker.DRILL_MOST.total_seconds():
        raise Invalid(f"A drill takes between 1 and {breaker.DRILL_MOST.total_seconds():.0f} s.")
    if out := await rows(breaker.outage, alias):
        raise Invalid(f"{alias} is {out}: there is nothing to play.")
    refused_before = await rows(_refusals)
    report = Report(alias, timezone.now())
    hear(f"{alias} is out from now on, as a drill; what runs there goes on.")
    try:
        await rows(_begin, alias, by, seconds)
        await _until(report.began_at + timedelta(seconds=seconds), lambda: _note_opening(report, hear))
    finally:
        await rows(breaker.lift, alias)
    report.lifted_at = timezone.now()
    hear("The outage is over.")
    await _until(report.lifted_at + timedelta(seconds=RECOVERY_SECONDS), lambda: _note_recovery(report, hear))
    await rows(_count, report, refused_before)
    await _settled(report)
    return report


@transaction.atomic(durable=True)
def _begin(alias: str, by: str, seconds: float) -> None:
    breaker.drill(alias, by=by, seconds=seconds)
    audit.record("outage_drill", subject=alias, after={"seconds": seconds}, reason=f"by {by}")


async def _until(ends: datetime, seen: Callable[[], bool]) -> None:
    while timezone.now() < ends and not await rows(seen):
        await asyncio.sleep(LOOK_SECONDS)


def _note_opening(report: Report, hear: Callable[[str], None]) -> bool:
    row = breaker.look(again=True)[report.alias]
    if report.opened_after_seconds is None and row.state != BreakerState.CLOSED and row.opened_at:
        report.opened_after_seconds = round((row.opened_at - report.began_at).total_seconds(), 3)
        hear(f"The breaker has opened after {report.opened_after_seconds} s.")
    return False  # a drill lasts as long as was said


def _note_recovery(report: Report, hear: Callable[[str], None]) -> bool:
    """True once nothing more is to be seen: the breaker has closed, and a run has gone there if runs are coming."""
    row, lifted = breaker.look(again=True)[report.alias], report.lifted_at
    assert lifted is not None
    if row.state != BreakerState.CLOSED:
        return False
    if report.recovered_after_seconds is None:
        closed = max(lifted, row.closed_at) if row.closed_at else lifted
        report.recovered_after_seconds = round((closed - lifted).total_seconds(), 3)
        hear(f"The breaker is closed, {report.recovered_after_seconds} s after the outage.")
    since = lifted + timedelta(seconds=report.recovered_after_seconds)
    attempts = Attempt.objects.filter(started_at__gte=lifted)
    there = attempts.filter(backend=report.alias, outcome=AttemptOutcome.RAN).order_by("started_at").first()
    if there is not None:
        report.served_again_after_seconds = round((there.started_at - lifted).total_seconds(), 3)
    return there is not None or timezone.now() - since > timedelta(seconds=3)


def _refusals() -> dict[tuple[str, str], int]:
    return {(row.pk, row.code): row.times for row in Refusal.objects.filter(code="no_backend")}  # type: ignore[misc]


def _count(report: Report, before: dict[tuple[str, str], int]) -> None:
    """Everything that was admitted during the outage."""
    within = Q(created_at__gte=report.began_at, created_at__lt=report.lifted_at)
    all_of_them = Execution.objects.filter(within).order_by()
    report.executions = all_of_them.count()
    report.states = dict(all_of_them.values_list("state").annotate(Count("pk")))
    hit = Q(attempts__backend=report.alias, attempts__outcome__in=(AttemptOutcome.UNAVAILABLE, AttemptOutcome.SKIPPED))
    moved = all_of_them.filter(hit, attempts__code__in=("backend_unavailable", "backend_out")).distinct()
    ran = moved.exclude(backend=report.alias).exclude(running_at=None)
    report.moved = dict(ran.values_list("backend").annotate(Count("pk", distinct=True)))
    report.stayed = all_of_them.filter(backend=report.alias, sandbox__kept=True).count()
    report.not_served = list(
        all_of_them.filter(state=ExecutionState.ERRORED, error_code="no_backend").values_list("pk", flat=True)[:100]
    )
    twice = Count("attempts", filter=Q(attempts__outcome__in=(AttemptOutcome.RAN, AttemptOutcome.LOST)))
    report.ran_twice = list(all_of_them.annotate(runs=twice).filter(runs__gt=1).values_list("pk", flat=True))
    refused: Counter[str] = Counter()
    for row in Refusal.objects.filter(code="no_backend", last_at__gte=report.began_at):
        refused[f"{row.code}: {row.detail}"] += row.times - before.get((row.pk, row.code), 0)  # type: ignore[arg-type]
    report.refused = dict(refused)


async def _settled(report: Report) -> None:
    """Compare both sides until they agree, or what is left is a leak."""
    ends = timezone.now() + timedelta(seconds=SETTLE_SECONDS)
    while True:
        report.leaked_there, report.leaked_here = {}, {}
        for alias in backends.aliases():
            await _compare(report, alias)
        if not (report.leaked_there or report.leaked_here) or timezone.now() > ends:
            return
        await asyncio.sleep(0.5)


async def _compare(report: Report, alias: str) -> None:
    if backends.get(alias).isolation == "simulated":  # its machines are in the memory of whoever made them
        return
    try:
        before = await rows(_held, alias)
        listed = {item.sandbox_id for item in await backends.get(alias).list() if item.sandbox_id.startswith("sbx")}
        after = await rows(_held, alias)
    except (BackendError, OSError, TimeoutError):
        return
    ended = await rows(_ended, listed)
    if there := sorted(listed & ended):
        report.leaked_there[alias] = there
    if here := sorted((before & after) - listed):
        report.leaked_here[alias] = here


def _held(alias: str) -> set[str]:
    """What our rows say is alive at this backend, and has been for a moment."""
    live = Sandbox.objects.open().filter(backend=alias, state__in=[SandboxState.IDLE, SandboxState.LEASED])
    older = live.filter(ready_at__lt=timezone.now() - timedelta(seconds=EASED_SECONDS))
    return {sandbox.provider_name for sandbox in older}


def _ended(names: set[str]) -> set[str]:
    ids = [name.replace("sbx", "sbx_", 1) for name in names]
    ended = Sandbox.objects.filter(pk__in=ids, ended_at__isnull=False).only("pk")
    return {sandbox.provider_name for sandbox in ended}

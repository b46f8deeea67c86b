"""Ceilings: one conditional UPDATE per level, all or nothing within the transaction of the verb that asks."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from django.db.models import Q, Sum
from django.utils import timezone

from executions.costs import usd
from executions.errors import BudgetExhausted, QuotaExceeded, Refused
from executions.keys import Caller
from executions.models import Artifact, Quota, Sandbox, hot
from executions.states import Unit, WhenExhausted, Window

R = TypeVar("R", bound=Refused)
CONCURRENT: dict[str, str] = {Unit.CONCURRENT_EXECUTIONS: "execution", Unit.CONCURRENT_SANDBOXES: "sandbox"}
LATER_SECONDS = 1  # by then one that runs may have ended

_of = hot.Compiled(
    lambda team, agent, key, user, workflow, backend: (
        Quota.objects.select_related("team", "agent", "key")
        .filter(Q(team=None, agent=None, key=None) | Q(team=team, agent=None, key=None) | Q(agent=agent) | Q(key=key))
        .filter(user__in=["", user], workflow__in=["", workflow], backend__in=["", backend])
        .order_by("id")
    )
)


def of(caller: Caller, backend: str = "") -> list[Quota]:
    """The quotas that govern this caller there, in the fixed order in which they are taken."""
    agent, key = caller.agent, caller.key
    ids = caller.team.pk, agent.pk if agent else "", key.pk if key else ""
    return _of(*ids, caller.user, caller.workflow, backend)


def visible_to(caller: Caller) -> list[Quota]:
    """Those, and the ones that only govern some end user, workflow or backend of theirs."""
    own = Q(team=None, agent=None, key=None) | Q(team=caller.team, agent=None, key=None)
    own |= Q(agent=caller.agent) if caller.agent else Q()
    own |= Q(key=caller.key) if caller.key else Q()
    return list(Quota.objects.select_related("team", "agent", "key").filter(own).order_by("id"))


def window_start(window: str, zone: str, now: datetime) -> datetime | None:
    """When the current window began, in the team's time zone; None for a total."""
    local = now.astimezone(ZoneInfo(zone))
    match window:
        case Window.SECOND:
            return local.replace(microsecond=0)
        case Window.MINUTE:
            return local.replace(second=0, microsecond=0)
        case Window.HOUR:
            return local.replace(minute=0, second=0, microsecond=0)
        case Window.DAY:
            return local.replace(hour=0, minute=0, second=0, microsecond=0)
        case Window.MONTH:
            return local.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return None


def window_end(window: str, zone: str, now: datetime) -> datetime | None:
    """When the current window ends; None for a total."""
    start = window_start(window, zone, now)
    if start is None:
        return None
    match window:
        case Window.SECOND:
            return start + timedelta(seconds=1)
        case Window.MINUTE:
            return start + timedelta(minutes=1)
        case Window.HOUR:
            return start + timedelta(hours=1)
        case Window.DAY:  # by the calendar: a day may have 23 or 25 hours
            return (start.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=start.tzinfo)
        case Window.MONTH:
            return start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    return None


def take(
    caller: Caller,
    *,
    executions: int = 0,
    sandboxes: int = 0,
    seconds: int = 0,
    nano_usd: int = 0,
    bytes_stored: int = 0,
    backend: str = "",
    fits: str = "",
    is_open: bool = False,
) -> list[int]:
    """Take from every quota of the caller, or from none. Returns the ids of the budgets that now hold `nano_usd`.

    `seconds` are those for which a sandbox may live from now on. Raises QuotaExceeded or BudgetExhausted with what was
    needed, what is left and when it resets; the transaction around it undoes what was taken before. `fits` says what a
    smaller request could be. `is_open`: the sandbox changes hands, so that ceilings for everybody have counted it already.
    """
    now, zone = timezone.now(), caller.team.time_zone
    budgets = []
    for quota in of(caller, backend):
        _begin_window(quota, zone, now)
        counted = is_open and quota.is_global
        match quota.unit:
            case Unit.CONCURRENT_EXECUTIONS if executions:
                _take_open(quota, executions, now)
            case Unit.CONCURRENT_SANDBOXES if sandboxes and not counted:
                _take_open(quota, sandboxes, now)
            case Unit.COMPUTE_US if seconds and not counted:
                _take_time(quota, seconds * 1_000_000, zone, now)
            case Unit.EXECUTIONS if executions:
                _take_counted(quota, executions, zone, now)
            case Unit.CREATIONS if sandboxes and not is_open:
                _take_counted(quota, sandboxes, zone, now)
            case Unit.BYTES_STORED if bytes_stored:
                _take_open(quota, bytes_stored, now)
            case Unit.NANO_USD if nano_usd:
                if not hot.take(quota.pk, "reserved", nano_usd, now):
                    raise _by(quota, _exhausted(quota, nano_usd, zone, now, fits))
                budgets.append(quota.pk)
    return budgets


def _begin_window(quota: Quota, zone: str, now: datetime) -> None:
    start = window_start(quota.window, zone, now)
    if start is not None and quota.window_started_at < start:
        Quota.objects.filter(pk=quota.pk, window_started_at__lt=start).update(used=0, window_started_at=start)


def settle(budgets: list[int], *, release: int = 0, spend: int = 0) -> None:
    """Give back what was set aside and book what was spent, on the budgets that `take` named."""
    for quota_id in sorted(budgets):  # in the order in which they are taken, so that two never wait for each other
        hot.settle(quota_id, release, spend)


def book(sandbox: Sandbox, *, release: int, spend: int, used_us: int) -> None:
    """The same on the budgets of a sandbox, with a stretch of its life on the quotas of compute time that govern it."""
    hot.book(
        sandbox.reserved_on,
        release,
        spend,
        team=sandbox.team_id,
        agent=sandbox.agent_id,
        key=sandbox.key_id or "",
        backend=sandbox.backend,
        used_us=used_us,
    )


def ceiling(quota: Quota, now: datetime | None = None) -> int:
    """The limit, with what it is raised by for now."""
    raised = quota.raised_until is not None and quota.raised_until > (now or timezone.now())
    return quota.limit + (quota.raised_by if raised else 0)


def in_use(quota: Quota, *, lock: bool = False) -> int:
    """What counts against a quota now: open rows for the concurrent units, kept files for bytes, else the counter.

    With `lock`, nobody else can be admitted against it until the transaction ends.
    """
    if quota.unit == Unit.BYTES_STORED:
        if lock:
            Quota.objects.select_for_update().get(pk=quota.pk)
        scope = {name if name == "team_id" else f"sandbox__{name}": value for name, value in _scope(quota).items()}
        kept = Artifact.objects.filter(expires_at__gt=timezone.now(), **scope)
        return kept.aggregate(total=Sum("size_bytes"))["total"] or 0
    table = CONCURRENT.get(quota.unit)
    if table is None:
        return quota.used
    return hot.count_open(table, _scope(quota), locked=quota.pk if lock else None)


def reserved(quota: Quota) -> int:
    """What is set aside: money as booked; of compute time what the living may still use."""
    if quota.unit == Unit.COMPUTE_US:
        return _left_of_the_living(quota, timezone.now())
    return quota.reserved


def _scope(quota: Quota) -> dict[str, str]:
    """The columns by which rows count against it, and their values."""
    owner = next((s for s in ("key", "agent", "team") if getattr(quota, f"{s}_id")), None)
    found = {f"{owner}_id": getattr(quota, f"{owner}_id")} if owner else {}
    return found | {name: getattr(quota, name) for name in ("user", "workflow", "backend") if getattr(quota, name)}


def _take_open(quota: Quota, asked: int, now: datetime) -> None:
    used, limit = in_use(quota, lock=True), ceiling(quota, now)
    if used + asked <= limit:
        return
    refusal = QuotaExceeded(
        f"{quota.scope_name} is at {used:,} of {limit:,} {quota.get_unit_display().lower()}.",
        unit=quota.unit,
        limit=limit,
        used=used,
        needed=asked,
        remaining=max(0, limit - used),
        retry_after=LATER_SECONDS,
    )
    raise _by(quota, refusal)


def _take_counted(quota: Quota, asked: int, zone: str, now: datetime) -> None:
    if hot.take(quota.pk, "used", asked, now):
        return
    facts = _facts(quota, asked, zone, now)
    said = f"{facts['used']:,} of {facts['limit']:,} {quota.get_unit_display().lower()}"
    raise _by(quota, QuotaExceeded(f"{quota.scope_name} has used {said}{_per(quota)}{_resets(facts)}.", **facts))


def _take_time(quota: Quota, asked_us: int, zone: str, now: datetime) -> None:
    """What the living may still use counts as used."""
    used = Quota.objects.select_for_update().values_list("used", flat=True).get(pk=quota.pk)
    living, limit = _left_of_the_living(quota, now), ceiling(quota, now)
    if used + living + asked_us <= limit:
        return
    left = max(0, limit - used - living)
    facts = _facts(quota, asked_us, zone, now) | {"reserved": living, "remaining": left}
    said = f"{left / 1e6:,.0f} s of {limit / 1e6:,.0f} s of compute time{_per(quota)} left{_resets(facts)}"
    raise _by(quota, QuotaExceeded(f"This could take {asked_us / 1e6:,.0f} s; {quota.scope_name} has {said}.", **facts))


def _left_of_the_living(quota: Quota, now: datetime) -> int:
    """Microseconds that the open sandboxes may still use, from where their time was last booked."""
    found = Sandbox.objects.open().filter(**_scope(quota)).values_list("leased_until", "metered_until", "created_at")
    left = (max(until, now) - (metered or created) for until, metered, created in found)
    return sum(max(0, int(stretch.total_seconds() * 1_000_000)) for stretch in left)


def _by(quota: Quota, refusal: R) -> R:
    """The refusal, with what the quota says of such requests."""
    if quota.when_exhausted == WhenExhausted.WAIT:
        refusal.waits_seconds = quota.max_wait_seconds
    refusal.goes_local = quota.when_exhausted == WhenExhausted.LOCAL
    return refusal


def _facts(quota: Quota, needed: int, zone: str, now: datetime) -> dict[str, Any]:
    quota.refresh_from_db()
    ends, limit = window_end(quota.window, zone, now), ceiling(quota, now)
    return {
        "unit": quota.unit,
        "limit": limit,
        "used": quota.used,
        "reserved": quota.reserved,
        "needed": needed,
        "remaining": max(0, limit - quota.used - quota.reserved),
        "resets_at": ends.isoformat() if ends else None,
        "retry_after": max(1, int((ends - now).total_seconds())) if ends else None,
    }


def _resets(facts: dict) -> str:
    return f", resets {facts['resets_at']}" if facts["resets_at"] else ""


def _per(quota: Quota) -> str:
    return "" if quota.window == Window.TOTAL else f" per {quota.window}"


def _exhausted(quota: Quota, needed: int, zone: str, now: datetime, fits: str) -> BudgetExhausted:
    facts = _facts(quota, needed, zone, now)
    left = f"{usd(facts['remaining'])} of {usd(facts['limit'])}{_per(quota)} left{_resets(facts)}"
    return BudgetExhausted(
        f"This could cost {usd(needed)}; {quota.scope_name} has {left}.",
        remedy=f"{fits} {BudgetExhausted.remedy}".strip(),
        **facts,
    )

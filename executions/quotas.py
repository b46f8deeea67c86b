"""Ceilings: one conditional UPDATE per level, all or nothing within the transaction of the verb that asks."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from django.db.models import Q
from django.utils import timezone

from executions.costs import usd
from executions.errors import BudgetExhausted, QuotaExceeded
from executions.keys import Caller
from executions.models import Quota, hot
from executions.states import Unit, Window

CONCURRENT: dict[str, str] = {Unit.CONCURRENT_EXECUTIONS: "execution", Unit.CONCURRENT_SANDBOXES: "sandbox"}


_of = hot.Compiled(
    lambda team, agent, key: (
        Quota.objects.select_related("team", "agent", "key")
        .filter(Q(team=None, agent=None, key=None) | Q(team=team, agent=None, key=None) | Q(agent=agent) | Q(key=key))
        .order_by("id")
    )
)


def of(caller: Caller) -> list[Quota]:
    """The quotas that govern this caller, in the fixed order in which they are taken."""
    agent, key = caller.agent, caller.key
    return _of(caller.team.pk, agent.pk if agent else "", key.pk if key else "")


def window_start(window: str, zone: str, now: datetime) -> datetime | None:
    """When the current window began, in the team's time zone; None for a total."""
    local = now.astimezone(ZoneInfo(zone))
    match window:
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
    caller: Caller, *, executions: int = 0, sandboxes: int = 0, nano_usd: int = 0, fits: str = "", is_open: bool = False
) -> list[int]:
    """Take from every quota of the caller, or from none. Returns the ids of the budgets that now hold `nano_usd`.

    Raises QuotaExceeded or BudgetExhausted with what was needed, what is left and when it resets; the transaction
    around it undoes what was taken before. `fits` says what a smaller request could be. `is_open`: the sandbox changes
    hands, so that ceilings for everybody have counted it already.
    """
    now = timezone.now()
    budgets = []
    for quota in of(caller):
        start = window_start(quota.window, caller.team.time_zone, now)
        if start is not None and quota.window_started_at < start:
            Quota.objects.filter(pk=quota.pk, window_started_at__lt=start).update(used=0, window_started_at=start)
        match quota.unit:
            case Unit.CONCURRENT_EXECUTIONS if executions:
                _take_open(quota, executions)
            case Unit.CONCURRENT_SANDBOXES if sandboxes and not (is_open and quota.is_global):
                _take_open(quota, sandboxes)
            case Unit.EXECUTIONS if executions:
                if not hot.take(quota.pk, "used", executions):
                    raise _exceeded(quota, executions, caller.team.time_zone, now)
            case Unit.NANO_USD if nano_usd:
                if not hot.take(quota.pk, "reserved", nano_usd):
                    raise _exhausted(quota, nano_usd, caller.team.time_zone, now, fits)
                budgets.append(quota.pk)
    return budgets


def settle(budgets: list[int], *, release: int = 0, spend: int = 0) -> None:
    """Give back what was set aside and book what was spent, on the budgets that `take` named."""
    for quota_id in sorted(budgets):  # in the order in which they are taken, so that two never wait for each other
        hot.settle(quota_id, release, spend)


def in_use(quota: Quota, *, lock: bool = False) -> int:
    """What counts against a quota now: open rows for the concurrent units, the counter for the others.

    With `lock`, nobody else can be admitted against it until the transaction ends.
    """
    locked = quota.pk if lock else None
    table = CONCURRENT.get(quota.unit)
    if table is None:
        return quota.used
    for scope in ("key", "agent", "team"):
        if owner := getattr(quota, f"{scope}_id"):
            return hot.count_open(table, scope, owner, locked=locked)
    return hot.count_open(table, None, None, locked=locked)


def _take_open(quota: Quota, asked: int) -> None:
    used = in_use(quota, lock=True)
    if used + asked > quota.limit:
        raise QuotaExceeded(
            f"{quota.scope_name} is at {used} of {quota.limit} {quota.get_unit_display().lower()}.",
            limit=quota.limit,
            used=used,
            needed=asked,
            remaining=max(0, quota.limit - used),
            retry_after=1,
        )


def _facts(quota: Quota, needed: int, zone: str, now: datetime) -> dict:
    quota.refresh_from_db()
    ends = window_end(quota.window, zone, now)
    return {
        "limit": quota.limit,
        "used": quota.used,
        "reserved": quota.reserved,
        "needed": needed,
        "remaining": max(0, quota.limit - quota.used - quota.reserved),
        "resets_at": ends.isoformat() if ends else None,
        "retry_after": max(1, int((ends - now).total_seconds())) if ends else None,
    }


def _resets(facts: dict) -> str:
    return f", resets {facts['resets_at']}" if facts["resets_at"] else ""


def _exceeded(quota: Quota, needed: int, zone: str, now: datetime) -> QuotaExceeded:
    facts = _facts(quota, needed, zone, now)
    return QuotaExceeded(
        f"{quota.scope_name} has used {facts['used']} of {quota.limit} executions per {quota.window}{_resets(facts)}.",
        **facts,
    )


def _exhausted(quota: Quota, needed: int, zone: str, now: datetime, fits: str) -> BudgetExhausted:
    facts = _facts(quota, needed, zone, now)
    left = f"{usd(facts['remaining'])} of {usd(quota.limit)} per {quota.window} left{_resets(facts)}"
    return BudgetExhausted(
        f"This could cost {usd(needed)}; {quota.scope_name} has {left}.",
        remedy=f"{fits} {BudgetExhausted.remedy}".strip(),
        unit=Unit.NANO_USD.value,
        **facts,
    )

"""Quotas as operators read them: what is used and reserved now, of the limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.conf import settings
from django.db.models import Count
from django.template.defaultfilters import filesizeformat
from django.utils import timezone
from django.utils.safestring import SafeString

from executions import quotas
from executions.admin import show
from executions.costs import usd
from executions.models import Execution, Quota, Sandbox, Team
from executions.states import ExecutionState, Unit, Window

COUNTED: dict[str, Any] = {Unit.CONCURRENT_EXECUTIONS: Execution, Unit.CONCURRENT_SANDBOXES: Sandbox}


def with_use(found: Iterable[Quota]) -> list[Quota]:
    """The quotas with `now_used`, in at most two queries however many they are."""
    found = list(found)
    counts = {
        unit: list(
            model.objects.open()
            .exclude(state=ExecutionState.QUEUED)
            .values("team", "agent", "key")
            .annotate(rows=Count("pk"))
        )
        for unit, model in COUNTED.items()
        if any(quota.unit == unit for quota in found)
    }
    for quota in found:
        quota.now_used = _used(quota, counts.get(quota.unit))  # type: ignore[attr-defined]
    return found


def _used(quota: Quota, counts: list[dict[str, Any]] | None) -> int:
    if counts is not None and (quota.user or quota.workflow or quota.backend):
        return quotas.in_use(quota)  # seldom
    if counts is not None:
        for scope in ("key", "agent", "team"):
            if own := getattr(quota, f"{scope}_id"):
                return sum(row["rows"] for row in counts if row[scope] == own)
        return sum(row["rows"] for row in counts)
    start = quotas.window_start(quota.window, zone_of(quota), timezone.now())
    over = start is not None and quota.window_started_at < start  # nobody has asked in this window yet
    if start is not None and over:
        return quotas.spent_since(quota, start) if quota.unit == Unit.NANO_USD else 0
    return quota.used


def zone_of(quota: Quota) -> str:
    owner = quota.key or quota.agent
    team: Team | None = owner.team if owner else quota.team
    return team.time_zone if team else settings.TIME_ZONE


def amount(quota: Quota, value: int) -> str:
    match quota.unit:
        case Unit.NANO_USD:
            return usd(value)
        case Unit.COMPUTE_US:
            return f"{value / 1e6:,.0f} s"
        case Unit.BYTES_STORED:
            return filesizeformat(value)
    return f"{value:,}"


def gauge(quota: Quota) -> SafeString:
    """The bar, and in words: `$0.42 and $0.10 reserved of $5.00`."""
    used = getattr(quota, "now_used", None)
    used = with_use([quota])[0].now_used if used is None else used  # type: ignore[attr-defined]
    aside, limit = quotas.reserved(quota), quotas.ceiling(quota)
    reserved = f" and {amount(quota, aside)} reserved" if aside else ""
    raised = " (raised)" if limit != quota.limit else ""
    text = f"{amount(quota, used)}{reserved} of {amount(quota, limit)}{raised}"
    return show.bar(used, aside, limit, text)


def what(quota: Quota) -> str:
    unit = "money" if quota.unit == Unit.NANO_USD else quota.get_unit_display().lower()
    if quota.unit in COUNTED:
        return unit.replace("concurrent ", "") + " at a time"
    return f"{unit} in total" if quota.window == Window.TOTAL else f"{unit} per {quota.window}"

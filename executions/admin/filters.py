"""What lists can be narrowed to, beyond a column's own values."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from unfold.contrib.filters.admin import DropdownFilter

from executions import backends
from executions.models import Execution
from executions.operations.reap import STALE_BEATS
from executions.states import SandboxState

BEFORE = "before-"
PERIODS = {
    "hour": ("the last hour", timedelta(hours=1)),
    "day": ("the last 24 hours", timedelta(days=1)),
    "week": ("the last 7 days", timedelta(days=7)),
    "month": ("the last 30 days", timedelta(days=30)),
}


def stale(executions: QuerySet) -> QuerySet:
    """Open executions whose runner has not been heard of for three beats."""
    silent = timezone.now() - timedelta(seconds=settings.HEARTBEAT_SECONDS * STALE_BEATS)
    return executions.filter(ended_at__isnull=True, heartbeat_at__lt=silent)


def overdue(sandboxes: QuerySet) -> QuerySet:
    """Open sandboxes beyond their absolute end."""
    return sandboxes.filter(ended_at__isnull=True, leased_until__lt=timezone.now()).exclude(state=SandboxState.RETIRING)


class Since(DropdownFilter):
    """By age; subclasses name the moment."""

    title = "age"
    parameter_name = "since"
    field = "created_at"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, words) for name, (words, _) in PERIODS.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        if self.value() not in PERIODS:
            return queryset
        return queryset.filter(**{f"{self.field}__gte": timezone.now() - PERIODS[self.value()][1]})


class Age(Since):
    """By age, also by what is older: a list of history shows no more than its newest rows."""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        older = [(f"{BEFORE}{name}", f"before {words}") for name, (words, _) in PERIODS.items()]
        return [*super().lookups(request, model_admin), *older]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        end = until(self.value())
        return queryset.filter(**{f"{self.field}__lt": end}) if end else super().queryset(request, queryset)


def until(asked: str | None) -> datetime | None:
    """The moment before which rows are asked for; None where they are not."""
    name = (asked or "").removeprefix(BEFORE)
    return timezone.now() - PERIODS[name][1] if name != asked and name in PERIODS else None


class SinceAt(Since):
    field = "at"


class SinceLast(Since):
    field = "last_at"


class ByBackend(DropdownFilter):
    title = "backend"
    parameter_name = "backend"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(alias, alias) for alias in backends.aliases()]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        return queryset.filter(backend=self.value()) if self.value() else queryset


class OpenOrEnded(DropdownFilter):
    title = "open or ended"
    parameter_name = "open"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        stuck = "no sign of life" if model_admin.model is Execution else "beyond its end"
        return [("yes", "open"), ("stuck", f"open, {stuck}"), ("no", "ended")]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        match self.value():
            case "yes":
                return queryset.filter(ended_at__isnull=True)
            case "no":
                return queryset.filter(ended_at__isnull=False)
            case "stuck":
                return stale(queryset) if queryset.model is Execution else overdue(queryset)
        return queryset


class KeyStanding(DropdownFilter):
    title = "standing"
    parameter_name = "standing"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("live", "live"), ("expired", "expired"), ("revoked", "revoked")]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        late = queryset.filter(revoked_at__isnull=True, expires_at__lte=timezone.now())
        match self.value():
            case "live":
                return queryset.filter(revoked_at__isnull=True).exclude(pk__in=late.values("pk"))
            case "expired":
                return late
            case "revoked":
                return queryset.filter(revoked_at__isnull=False)
        return queryset


class What(DropdownFilter):
    """Kinds of audit events, by what their names begin or end with."""

    title = "what"
    parameter_name = "what"
    KINDS = {
        "configuration": ("configuration", Q(action__endswith="_changed") | Q(action__endswith="_made") | Q(action__endswith="_deleted")),
        "sign_ins": ("sign-ins", Q(action__startswith="sign_")),
        "denials": ("denials", Q(action__in=["access_denied", "sign_in_failed"])),
        "reads": ("code and output that others read", Q(action__endswith="_read")),
        "levers": ("levers", Q(action__in=["execution_cancelled", "sandbox_killed", "key_revoked", "outage_drill", "template_rebuilt"])),
    }  # fmt: skip

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, words) for name, (words, _) in self.KINDS.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        if self.value() not in self.KINDS:
            return queryset
        return queryset.filter(self.KINDS[self.value()][1])

"""What was spent in a period, told apart by whatever is asked; what a month will come to; what it would cost elsewhere."""

from __future__ import annotations

import calendar
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.conf import settings
from django.db.models import F, Q, QuerySet, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone

from executions import costs, newest
from executions.models import Agent, CostTotal, Rate, Team, Usage
from executions.reports.totals import midnight

KINDS = (Usage.RUN, Usage.BOOT, Usage.IDLE, Usage.POOL)
GROUPS = {
    "day": "day", "hour": "start_at", "team": "team__name", "agent": "agent__name", "agent_id": "agent_id", "backend": "backend", "kind": "kind",
    "language": "language", "user": "label", "workflow": "label",
}  # fmt: skip
ONE_BY_ONE = {"execution": "execution_id", "sandbox": "sandbox_id", "session": "sandbox_id"}  # from the usage rows
MOST_DAYS, MOST_HOURLY_DAYS, MOST_LINES = 400, 31, 1000


@dataclass(frozen=True, slots=True)
class Period:
    """Days of the team, both included, of all that is here or of one team, agent or backend."""

    first: date
    last: date
    team: Team | None = None
    agent: Agent | None = None
    backend: str = ""

    @property
    def days(self) -> list[date]:
        return [self.first + timedelta(days=n) for n in range((self.last - self.first).days + 1)]

    @property
    def scope(self) -> dict[str, Any]:
        asked = {"team": self.team, "agent": self.agent, "backend": self.backend}
        return {name: value for name, value in asked.items() if value}

    def usage(self) -> QuerySet[Usage]:
        """The usage rows that ended in it, by the clock of the team, or of the installation where no team is named."""
        zone = self.team.time_zone if self.team else settings.TIME_ZONE
        ends = midnight(self.last + timedelta(days=1), zone)
        return Usage.objects.filter(at__gte=midnight(self.first, zone), at__lt=ends, **self.scope)

    def totals(self, *, grain: str = CostTotal.DAY, by: str = CostTotal.ALL) -> QuerySet[CostTotal]:
        found = CostTotal.objects.filter(grain=grain, by=by, day__gte=self.first, day__lte=self.last)
        return found.filter(**self.scope)


@dataclass(slots=True)
class Line:
    """Sums of one group. What had no known price is kept apart: it was charged at the ceiling rate."""

    keys: tuple[Any, ...]
    nano_usd: int = 0
    unpriced_nano_usd: int = 0
    duration_us: int = 0
    unpriced_us: int = 0
    vcpu_us: int = 0
    mib_ms: int = 0
    stretches: int = 0
    split: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    split_us: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    unpriced_kinds: set[str] = field(default_factory=set)

    @property
    def charged_nano_usd(self) -> int:
        """What the ledger says: known prices, and the ceiling for the rest."""
        return self.nano_usd + self.unpriced_nano_usd

    @property
    def shown_nano_usd(self) -> int | None:
        """None where nothing in it had a price: unpriced is not zero."""
        return None if self.unpriced_us and self.unpriced_us == self.duration_us else self.nano_usd

    def shown_of(self, kind: str) -> int | None:
        """As `shown_nano_usd`, of one kind."""
        return None if kind in self.unpriced_kinds and not self.split[kind] else self.split[kind]

    @property
    def seconds(self) -> float:
        return self.duration_us / 1_000_000

    def add(
        self, kind: str, is_priced: bool, nano_usd: int, us: int, vcpu_us: int, mib_ms: int, stretches: int
    ) -> None:
        if is_priced:
            self.nano_usd += nano_usd
            self.split[kind] += nano_usd
        else:
            self.unpriced_nano_usd += nano_usd
            self.unpriced_us += us
            self.unpriced_kinds.add(kind)
        self.duration_us += us
        self.split_us[kind] += us
        self.vcpu_us += vcpu_us
        self.mib_ms += mib_ms
        self.stretches += stretches


def lines(period: Period, *groups: str) -> list[Line]:
    """One line for each combination of the groups, in their order; without groups one line of all, if there is any."""
    if ONE_BY_ONE.keys() & set(groups):
        return _one_by_one(period, groups[0])
    by = next((group for group in groups if group in (CostTotal.USER, CostTotal.WORKFLOW)), CostTotal.ALL)
    grain = CostTotal.HOUR if "hour" in groups else CostTotal.DAY
    columns = [GROUPS[group] for group in groups]
    found = period.totals(grain=grain, by=by).order_by(*columns)
    sums = {
        "nano": Sum("cost_nano_usd"),
        "us": Sum("duration_us"),
        "vcpu": Sum(F("duration_us") * F("cpu_count")),
        "mib": Sum(F("duration_us") / 1000 * F("memory_mib")),
        "count": Sum("stretches"),
    }
    return _folded(found.values_list(*columns, "kind", "is_priced").annotate(**sums), len(columns))


def _one_by_one(period: Period, group: str) -> list[Line]:
    """The dearest executions, sandboxes or sessions, from their usage rows."""
    column = ONE_BY_ONE[group]
    usage = period.usage().exclude(**{f"{column}__isnull": True})
    if group == "session":
        usage = usage.filter(sandbox__kept=True)
    dearest = usage.values(column).annotate(nano=Sum("cost_nano_usd")).order_by("-nano", column)
    chosen = [row[column] for row in dearest[:MOST_LINES]]
    sums = {
        "nano": Sum("cost_nano_usd"),
        "us": Sum("duration_us"),
        "vcpu": Sum(F("duration_us") * F("sandbox__cpu_count")),
        "mib": Sum(F("duration_us") / 1000 * F("sandbox__memory_mib")),
        "count": Sum(1),
    }
    found = usage.filter(**{f"{column}__in": chosen}).values_list(column, "kind", "sandbox__is_priced").annotate(**sums)
    return sorted(_folded(found.order_by(), 1), key=lambda line: (-line.charged_nano_usd, line.keys))


def _folded(found: Iterable[Sequence[Any]], width: int) -> list[Line]:
    made: dict[tuple[Any, ...], Line] = {}
    for row in found:
        keys = tuple(row[:width])
        made.setdefault(keys, Line(keys)).add(*row[width:])
    return list(made.values())


def total(period: Period) -> Line:
    return next(iter(lines(period)), Line(()))


def today(team: Team | None = None, **scope: Any) -> int:
    """Nano-dollars of the team's day so far (or of the installation's), with what is in no total yet."""
    zone = team.time_zone if team else settings.TIME_ZONE
    day = timezone.now().astimezone(ZoneInfo(zone)).date()
    scope |= {"team": team} if team else {}
    counted = CostTotal.objects.filter(grain=CostTotal.DAY, by=CostTotal.ALL, day=day, **scope)
    fresh = Usage.objects.filter(is_counted=False).alias(since=Coalesce("at", "at"))  # by the index of such rows alone
    fresh = fresh.filter(since__gte=midnight(day, zone))
    if scope:
        fresh = newest.also(fresh, **{f"{name}_id": row.pk for name, row in scope.items()})
    return sum(rows.aggregate(total=Sum("cost_nano_usd"))["total"] or 0 for rows in (counted, fresh))


# The month


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a month will come to, if each coming day costs what the same weekday cost in the last seven."""

    so_far_nano_usd: int
    rest_nano_usd: int
    days_known: int  # of the last seven full days, those since the first that cost anything

    @property
    def nano_usd(self) -> int:
        return self.so_far_nano_usd + self.rest_nano_usd


def forecast(today: date, **scope: Any) -> Forecast:
    """Today at least what it has cost, each later day the same weekday of the last seven; the mean where that is not known."""
    month = Period(today.replace(day=1), today, **scope)
    week = Period(today - timedelta(days=7), today - timedelta(days=1), **scope)
    spent = {
        line.keys[0]: line.charged_nano_usd
        for line in lines(Period(min(month.first, week.first), today, **scope), "day")
    }
    began = min((day for day in week.days if spent.get(day)), default=today)
    known = [day for day in week.days if day >= began]
    mean = sum(spent.get(day, 0) for day in known) // len(known) if known else 0
    by_weekday = {day.weekday(): spent.get(day, 0) for day in known}
    last = calendar.monthrange(today.year, today.month)[1]
    coming = [by_weekday.get(today.replace(day=n).weekday(), mean) for n in range(today.day + 1, last + 1)]
    still_today = max(0, by_weekday.get(today.weekday(), mean) - spent.get(today, 0))
    return Forecast(sum(spent.get(day, 0) for day in month.days), still_today + sum(coming), len(known))


# What stands whether it is used or not, and what another choice would cost


@dataclass(frozen=True, slots=True)
class Plan:
    """A provider's plan as published."""

    name: str
    backend: str
    month_nano_usd: int
    concurrent_sandboxes: int
    creations_per_second: int
    session_hours: int


PLANS_SOURCE = "e2b.dev/docs/billing and /docs/sandbox/rate-limits, November 2026"
PLANS = (
    Plan("Hobby", "e2b", 0, concurrent_sandboxes=20, creations_per_second=1, session_hours=1),
    Plan("Pro", "e2b", 150 * costs.NANO, concurrent_sandboxes=100, creations_per_second=5, session_hours=24),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The period's sandbox time at the prices of one backend and plan. None: a price or the machine's cost is not known."""

    backend: str
    plan: str
    usage_nano_usd: int | None
    standing_nano_usd: int | None
    limits: str = ""

    @property
    def nano_usd(self) -> int | None:
        if self.usage_nano_usd is None:
            return None
        return self.usage_nano_usd + (self.standing_nano_usd or 0)


def what_if(period: Period, aliases: Iterable[str]) -> list[Choice]:
    """The same seconds in sandboxes of the same sizes, at each backend's present rates and each published plan's fee."""
    sizes = list(period.totals().order_by().values_list("cpu_count", "memory_mib").annotate(us=Sum("duration_us")))
    now, choices = timezone.now(), []
    standing = standing_costs(period)
    for alias in aliases:
        prices = [(us, costs.price(alias, cpu_count=cpu, memory_mib=mib, at=now)) for cpu, mib, us in sizes]
        known = all(price.is_known for _, price in prices)
        usage = sum(costs.cost(us, price.nano_usd_per_second) for us, price in prices) if known else None
        plans = [plan for plan in PLANS if plan.backend == alias]
        for plan in plans:
            fee = sum(_of_month(plan.month_nano_usd, day) for day in period.days)
            said = f"{plan.concurrent_sandboxes} sandboxes at once, {plan.creations_per_second} new a second"
            choices.append(Choice(alias, plan.name, usage, fee, said))
        if not plans:
            choices.append(Choice(alias, "", usage, standing.get(alias)))
    return choices


def standing_costs(period: Period) -> dict[str, int]:
    """What plans and machines cost in the period by the rates of each day, used or not; by backend."""
    rates = list(Rate.objects.filter(meter__in=[Rate.HOUR, Rate.MONTH]).order_by("valid_from"))
    found: dict[str, int] = defaultdict(int)
    for day in period.days:
        noon = datetime.combine(day, time(12), tzinfo=UTC)
        valid = {
            (r.backend, r.meter): r for r in rates if r.valid_from <= noon and (not r.valid_to or r.valid_to > noon)
        }
        for (alias, meter), rate in valid.items():
            found[alias] += 24 * rate.nano_usd if meter == Rate.HOUR else _of_month(rate.nano_usd, day)
    return dict(found)


def _of_month(nano_usd: int, day: date) -> int:
    """The day's part of a monthly fee."""
    return nano_usd // calendar.monthrange(day.year, day.month)[1]


def unrated() -> list[str]:
    """Backends that are configured and have no rates now: what they run is charged at the ceiling, or refused."""
    now = timezone.now()
    valid = Q(valid_from__lte=now) & (Q(valid_to=None) | Q(valid_to__gt=now))
    rated: dict[str, set[str]] = defaultdict(set)
    for alias, meter in Rate.objects.filter(valid).values_list("backend", "meter"):
        rated[alias].add(meter)
    return [alias for alias in settings.SANDBOXES if not {Rate.VCPU, Rate.GIB} <= rated[alias]]

"""Usage rows added up by UTC hour and by the team's day, each row exactly once, however late it comes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from django.db import connection, transaction

from executions.models import CostTotal, Usage

BATCH = 2000  # usage rows of one transaction
AT_ONCE = 500  # totals of one INSERT
HOUR = timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)

Sums = dict[tuple[Any, ...], list[int]]


def roll_up(batches: int | None = None) -> int:
    """Add what is not counted yet to the totals, all of it or so many batches; how many usage rows that was.

    A row and its mark are one transaction, and totals grow in the database, so that any number of processes may do
    this at once and none of a row is counted twice.
    """
    counted = 0
    while batches is None or batches > 0:
        found = _count_some()
        counted += found
        if found < BATCH:
            break
        batches = batches and batches - 1
    return counted


def rebuild() -> int:
    """Forget all totals and add up every usage row again, as after a change of a team's time zone."""
    with transaction.atomic():
        CostTotal.objects.all().delete()
        Usage.objects.filter(is_counted=True).update(is_counted=False)
    return roll_up()


def pending(most: int = 100_000) -> int:
    """How many usage rows are in no total yet; counted up to `most`."""
    return Usage.objects.filter(is_counted=False)[:most].count()


@transaction.atomic
def _count_some() -> int:
    uncounted = Usage.objects.select_for_update(skip_locked=True).filter(is_counted=False)
    ids = list(uncounted.order_by("id").values_list("id", flat=True)[:BATCH])
    if not ids:
        return 0
    sums: Sums = defaultdict(lambda: [0, 0, 0])
    found = Usage.objects.filter(id__in=ids).values_list(
        "team__time_zone", "at", "duration_us", "cost_nano_usd", "team_id", "agent_id", "backend", "kind",
        "execution__language", "sandbox__cpu_count", "sandbox__memory_mib", "sandbox__is_priced",
        "execution__user", "execution__workflow",
    )  # fmt: skip
    for row in found:
        _add(sums, *row)
    _store(sums)
    Usage.objects.filter(id__in=ids).update(is_counted=True)
    return len(ids)


def _add(
    sums: Sums, zone: str, at: datetime, duration_us: int, cost: int, team: str, agent: str, backend: str, kind: str,
    language: str | None, cpu_count: int, memory_mib: int, is_priced: bool, user: str | None, workflow: str | None,
) -> None:  # fmt: skip
    """One stretch of time, cut where hours and days begin."""
    since = at - duration_us * MICROSECOND
    what = (agent, backend, kind, language or "", cpu_count, memory_mib, is_priced)
    for start, *part in cut(since, at, cost, utc_hour, lambda hour: hour + HOUR):
        _grow(sums[CostTotal.HOUR, CostTotal.ALL, start.date(), team, "", start, *what], part)
    begins, follows = days_of(zone)
    labels = ((CostTotal.ALL, ""), (CostTotal.USER, user or ""), (CostTotal.WORKFLOW, workflow or ""))
    for start, *part in cut(since, at, cost, begins, follows):
        day = start.astimezone(ZoneInfo(zone)).date()
        for by, label in labels:
            _grow(sums[CostTotal.DAY, by, day, team, label, start, *what], part)


def _grow(held: list[int], part: list[int]) -> None:
    for n, amount in enumerate(part):
        held[n] += amount


def cut(
    since: datetime,
    until: datetime,
    cost: int,
    begins: Callable[[datetime], datetime],
    follows: Callable[[datetime], datetime],
) -> Iterator[tuple[datetime, int, int, int]]:
    """(start, stretches, µs, nano-dollars) of each bucket that the stretch touches; the parts sum to the whole exactly.

    `begins` gives the start of a moment's bucket and `follows` the next start. It counts as a stretch where it ends.
    """
    whole = (until - since) // MICROSECOND
    start, done_us, done = begins(since), 0, 0
    while (end := follows(start)) < until:
        passed = (end - since) // MICROSECOND
        share = cost * passed // whole
        yield start, 0, passed - done_us, share - done
        start, done_us, done = end, passed, share
    yield start, 1, whole - done_us, cost - done


def utc_hour(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


@lru_cache
def days_of(zone: str) -> tuple[Callable[[datetime], datetime], Callable[[datetime], datetime]]:
    """The start of a moment's day in that zone and the start of the next one, both in UTC: 23, 24 or 25 hours apart."""
    place = ZoneInfo(zone)

    def begins(at: datetime) -> datetime:
        return midnight(at.astimezone(place).date(), zone)

    def follows(start: datetime) -> datetime:
        return midnight(start.astimezone(place).date() + timedelta(days=1), zone)

    return begins, follows


@lru_cache(maxsize=4096)
def midnight(day: date, zone: str) -> datetime:
    """When that day began there, in UTC; the clock's change where midnight itself was skipped."""
    return datetime.combine(day, time.min, tzinfo=ZoneInfo(zone)).astimezone(UTC)


def _store(sums: Sums) -> None:
    """Grow the totals, in one order, so that two processes never wait for each other."""
    ops, table = connection.ops, CostTotal._meta.db_table
    fields: list[Any] = [CostTotal._meta.get_field(name) for name in (*CostTotal.KEY, *CostTotal.SUMS)]
    columns = [ops.quote_name(field.column) for field in fields]
    key = ", ".join(columns[: len(CostTotal.KEY)])
    grown = ", ".join(f"{c} = {table}.{c} + excluded.{c}" for c in columns[len(CostTotal.KEY) :])
    ordered = sorted(sums)
    for start in range(0, len(ordered), AT_ONCE):
        batch: list[list[Any]] = []
        for grain, by, day, team, label, begun, *what in ordered[start : start + AT_ONCE]:
            moments = ops.adapt_datefield_value(day), ops.adapt_datetimefield_value(begun)
            batch.append([grain, by, moments[0], team, label, moments[1], *what])
            batch[-1] += sums[grain, by, day, team, label, begun, *what]
        if connection.vendor == "postgresql":  # a list for each column: its driver takes 10 µs for each placeholder
            source = f"SELECT * FROM unnest({', '.join(f'%s::{field.db_type(connection)}[]' for field in fields)})"
            values: list[Any] = [list(column) for column in zip(*batch, strict=True)]
        else:
            places = f"({', '.join(['%s'] * len(columns))})"
            source = f"VALUES {', '.join([places] * len(batch))}"
            values = [value for row in batch for value in row]
        with connection.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) {source} ON CONFLICT ({key}) DO UPDATE SET {grown}", values
            )

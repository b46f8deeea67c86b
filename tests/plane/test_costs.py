"""Costs add up: by hour and by day, across midnight and the clock's changes, once each however often they are counted."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from django.db import connection
from django.db.models import Sum

from executions import costs
from executions.models import Agent, CostTotal, Execution, Rate, Sandbox, Team, Template, Usage
from executions.reports import spend, totals
from executions.reports.spend import Period

pytestmark = pytest.mark.django_db
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture
def template(db):
    return Template.objects.create(name="default")


@pytest.fixture
def sandbox(agent, template):
    return a_sandbox(agent, template)


def a_sandbox(agent, template, **fields):
    return Sandbox.objects.create(
        team=agent.team, agent=agent, template=template, backend="e2b", leased_until=NOON, **fields
    )


def spent(sandbox: Sandbox, until: datetime, lasted: timedelta, nano_usd: int, **fields) -> Usage:
    return Usage.objects.create(
        team=sandbox.team,
        agent=sandbox.agent,
        sandbox=sandbox,
        at=until,
        duration_us=lasted // timedelta(microseconds=1),
        cost_nano_usd=nano_usd,
        **{"backend": sandbox.backend, "kind": "run", "rate_nano_usd_per_second": 1, **fields},
    )


def a_run(sandbox: Sandbox, **fields) -> Execution:
    return Execution.objects.create(
        team=sandbox.team, agent=sandbox.agent, sandbox=sandbox, code="1", code_sha256="0", **fields
    )


def rows() -> list[tuple]:
    return sorted(CostTotal.objects.values_list(*CostTotal.KEY, *CostTotal.SUMS))


def of_days(period: Period) -> dict[date, tuple[int, float]]:
    return {line.keys[0]: (line.nano_usd, line.seconds) for line in spend.lines(period, "day")}


def test_a_stretch_across_midnight_is_split_at_the_teams_midnight(team, sandbox):
    team.time_zone = "Asia/Kathmandu"  # midnight is at 18:15 UTC
    team.save()
    spent(sandbox, datetime(2026, 11, 24, 18, 15, 30, tzinfo=UTC), 90 * SECOND, 901)

    totals.roll_up()

    told = of_days(Period(date(2026, 11, 24), date(2026, 11, 25), team))
    assert told == {date(2026, 11, 24): (600, 60.0), date(2026, 11, 25): (301, 30.0)}
    hours = CostTotal.objects.filter(grain="hour").values_list("start_at__hour", "cost_nano_usd", "stretches")
    assert list(hours) == [(18, 901, 1)]


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", date(2026, 3, 29), 23),
        ("Europe/Berlin", date(2026, 10, 25), 25),
        ("Australia/Lord_Howe", date(2026, 4, 5), 24.5),
        ("America/Havana", date(2026, 3, 8), 23),  # midnight itself is skipped
        ("America/Havana", date(2026, 11, 1), 25),  # and comes twice
        ("UTC", date(2026, 3, 29), 24),
    ],
)
def test_a_day_is_as_long_as_its_clock_says(team, sandbox, zone, day, hours):
    team.time_zone = zone
    team.save()
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    spent(sandbox, start + timedelta(days=3), timedelta(days=6), 6 * 86_400_000)

    totals.roll_up()

    told = of_days(Period(day - timedelta(days=9), day + timedelta(days=9), team))
    assert told[day] == (hours * 3_600_000, hours * 3600)
    assert sum(nano for nano, _ in told.values()) == 6 * 86_400_000


def test_no_nano_dollar_is_lost_or_made_by_cutting(sandbox):
    for n in range(40):
        spent(sandbox, NOON + timedelta(hours=7 * n, microseconds=n), timedelta(hours=5, seconds=3 * n), 1_000_003 + n)

    totals.roll_up()

    whole = Usage.objects.aggregate(nano=Sum("cost_nano_usd"), us=Sum("duration_us"))
    for grain in ("hour", "day"):
        kept = CostTotal.objects.filter(grain=grain, by="")
        assert kept.aggregate(nano=Sum("cost_nano_usd"), us=Sum("duration_us")) == whole
        assert kept.aggregate(count=Sum("stretches"))["count"] == 40


def test_counting_again_changes_nothing_and_a_late_row_is_added(sandbox):
    spent(sandbox, NOON, 60 * SECOND, 600)
    assert totals.roll_up() == 1
    first = rows()

    assert totals.roll_up() == 0
    assert rows() == first
    spent(sandbox, NOON - timedelta(days=3), 10 * SECOND, 100)
    assert totals.roll_up() == 1
    assert of_days(Period(date(2026, 11, 20), date(2026, 11, 24))) == {
        date(2026, 11, 21): (100, 10.0),
        date(2026, 11, 24): (600, 60.0),
    }


def test_built_anew_the_totals_are_the_same(monkeypatch, agent, template):
    monkeypatch.setattr(totals, "BATCH", 7)
    for n in range(30):
        sandbox = a_sandbox(agent, template, memory_mib=512 * (1 + n % 2))
        run = a_run(sandbox, user=f"u{n % 3}", workflow=f"w{n % 4}", language="bash" if n % 2 else "python")
        spent(sandbox, NOON + timedelta(hours=n), timedelta(hours=2), 1000 + n, execution=run)
        spent(sandbox, NOON + timedelta(hours=n, minutes=5), timedelta(minutes=5), 9, kind="idle")
        totals.roll_up()
    first = rows()

    assert totals.rebuild() == 60

    assert rows() == first


def test_each_way_of_telling_apart_sums_to_the_same(agent, template, team):
    other = Agent.objects.create(team=team, name="night")
    for n in range(12):
        sandbox = a_sandbox(other if n % 3 else agent, template, kept=n % 2 == 0)
        run = a_run(sandbox, user="ann" if n % 2 else "", workflow="w", language="bash" if n % 4 else "python")
        spent(sandbox, NOON, 5 * SECOND, 100 + n, execution=run)
        spent(sandbox, NOON, SECOND, 7, execution=run, kind="boot")
        spent(sandbox, NOON, 3 * SECOND, 11, kind="idle" if n % 2 else "pool")
    totals.roll_up()
    period = Period(NOON.date(), NOON.date(), team)
    whole = Usage.objects.aggregate(nano=Sum("cost_nano_usd"))["nano"]

    for groups in (
        ("agent",),
        ("backend",),
        ("kind",),
        ("language",),
        ("user",),
        ("workflow",),
        ("day", "agent", "kind"),
    ):
        found = spend.lines(period, *groups)
        assert sum(line.nano_usd for line in found) == whole, groups
        assert all(sum(line.split.values()) == line.nano_usd for line in found)
    assert sum(line.nano_usd for line in spend.lines(period, "sandbox")) == whole
    split = spend.total(period).split
    assert split == {"run": sum(range(100, 112)), "boot": 84, "idle": 66, "pool": 66}
    executions = spend.lines(period, "execution")
    assert sum(line.nano_usd for line in executions) == split["run"] + split["boot"]
    assert executions[0].nano_usd == 118
    sessions = spend.lines(period, "session")
    assert len(sessions) == 6
    assert {line.keys[0] for line in spend.lines(period, "user")} == {"", "ann"}
    workflow = {line.keys[0]: line.nano_usd for line in spend.lines(period, "workflow")}
    assert workflow == {"w": split["run"] + split["boot"], "": 132}


def test_what_has_no_rate_is_unpriced_and_never_zero(agent, template, settings):
    price = costs.price("mars", cpu_count=1, memory_mib=512, at=NOON)
    sandbox = a_sandbox(agent, template, is_priced=price.is_known)
    spent(sandbox, NOON, 10 * SECOND, 10 * price.nano_usd_per_second)

    totals.roll_up()

    (line,) = spend.lines(Period(NOON.date(), NOON.date()), "agent")
    assert price == costs.Price(settings.RATE_CEILING_NANO_USD_PER_SECOND, is_known=False)
    assert (line.shown_nano_usd, costs.usd(line.shown_nano_usd)) == (None, "unpriced")
    assert (line.nano_usd, line.unpriced_nano_usd, line.seconds) == (0, 1_000_000, 10)
    assert line.charged_nano_usd == 1_000_000


def test_a_sandbox_knows_whether_its_price_was_known(caller, settings):
    from executions import operations
    from tests.plane.conftest import asks

    Rate.objects.create(backend="first", meter=Rate.VCPU, nano_usd=14_000, valid_from=NOON - timedelta(days=9000))
    half = operations.submit(caller=caller, request=asks()).sandbox
    Rate.objects.create(backend="first", meter=Rate.GIB, nano_usd=4_500, valid_from=NOON - timedelta(days=9000))
    whole = operations.submit(caller=caller, request=asks()).sandbox

    assert (half.is_priced, half.rate_nano_usd_per_second) == (False, settings.RATE_CEILING_NANO_USD_PER_SECOND)
    assert (whole.is_priced, whole.rate_nano_usd_per_second) == (True, 18_500)


def test_a_rate_holds_within_its_time_and_the_youngest_wins(db):
    for meter in (Rate.VCPU, Rate.GIB):
        Rate.objects.create(backend="b", meter=meter, nano_usd=100, valid_from=NOON, valid_to=NOON + timedelta(days=9))
        Rate.objects.create(backend="b", meter=meter, nano_usd=300, valid_from=NOON + timedelta(days=2))

    def at(days: float):
        return costs.price("b", cpu_count=2, memory_mib=1024, at=NOON + timedelta(days=days))

    assert [at(n).nano_usd_per_second for n in (0, 1.9, 2, 8, 30)] == [300, 300, 900, 900, 900]
    assert not at(-1).is_known


def test_a_month_is_forecast_by_the_weekdays_of_the_last_seven_days(sandbox):
    today = date(2026, 11, 24)  # a Tuesday; six days of November are left
    for n in range(1, 8):
        spent(sandbox, datetime(2026, 11, 24 - n, 10, tzinfo=UTC), SECOND, 100 * n)
    spent(sandbox, NOON, SECOND, 50)
    totals.roll_up()

    told = spend.forecast(today)

    # Wednesday 18th to Monday 23rd cost 600 to 100, Tuesday 17th 700: today is 650 short of that
    assert told.so_far_nano_usd == 2850
    assert told.rest_nano_usd == 650 + 600 + 500 + 400 + 300 + 200 + 100
    assert told.days_known == 7


def test_a_forecast_from_one_known_day_takes_its_mean(sandbox):
    spent(sandbox, datetime(2026, 11, 23, 10, tzinfo=UTC), SECOND, 100)
    totals.roll_up()

    told = spend.forecast(date(2026, 11, 24))

    assert (told.days_known, told.so_far_nano_usd, told.rest_nano_usd) == (1, 100, 700)
    assert spend.forecast(date(2026, 12, 31)).nano_usd == 0


def test_the_same_time_is_priced_on_another_backend_and_plan(sandbox, seeded):
    spent(sandbox, NOON, 1000 * SECOND, 1)
    totals.roll_up()
    day = Period(NOON.date(), NOON.date())

    told = {(c.backend, c.plan): c for c in spend.what_if(day, ["e2b", "local", "mars"])}

    assert told["e2b", "Hobby"].nano_usd == 1000 * (14_000 + 2_250)
    assert told["e2b", "Pro"].standing_nano_usd == 150 * costs.NANO // 30
    assert told["local", ""].usage_nano_usd == 1000 * (2_778 + 278)
    assert told["mars", ""].nano_usd is None
    assert spend.unrated() == ["first", "second", "third"]


def test_a_plan_and_a_machine_stand_whether_they_are_used_or_not(seeded):
    Rate.objects.filter(backend="e2b", meter=Rate.MONTH).delete()
    ends = datetime(2026, 11, 3, tzinfo=UTC)
    Rate.objects.create(
        backend="e2b", meter=Rate.MONTH, nano_usd=30_000, valid_from=ends - timedelta(days=90), valid_to=ends
    )
    Rate.objects.create(backend="local", meter=Rate.HOUR, nano_usd=10, valid_from=ends - timedelta(days=90))

    assert spend.standing_costs(Period(date(2026, 11, 1), date(2026, 11, 4))) == {"e2b": 2000, "local": 960}


def test_totals_are_found_by_index_and_the_report_reads_no_usage_row(agent, template):
    Usage.objects.bulk_create([spent_row(agent, a_sandbox(agent, template), n) for n in range(3)])
    totals.roll_up()
    period = Period(NOON.date() - timedelta(days=29), NOON.date())
    found = period.totals().values("day", "backend", "kind").annotate(nano=Sum("cost_nano_usd"))
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET LOCAL enable_seqscan = off")
    plans = [queryset.explain() for queryset in (found, found.filter(team=agent.team), uncounted())]

    names = {"cost_total_once", "cost_total_of_team", "sqlite_autoindex_executions_costtotal_1"}
    assert all(any(name in plan for name in names) for plan in plans[:2]), plans
    assert "usage_not_counted" in plans[2], plans


def uncounted():
    return Usage.objects.filter(is_counted=False).order_by("id").values("id")[: totals.BATCH]


def spent_row(agent, sandbox, n: int) -> Usage:
    return Usage(
        team=agent.team, agent=agent, sandbox=sandbox, backend="e2b", kind="run", at=NOON + n * SECOND,
        duration_us=1_000_000, cost_nano_usd=5, rate_nano_usd_per_second=5,
    )  # fmt: skip


@pytest.mark.django_db(transaction=True)
def test_two_that_count_at_once_count_each_row_once(agent, template, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    monkeypatch.setattr(totals, "BATCH", 5)
    sandbox = a_sandbox(agent, template)
    Usage.objects.bulk_create([spent_row(agent, sandbox, n) for n in range(100)])
    start = Barrier(4)

    def count() -> int:
        start.wait()
        try:
            counted = 0
            while found := totals.roll_up(batches=1):
                counted += found
            return counted
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as threads:
        counted = [job.result() for job in [threads.submit(count) for _ in range(4)]]
    totals.roll_up()

    assert sum(counted) <= 100
    assert spend.total(Period(NOON.date(), NOON.date())).nano_usd == 500
    assert Team.objects.count() == 1

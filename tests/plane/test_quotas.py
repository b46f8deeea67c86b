"""Ceilings hold: one by one, together, and when many ask at once."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from django.db import connection, transaction

from executions import operations, quotas
from executions.costs import NANO
from executions.errors import BudgetExhausted, QuotaExceeded
from executions.models import Execution, LedgerEntry, Quota, Refusal, Sandbox
from executions.states import Unit, Window
from tests.plane.conftest import asks


def ceiling(caller, unit, limit, window=Window.TOTAL, **scope) -> Quota:
    return Quota.objects.create(unit=unit, window=window, limit=limit, **(scope or {"team": caller.team}))


@pytest.mark.django_db
def test_what_exceeds_a_quota_is_refused_with_the_numbers_and_stored(caller):
    ceiling(caller, Unit.CONCURRENT_EXECUTIONS, 1)
    operations.submit(caller=caller, request=asks())

    with pytest.raises(QuotaExceeded) as refused:
        operations.submit(caller=caller, request=asks())

    facts = {"unit": "concurrent_executions", "limit": 1, "used": 1, "needed": 1, "remaining": 0, "retry_after": 1}
    assert refused.value.facts == facts
    assert Execution.objects.count() == Sandbox.objects.count() == 1
    assert Refusal.objects.get().code == "quota_exceeded"


@pytest.mark.django_db
def test_a_refusal_that_repeats_is_counted_not_stored_again(caller):
    ceiling(caller, Unit.EXECUTIONS, 0)
    for _ in range(3):
        with pytest.raises(QuotaExceeded):
            operations.submit(caller=caller, request=asks())

    assert Refusal.objects.get().times == 3


@pytest.mark.django_db
@pytest.mark.parametrize("scope", ["team", "agent", "key", "global"])
def test_a_quota_of_each_scope_is_found(caller, scope):
    owner = {} if scope == "global" else {scope: getattr(caller, scope)}
    Quota.objects.create(unit=Unit.EXECUTIONS, window=Window.TOTAL, limit=0, **owner)

    with pytest.raises(QuotaExceeded):
        operations.submit(caller=caller, request=asks())


@pytest.mark.django_db
def test_a_quota_of_another_team_agent_or_key_does_not_bind(caller, eve):
    Quota.objects.create(unit=Unit.EXECUTIONS, window=Window.TOTAL, limit=0, team=eve.memberships.get().team)

    assert operations.submit(caller=caller, request=asks()).pk


@pytest.mark.django_db
def test_all_or_nothing_a_later_refusal_undoes_what_an_earlier_quota_gave(caller):
    counted = ceiling(caller, Unit.EXECUTIONS, 10)
    ceiling(caller, Unit.CONCURRENT_SANDBOXES, 0)

    with pytest.raises(QuotaExceeded):
        operations.submit(caller=caller, request=asks())

    counted.refresh_from_db()
    assert counted.used == 0


@pytest.mark.django_db
def test_a_budget_that_does_not_cover_the_worst_case_refuses_before_anything_runs(caller):
    caller.agent.route = ["first"]
    caller.agent.save()
    budget = ceiling(caller, Unit.NANO_USD, 1000, Window.DAY)  # an unpriced backend costs the ceiling rate

    with pytest.raises(BudgetExhausted) as refused:
        operations.submit(caller=caller, request=asks())

    assert refused.value.facts["needed"] == 90 * 100_000  # 60 s and 30 s of margin at the ceiling rate
    assert refused.value.facts["remaining"] == 1000
    assert refused.value.facts["resets_at"].endswith("+00:00")
    assert "engines" not in refused.value.detail.lower() or "team" in refused.value.detail
    budget.refresh_from_db()
    assert budget.reserved == budget.used == 0


@pytest.mark.django_db
def test_what_was_reserved_and_not_spent_comes_back(caller):
    budget = ceiling(caller, Unit.NANO_USD, NANO, Window.DAY)

    async_run(caller)

    budget.refresh_from_db()
    sandbox = Sandbox.objects.get()
    assert budget.reserved == 0 == sandbox.reserved_nano_usd
    assert budget.used == sandbox.spent_nano_usd == Execution.objects.get().cost_nano_usd > 0
    sums = {
        k: sum(e.amount_nano_usd for e in LedgerEntry.objects.filter(kind=k)) for k in ("reserve", "release", "spend")
    }
    assert sums["reserve"] == sums["release"] + sums["spend"] == 90 * 100_000


def async_run(caller):
    from asgiref.sync import async_to_sync

    return async_to_sync(operations.execute)(caller=caller, request=asks())


@pytest.mark.django_db
def test_a_new_day_begins_at_the_teams_own_midnight(caller):
    caller.team.time_zone = "Asia/Tokyo"
    caller.team.save()
    ceiling(caller, Unit.EXECUTIONS, 1, Window.DAY)
    with time_machine.travel(datetime(2026, 11, 24, 14, 59, tzinfo=UTC), tick=False):
        Quota.objects.update(window_started_at=datetime(2026, 11, 23, 15, 0, tzinfo=UTC))
        operations.submit(caller=caller, request=asks())
        with pytest.raises(QuotaExceeded) as refused:
            operations.submit(caller=caller, request=asks())
    assert refused.value.facts["retry_after"] == 60

    with time_machine.travel(datetime(2026, 11, 24, 15, 0, 1, tzinfo=UTC), tick=False):
        assert operations.submit(caller=caller, request=asks()).pk


@pytest.mark.parametrize(
    ("window", "zone", "now", "start", "end"),
    [
        ("minute", "UTC", "2026-11-24T10:20:30", "2026-11-24T10:20:00", "2026-11-24T10:21:00"),
        ("hour", "UTC", "2026-11-24T10:20:30", "2026-11-24T10:00:00", "2026-11-24T11:00:00"),
        ("month", "UTC", "2026-12-24T10:20:30", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
        ("day", "Europe/Berlin", "2026-10-25T10:00:00", "2026-10-24T22:00:00", "2026-10-25T23:00:00"),  # 25 hours
        ("day", "Europe/Berlin", "2026-03-29T10:00:00", "2026-03-28T23:00:00", "2026-03-29T22:00:00"),  # 23 hours
    ],
)
def test_windows_begin_and_end_by_the_calendar(window, zone, now, start, end):
    def at(text):
        return datetime.fromisoformat(text).replace(tzinfo=UTC)

    assert quotas.window_start(window, zone, at(now)) == at(start)
    assert quotas.window_end(window, zone, at(now)) == at(end)
    assert quotas.window_start("total", zone, at(now)) is None


def race(count: int, act) -> list:
    """Everybody at once, each on a thread and a connection of its own; exceptions are results."""
    barrier, results = threading.Barrier(count), []

    def racer():
        barrier.wait()
        try:
            results.append(act())
        except Exception as e:
            results.append(e)
        finally:
            connection.close()

    threads = [threading.Thread(target=racer) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.django_db(transaction=True)
def test_ten_at_once_against_a_quota_of_three_never_see_four(caller):
    ceiling(caller, Unit.CONCURRENT_EXECUTIONS, 3)

    results = race(10, lambda: operations.submit(caller=caller, request=asks()))

    assert sum(isinstance(r, Execution) for r in results) == 3 == Execution.objects.count(), results
    assert sum(isinstance(r, QuotaExceeded) for r in results) == 7


@pytest.mark.django_db(transaction=True)
def test_ten_at_once_cannot_reserve_more_than_the_budget_holds(caller):
    one = 90 * 100_000
    budget = ceiling(caller, Unit.NANO_USD, one * 3 + one // 2, Window.DAY)

    results = race(10, lambda: operations.submit(caller=caller, request=asks()))

    assert sum(isinstance(r, Execution) for r in results) == 3
    assert sum(isinstance(r, BudgetExhausted) for r in results) == 7
    budget.refresh_from_db()
    assert budget.reserved == one * 3


@pytest.mark.django_db(transaction=True)
def test_ten_at_once_with_one_idempotency_key_run_once(caller):
    results = race(10, lambda: operations.submit(caller=caller, request=asks(), idempotency_key="order-66"))

    assert len({r.pk for r in results}) == 1 == Execution.objects.count()
    assert sum(not r.replayed for r in results) == 1


@pytest.mark.django_db
def test_a_quota_that_sees_nothing_of_yesterday_shows_so(caller):
    quota = ceiling(caller, Unit.EXECUTIONS, 5, Window.DAY)
    Quota.objects.filter(pk=quota.pk).update(used=5, window_started_at=quota.window_started_at - timedelta(days=2))

    (shown,) = operations.limits(caller=caller)

    assert (shown.used, shown.remaining) == (0, 5)
    with transaction.atomic():
        assert quotas.take(caller, executions=1) == []

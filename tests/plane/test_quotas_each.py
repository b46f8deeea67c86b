"""Quotas of each agent and each end user, windows by the team's clock, and what a window keeps when it begins anew."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from django.db import IntegrityError, transaction

from executions import operations, quotas
from executions.costs import NANO
from executions.errors import BudgetExhausted, QuotaExceeded
from executions.models import Agent, Execution, Quota
from executions.states import Unit, WhenExhausted, Window
from tests.plane.conftest import asks
from tests.plane.test_quotas import async_run, ceiling, race


def each(caller, whom, unit=Unit.EXECUTIONS, limit=1, **fields) -> Quota:
    return Quota.objects.create(team=caller.team, each=whom, unit=unit, limit=limit, **fields)


@pytest.mark.django_db
def test_each_end_user_has_the_whole_limit_and_a_request_that_names_none_is_not_governed(caller):
    each(caller, Quota.USER)

    for user in ("ann", "ben", "", ""):
        operations.submit(caller=caller, request=asks(user=user))
    with pytest.raises(QuotaExceeded) as refused:
        operations.submit(caller=caller, request=asks(user="ann"))

    assert "user ann" in refused.value.detail
    assert Execution.objects.count() == 4


@pytest.mark.django_db
def test_each_agent_has_the_whole_limit(caller):
    each(caller, Quota.AGENT, Unit.CONCURRENT_EXECUTIONS)
    other = Agent.objects.create(team=caller.team, name="other", route=["first"])

    operations.submit(caller=caller, request=asks())
    operations.submit(caller=replace(caller, agent=other, key=None), request=asks())
    with pytest.raises(QuotaExceeded):
        operations.submit(caller=caller, request=asks())


@pytest.mark.django_db
def test_a_quota_of_each_for_everybody_tells_the_end_users_of_two_teams_apart(caller, eve):
    Quota.objects.create(each=Quota.USER, unit=Unit.EXECUTIONS, limit=1)
    spy = Agent.objects.create(team=eve.memberships.get().team, name="spy", route=["first"], isolation_floor="none")

    operations.submit(caller=caller, request=asks(user="ann"))
    operations.submit(caller=replace(caller, team=spy.team, agent=spy, key=None), request=asks(user="ann"))

    assert Quota.objects.filter(parent__isnull=False, user="ann", used=1).count() == 2


@pytest.mark.django_db
def test_what_is_changed_of_a_quota_of_each_holds_for_all_of_them_from_their_next_request_on(caller):
    parent = each(caller, Quota.USER)
    operations.submit(caller=caller, request=asks(user="ann"))

    Quota.objects.filter(pk=parent.pk).update(limit=2, when_exhausted=WhenExhausted.WAIT)
    operations.submit(caller=caller, request=asks(user="ann"))
    third = operations.submit(caller=caller, request=asks(user="ann"))

    assert third.waits


@pytest.mark.django_db
def test_a_caller_sees_what_is_left_for_its_own_end_user_only(caller):
    each(caller, Quota.USER, limit=5)
    for user in ("ann", "ben"):
        operations.submit(caller=caller, request=asks(user=user))

    mine = operations.limits(caller=replace(caller, user="ann"))

    assert [(shape.each, shape.user, shape.remaining) for shape in mine] == [("user", "", 5), ("", "ann", 4)]
    assert [shape.each for shape in operations.limits(caller=caller)] == ["user"]


@pytest.mark.django_db
def test_a_quota_of_each_cannot_belong_to_one_agent_or_count_what_no_end_user_is_known_of(caller):
    for wrong in (
        {"agent": caller.agent, "each": Quota.AGENT, "unit": Unit.EXECUTIONS},
        {"team": caller.team, "each": Quota.USER, "unit": Unit.BYTES_STORED},
    ):
        with pytest.raises(IntegrityError), transaction.atomic():
            Quota.objects.create(limit=1, **wrong)


@pytest.mark.django_db(transaction=True)
def test_ten_at_once_make_one_row_of_a_new_end_user_and_none_is_let_in_twice(caller):
    each(caller, Quota.USER, limit=3)

    results = race(10, lambda: operations.submit(caller=caller, request=asks(user="ann")))

    assert sum(isinstance(r, Execution) for r in results) == 3, results
    assert Quota.objects.filter(user="ann").values_list("used", flat=True).get() == 3


@pytest.mark.django_db
def test_money_that_was_spent_since_midnight_stays_when_the_day_is_counted_anew(caller):
    with time_machine.travel(datetime(2026, 11, 24, 23, 59, 50, tzinfo=UTC)):
        budget = ceiling(caller, Unit.NANO_USD, NANO, Window.DAY)
    with time_machine.travel(datetime(2026, 11, 24, 23, 59, 59, tzinfo=UTC)):
        late = operations.submit(caller=caller, request=asks())
    with time_machine.travel(datetime(2026, 11, 25, 0, 0, 30, tzinfo=UTC), tick=False):
        from executions.operations.reap import begin_retiring, gone

        begin_retiring(late.sandbox, "killed")
        gone(late.sandbox)  # nobody has asked for anything today
        spent = late.sandbox.__class__.objects.get(pk=late.sandbox.pk).spent_nano_usd
        assert operations.limits(caller=caller)[0].used == spent > 0

        operations.submit(caller=caller, request=asks())

    budget.refresh_from_db()
    assert (budget.used, budget.window_started_at.day) == (spent, 25)


@pytest.mark.django_db
def test_a_quota_for_all_teams_has_the_installations_day_whichever_team_asks(caller, eve, settings):
    day = Quota.objects.create(unit=Unit.EXECUTIONS, window=Window.DAY, limit=10)
    caller.team.time_zone = "Asia/Tokyo"
    with time_machine.travel(datetime(2026, 11, 25, 14, 0, tzinfo=UTC), tick=False):
        Quota.objects.update(window_started_at=datetime(2026, 11, 25, tzinfo=UTC))
        operations.submit(caller=caller, request=asks())
    with time_machine.travel(datetime(2026, 11, 25, 15, 30, tzinfo=UTC), tick=False):  # past midnight in Tokyo
        operations.submit(caller=caller, request=asks())

    day.refresh_from_db()
    assert day.used == 2


@pytest.mark.parametrize(
    ("window", "zone", "now", "start", "end"),
    [
        ("day", "America/Havana", "2026-03-08T05:30", "2026-03-08T05:00", "2026-03-09T04:00"),  # no midnight: 23 hours
        ("day", "America/Havana", "2026-11-01T05:30", "2026-11-01T04:00", "2026-11-02T05:00"),  # midnight comes twice
        ("hour", "Europe/Berlin", "2026-10-25T00:30", "2026-10-25T00:00", "2026-10-25T01:00"),  # 02:30, the first
        ("hour", "Europe/Berlin", "2026-10-25T01:30", "2026-10-25T01:00", "2026-10-25T02:00"),  # and the second
        ("hour", "Asia/Kathmandu", "2026-11-24T10:20", "2026-11-24T10:15", "2026-11-24T11:15"),
        (
            "month",
            "Europe/Berlin",
            "2026-10-26T10:00",
            "2026-09-30T22:00",
            "2026-10-31T23:00",
        ),  # the clock changes in it
        ("second", "UTC", "2026-11-24T10:20:30.5", "2026-11-24T10:20:30", "2026-11-24T10:20:31"),
    ],
)
def test_windows_hold_where_the_clock_is_changed(window, zone, now, start, end):
    at = datetime.fromisoformat(now).replace(tzinfo=UTC)

    found = [moment(window, zone, at).astimezone(UTC) for moment in (quotas.window_start, quotas.window_end)]

    assert [f"{moment:%Y-%m-%dT%H:%M:%S}".removesuffix(":00") for moment in found] == [start, end]


@pytest.mark.django_db
def test_a_raise_is_over_when_its_time_is_over_also_for_money(caller):
    until = datetime(2026, 11, 25, tzinfo=UTC)
    ceiling(caller, Unit.NANO_USD, 0, Window.TOTAL)
    Quota.objects.update(raised_by=NANO, raised_until=until, raised_why="the demo")
    with time_machine.travel(until - timedelta(seconds=1), tick=False):
        async_run(caller)
        assert operations.limits(caller=caller)[0].raised_until == until

    with time_machine.travel(until + timedelta(seconds=1), tick=False), pytest.raises(BudgetExhausted):
        operations.submit(caller=caller, request=asks())

"""Prices before a run, and what is left of quotas after it, at the REST door."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from django.utils import timezone

from executions.hop import rows
from executions.models import Agent, Execution, Quota, Rate, Sandbox
from executions.states import Unit, Window

pytestmark = pytest.mark.django_db
RUN, SESSIONS = "/api/v1/executions", "/api/v1/sessions"
FIELDS = ("RateLimit-Policy", "RateLimit", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")


@pytest.fixture
def rated(seeded):
    for meter, nano_usd in ((Rate.VCPU, 14_000), (Rate.GIB, 4_500)):
        Rate.objects.create(
            backend="first", meter=meter, nano_usd=nano_usd, valid_from=timezone.now() - timedelta(days=9)
        )


async def test_a_dry_run_is_answered_200_with_its_price_and_leaves_nothing_behind(call, rated):
    answer = await call("POST", RUN, {"code": "#= 1", "timeout_seconds": 60, "dry_run": True})

    told = answer.json()
    assert (answer.status_code, told["verdict"], told["backend"]) == (200, "admitted", "first")
    assert (told["worst_case_usd"], told["reserved_nano_usd"]) == ("0.001665", 1_665_000)
    assert not await Execution.objects.aexists()
    assert not await Sandbox.objects.aexists()


@pytest.mark.parametrize(
    "body",
    [{"code": "", "dry_run": True}, {"code": "1", "dry_run": True, "route": ["mars"]}, {"code": "1", "dry_run": "no"}],
)
async def test_what_is_not_valid_has_no_price(call, body):
    assert (await call("POST", RUN, body)).status_code == 400


async def test_a_dry_run_needs_the_scope_to_run_and_a_price_where_there_is_one(call, eve_key, settings):
    settings.RATE_CEILING_NANO_USD_PER_SECOND = 0

    unpriced = await call("POST", RUN, {"code": "#= 1", "dry_run": True, "route": ["second"]})

    assert (unpriced.status_code, unpriced.json()["code"]) == (503, "rate_unknown")
    assert int(unpriced["Retry-After"]) > 0


async def test_what_could_cost_more_than_it_may_is_402_and_says_what_would_fit(call, rated):
    answer = await call("POST", RUN, {"code": "#= 1", "timeout_seconds": 60, "max_cost_usd": 0.001})

    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["needed"]) == (402, "budget_exhausted", 1_665_000)
    assert "timeout_seconds ≤ 24 fits" in problem["remedy"]
    run = await call("POST", RUN, {"code": "#= 1", "timeout_seconds": 24, "max_cost_usd": 0.001})
    assert (run.status_code, run.json()["max_cost_usd"]) == (201, "0.001")
    session = await call("POST", SESSIONS, {"timeout_seconds": 60, "max_cost_usd": "0.001"})
    assert session.status_code == 402


async def test_admissions_say_what_is_left_of_the_callers_quotas(call, team, agent):
    await Quota.objects.acreate(team=team, unit=Unit.EXECUTIONS, window=Window.DAY, limit=100)
    await Quota.objects.acreate(agent=agent, unit=Unit.EXECUTIONS, window=Window.HOUR, limit=3)
    await Quota.objects.acreate(team=team, unit=Unit.CONCURRENT_EXECUTIONS, limit=64)

    await call("POST", RUN, {"code": "#= 1"})
    answer = await call("POST", RUN, {"code": "#= 1"})

    assert (answer["RateLimit-Limit"], answer["RateLimit-Remaining"]) == ("3", "1")
    assert 0 < int(answer["RateLimit-Reset"]) <= 3600
    policies = answer["RateLimit-Policy"].split(", ")
    left = answer["RateLimit"].split(", ")
    assert re.fullmatch(r'"executions-day-\d+";q=100;qu="requests";w=86400', policies[0])
    assert re.fullmatch(r'"concurrent-executions-total-\d+";q=64;qu="concurrent-requests"', policies[2])
    assert re.fullmatch(r'"executions-hour-\d+";r=1;t=\d+', left[1])
    assert [one.split(";")[0] for one in left] == [one.split(";")[0] for one in policies]


async def test_a_refusal_says_what_is_left_too_and_when_to_come_back(call, team):
    await Quota.objects.acreate(team=team, unit=Unit.EXECUTIONS, window=Window.HOUR, limit=1)
    await call("POST", RUN, {"code": "#= 1"})

    answer = await call("POST", RUN, {"code": "#= 1"})

    assert (answer.status_code, answer["RateLimit-Remaining"]) == (429, "0")
    assert 0 < int(answer["Retry-After"]) <= 3600


async def test_a_quota_that_never_resets_still_has_a_retry_after(call, team):
    await Quota.objects.acreate(team=team, unit=Unit.EXECUTIONS, window=Window.TOTAL, limit=0)

    answer = await call("POST", RUN, {"code": "#= 1"})

    assert (answer.status_code, answer["Retry-After"]) == (429, "60")


async def test_a_session_tells_it_as_well_and_who_has_no_quota_is_told_nothing(call, team):
    free = await call("POST", SESSIONS, {})
    assert not [name for name in FIELDS if name in free]

    await Quota.objects.acreate(team=team, unit=Unit.CREATIONS, window=Window.DAY, limit=5)
    counted = await call("POST", SESSIONS, {})
    assert (counted.status_code, counted["RateLimit-Remaining"]) == (201, "4")


async def test_limits_name_each_and_what_is_raised(call, team):
    until = timezone.now() + timedelta(hours=1)
    raised = {"raised_by": 2, "raised_until": until, "raised_why": "the demo"}
    await Quota.objects.acreate(team=team, unit=Unit.EXECUTIONS, limit=3, each=Quota.USER, **raised)
    await call("POST", RUN, {"code": "#= 1", "user": "ann"})

    (limit,) = (await call("GET", "/api/v1/limits")).json()["results"]
    (_, own) = (await call("GET", "/api/v1/limits?user=ann")).json()["results"]

    assert (limit["each"], limit["limit"], limit["used"]) == ("user", 5, 0)
    assert limit["raised_until"]
    assert (own["user"], own["remaining"]) == ("ann", 4)


async def test_one_teams_end_users_are_not_told_to_another(call, team, eve_key):
    await Quota.objects.acreate(unit=Unit.EXECUTIONS, limit=3, each=Quota.USER)
    await call("POST", RUN, {"code": "#= 1", "user": "ann"})

    theirs = (await call("GET", "/api/v1/limits?user=ann", token=eve_key)).json()["results"]

    assert [limit["user"] for limit in theirs] == [""]
    assert await rows(Quota.objects.filter(user="ann").count) == 1
    assert await rows(Agent.objects.count) == 2

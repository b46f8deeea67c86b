"""What a month will cost, what it would cost elsewhere, and the provider's side, at the REST door: each team its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.utils import timezone

from executions import keys
from executions.backends.base import Listed
from executions.backends.scripted import ScriptedBackend
from executions.hop import rows
from executions.models import ProviderCharge, Sandbox
from tests.rest.test_costs import _spend, call  # noqa: F401

pytestmark = pytest.mark.django_db
COSTS = "/api/v1/costs"


def of_the_team(team) -> str:
    """A key that names no agent."""
    return keys.make_key(team=team, name="books", scopes=["read"])[1]


@pytest.fixture(autouse=True)
def e2b(seeded, settings):
    settings.SANDBOXES = {**settings.SANDBOXES, "e2b": settings.SANDBOXES["first"]}


async def test_a_month_is_forecast_for_the_keys_agent_alone(call, agent, eve_key):  # noqa: F811
    await rows(_spend, agent, timezone.now(), 100)
    await rows(_spend, agent, timezone.now() - timedelta(days=1), 70)
    await rows(_spend, agent, timezone.now(), 9, is_priced=False)

    told = (await call(f"{COSTS}/forecast")).json()
    theirs = (await call(f"{COSTS}/forecast", token=eve_key)).json()

    assert float(told["usd"]) == pytest.approx(float(told["so_far_usd"]) + float(told["rest_usd"]))
    assert (told["days_known"], told["unpriced_charged_usd"]) == (1, "0.000000009")
    assert (theirs["usd"], theirs["days_known"]) == ("0", 0)


async def test_the_same_time_is_priced_on_each_backend_and_plan_and_unpriced_where_no_rate_is_known(call, agent):  # noqa: F811
    await rows(_spend, agent, timezone.now(), 5, duration_us=1_000_000_000)

    told = (await call(f"{COSTS}/what-if")).json()

    found = {(one["backend"], one["plan"]): one["usd"] for one in told["results"]}
    assert found["first", ""] == "unpriced"
    assert float(found["e2b", "Hobby"]) == pytest.approx(1000 * (2 * 14_000 + 2_250) / 1e9)
    assert float(found["e2b", "Pro"]) > float(found["e2b", "Hobby"])


async def test_a_bill_stands_beside_the_ledger_with_the_difference_in_dollars(call, agent, eve):  # noqa: F811
    noon = datetime.now(UTC) - timedelta(days=1)
    usage = await rows(_spend, agent, noon, 1_000)
    await Sandbox.objects.filter(pk=usage.sandbox_id).aupdate(handle={"sandbox_id": "sbxa", "e2b_id": "i1"})
    for name, nano_usd in (("i1", 1_500), ("i2", 900)):  # i2 is somebody else's
        await ProviderCharge.objects.acreate(
            backend="e2b", day=noon.date(), sandbox=name, nano_usd=nano_usd, source="november.csv"
        )

    told = (await call(f"{COSTS}/bills", token=await rows(of_the_team, agent.team))).json()
    theirs = (await call(f"{COSTS}/bills", token=await rows(lambda: of_the_team(eve.memberships.get().team)))).json()
    refused = await call(f"{COSTS}/bills")

    (day,) = told["results"]
    assert (day["ledger_usd"], day["bill_usd"], day["difference_usd"]) == ("0.000001", "0.0000015", "0.0000005")
    assert told["difference_usd"] == "0.0000005"
    assert (theirs["results"], theirs["difference_usd"]) == ([], None)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


async def test_what_a_provider_lists_is_compared_with_what_is_open_here(call, agent, eve, monkeypatch):  # noqa: F811
    long_ago = timezone.now() - timedelta(hours=1)
    ended = (await rows(_spend, agent, long_ago, 1)).sandbox_id
    missing = (await rows(_spend, agent, long_ago, 1)).sandbox_id
    fine = (await rows(_spend, agent, long_ago, 1)).sandbox_id
    everywhere = {"handle": {"sandbox_id": "x"}, "ready_at": long_ago, "rate_nano_usd_per_second": 1_000}
    await Sandbox.objects.aupdate(**everywhere)
    await Sandbox.objects.filter(pk=ended).aupdate(state="gone", ended_at=long_ago)
    names = [pk.replace("_", "") for pk in (ended, fine)]

    async def listed(self):
        return [*(Listed(name, {}, long_ago.isoformat()) for name in names), Listed("", {"e2b_id": "i9"})]

    monkeypatch.setattr(ScriptedBackend, "list", listed)
    told = (await call(f"{COSTS}/bills", listed=1, token=await rows(of_the_team, agent.team))).json()["listed"]
    theirs = await call(f"{COSTS}/bills", listed=1, token=await rows(lambda: of_the_team(eve.memberships.get().team)))
    theirs = theirs.json()["listed"]

    assert told["both"] == 1
    assert {(one["sandbox_id"], one["is_listed"]) for one in told["odd"]} == {(ended, True), (missing, False)}
    assert 0.0036 <= float(told["usd"]) < 0.0040
    assert theirs == {"both": 0, "odd": [], "usd": "0"}


@pytest.mark.parametrize(
    ("path", "query"),
    [("forecast", {"from": "2026-11-01"}), ("what-if", {"from": "never"}), ("bills", {"backend": "mars"})],
)
async def test_what_makes_no_sense_is_refused_by_name(call, path, query):  # noqa: F811
    answer = await call(f"{COSTS}/{path}", **query)

    assert (answer.status_code, answer.json()["field"]) == (400, *query)

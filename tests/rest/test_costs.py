"""Costs and usage at the REST door: what a key sees, in which words, and files that other programs can read."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from django.db.models import Sum
from django.utils import timezone

from executions import keys
from executions.hop import rows
from executions.models import Agent, LedgerEntry, Sandbox, Usage
from executions.reports import exports

pytestmark = pytest.mark.django_db
RUN, COSTS, USAGE = "/api/v1/executions", "/api/v1/costs", "/api/v1/usage"


@pytest.fixture(autouse=True)
def priced(agent, seeded, settings):
    agent.route = ["scripted"]
    agent.save()
    settings.SANDBOXES = {**settings.SANDBOXES, "scripted": settings.SANDBOXES["first"]}
    from executions.models import Rate

    Rate.objects.filter(backend="scripted").update(nano_usd=14_000_000)


@pytest.fixture
def call(async_client, key):
    async def send(path: str, token: str = key, body=None, **query):
        named = {"Authorization": f"Bearer {token}"}
        if body is not None:
            return await async_client.post(path, json.dumps(body), content_type="application/json", headers=named)
        return await async_client.get(path, query, headers=named)

    return send


async def test_what_ran_is_in_the_costs_to_the_nano_dollar(call):
    for n in range(3):
        run = (await call(RUN, body={"code": "#= 1", "user": f"u{n % 2}", "workflow": "w"})).json()
        assert run["cost_nano_usd"] > 0

    whole = await rows(lambda: Usage.objects.aggregate(n=Sum("cost_nano_usd"))["n"])
    ledger = await rows(lambda: LedgerEntry.objects.filter(kind="spend").aggregate(n=Sum("amount_nano_usd"))["n"])
    for group in ("day", "hour", "agent", "backend", "kind", "language", "user", "workflow", "sandbox"):
        told = (await call(COSTS, group_by=group)).json()
        assert sum(line["cost_nano_usd"] for line in told["results"]) == whole == ledger, group
        assert told["total"]["cost_nano_usd"] == whole
    one = (await call(COSTS, group_by="execution")).json()["results"]
    assert {line["execution"]: line["cost_nano_usd"] for line in one}[run["id"]] == run["cost_nano_usd"]
    assert one[0]["cost_usd"] == f"{Decimal(one[0]['cost_nano_usd']) / 10**9:f}"
    assert one[0]["run_nano_usd"] + one[0]["boot_nano_usd"] == one[0]["cost_nano_usd"]


async def test_usage_tells_seconds_of_cores_and_memory(call, agent):
    await rows(_spend, agent, timezone.now(), 5, duration_us=2_000_000)

    (line,) = (await call(USAGE, group_by="agent")).json()["results"]

    assert line == {
        "agent": "etl",
        "seconds": 2.0,
        "vcpu_seconds": 4.0,
        "gib_seconds": 1.0,
        "stretches": 1,
        "run_seconds": 2.0,
        "boot_seconds": 0.0,
        "idle_seconds": 0.0,
        "pool_seconds": 0.0,
    }


async def test_a_key_sees_its_agent_and_a_teams_key_the_team_and_nobody_another_team(call, agent, eve_key):
    other = await Agent.objects.acreate(team=agent.team, name="night")
    for who, nano in ((agent, 100), (other, 20)):
        await rows(_spend, who, timezone.now(), nano)
    _, team_key = await rows(keys.make_key, team=agent.team, name="all", scopes=["read"])

    async def total(token, **query):
        return (await call(COSTS, token=token, **query)).json()["total"]["cost_nano_usd"]

    assert await total(team_key) == 120
    assert await total(team_key, agent="night") == 20
    own = (await call(COSTS, group_by="agent")).json()
    assert [line["agent"] for line in own["results"]] == ["etl"]
    assert await total(eve_key) == 0
    assert (await call(COSTS, agent="night")).status_code == 404
    assert (await call(COSTS, token=team_key, agent="spy")).status_code == 404


async def test_what_has_no_price_is_null_and_says_unpriced(call, agent):
    await rows(_spend, agent, timezone.now(), 100, is_priced=False)

    (line,) = (await call(COSTS, group_by="agent")).json()["results"]
    text = (await call(COSTS, group_by="agent", format="csv")).content.decode()

    assert (line["cost_usd"], line["cost_nano_usd"], line["unpriced_charged_nano_usd"]) == (None, None, 100)
    assert (line["run_nano_usd"], line["boot_nano_usd"]) == (None, 0)
    assert text.splitlines()[1] == "etl,1,unpriced,,1,100,,0,0,0"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"group_by": "moon"}, "group_by"),
        ({"group_by": ""}, "group_by"),
        ({"group_by": "day,day"}, "group_by"),
        ({"group_by": "user,workflow"}, "group_by"),
        ({"group_by": "hour,user"}, "group_by"),
        ({"group_by": "execution,day"}, "group_by"),
        ({"from": "yesterday"}, "from"),
        ({"to": "0001-01-01"}, "to"),
        ({"from": "2026-11-02", "to": "2026-11-01"}, "from"),
        ({"from": "2024-01-01", "to": "2026-11-01"}, "from"),
        ({"group_by": "hour", "from": "2026-09-01", "to": "2026-11-01"}, "from"),
        ({"format": "xls"}, "format"),
        ({"until": "2026-11-01"}, "until"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(call, query, field):
    answer = await call(COSTS, **query)

    assert (answer.status_code, answer.json()["field"]) == (400, field)


async def test_usage_is_no_focus_and_costs_want_the_scope(call, agent):
    _, blind = await rows(keys.make_key, team=agent.team, agent=agent, name="runs only", scopes=["run"])

    assert (await call(USAGE, format="focus")).status_code == 400
    assert (await call(COSTS, token=blind)).status_code == 403
    assert (await call(USAGE, format="csv")).content.decode().startswith("day,seconds,vcpu_seconds")


async def test_focus_has_every_mandatory_column_in_its_type_and_adds_up_to_the_ledger(call, agent):
    agent.name = "=SUM(A1)"
    agent.team.time_zone = "Europe/Berlin"
    await rows(agent.save)
    await rows(agent.team.save)
    noon = datetime(2026, 11, 24, 12, tzinfo=UTC)
    await rows(_spend, agent, noon, 33_333_333)
    await rows(_spend, agent, noon - timedelta(days=1), 7, kind="idle", is_priced=False)

    answer = await call(COSTS, format="focus", **{"from": "2026-11-01", "to": "2026-11-30"})

    found = list(csv.DictReader(io.StringIO(answer.content.decode())))
    specified = exports.focus_columns()
    mandatory = {name for name, (level, *_) in specified.items() if level == "Mandatory"}
    assert len(specified) == 57
    assert len(mandatory) == 21
    assert mandatory <= found[0].keys()
    assert all(name in specified or name.startswith("x_") for name in found[0])
    for row in found:
        for name in found[0].keys() & specified.keys():
            _, kind, may_be_null = specified[name]
            assert row[name] or may_be_null, name
            if row[name]:
                READ[kind](row[name])
        assert row["BillingPeriodStart"] == "2026-10-31T23:00:00Z"
        assert row["BillingPeriodEnd"] == "2026-11-30T23:00:00Z"
        assert row["x_AgentName"] == "'=SUM(A1)"
    assert [row["ChargePeriodStart"] for row in found] == ["2026-11-22T23:00:00Z", "2026-11-23T23:00:00Z"]
    assert [(row["x_IsPriced"], row["ListUnitPrice"]) for row in found] == [("false", ""), ("true", "0.033333333")]
    assert sum(Decimal(row["BilledCost"]) for row in found) == Decimal("0.03333334")


READ = {
    "String": str,
    "Decimal": Decimal,
    "DateTime": lambda text: datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ"),
    "JSON": json.loads,
}


def _spend(agent, at, nano_usd: int, *, is_priced: bool = True, **fields) -> Usage:
    from executions.models import Template

    sandbox = Sandbox.objects.create(
        team=agent.team, agent=agent, template=Template.objects.get(name="default"), backend="e2b", leased_until=at,
        is_priced=is_priced, cpu_count=2, memory_mib=512,
    )  # fmt: skip
    given = {"kind": "run", "duration_us": 1_000_000, "at": at, "backend": "e2b"} | fields
    return Usage.objects.create(
        team=agent.team, agent=agent, sandbox=sandbox, cost_nano_usd=nano_usd, rate_nano_usd_per_second=1, **given
    )

"""GET /audit: the team's own events, for keys that manage."""

import csv
import io

import pytest

from executions import audit, keys
from executions.hop import rows
from executions.keys import Caller
from executions.models import Team

pytestmark = pytest.mark.django_db
AUDIT = "/api/v1/audit"


def by(team, action: str, **facts):
    return audit.record(action, caller=Caller(team, None), **facts)


async def test_a_key_that_manages_reads_its_own_teams_events_newest_first(call, team):
    elsewhere = await Team.objects.acreate(name="Elsewhere")
    await rows(by, elsewhere, "agent_made")
    first = await rows(by, team, "agent_changed", subject="agt_1", before={"a": 1}, after={"a": 2}, reason="why")
    await rows(by, team, "key_made", subject="key_1")

    whole = (await call("GET", AUDIT)).json()["results"]
    older = (await call("GET", f"{AUDIT}?before_seq={whole[0]['seq']}")).json()["results"]
    narrowed = (await call("GET", f"{AUDIT}?action=key_made&subject=key_1")).json()["results"]

    assert [event["action"] for event in whole] == ["key_made", "agent_changed"]
    assert [event["seq"] for event in older] == [first.seq]
    assert (older[0]["before"], older[0]["reason"], older[0]["digest"]) == ({"a": 1}, "why", first.digest)
    assert [event["action"] for event in narrowed] == ["key_made"]


async def test_the_teams_events_come_as_csv_too_and_no_cell_is_a_formula(call, team):
    elsewhere = await Team.objects.acreate(name="Elsewhere")
    await rows(by, elsewhere, "agent_made")
    await rows(by, team, "agent_changed", subject="=1+1", after={"a": 2}, reason="+why")

    sheet = (await call("GET", f"{AUDIT}?format=csv")).content.decode()
    lines = list(csv.DictReader(io.StringIO(sheet)))

    assert [line["action"] for line in lines] == ["audit_exported", "agent_changed"]
    assert (lines[1]["subject"], lines[1]["after"], lines[1]["reason"]) == ("'=1+1", '{"a":2}', "'+why")


async def test_a_key_that_does_not_manage_is_denied(call, agent):
    _, token = await rows(keys.make_key, team=agent.team, agent=agent, name="reads", scopes=["read", "run"])

    assert (await call("GET", AUDIT, token=token)).status_code == 403


@pytest.mark.parametrize("query", ["before_seq=x", "format=xml", "since=1", "before_seq=-1"])
async def test_what_makes_no_sense_is_refused(call, query):
    assert (await call("GET", f"{AUDIT}?{query}")).status_code == 400

"""Agents and keys at the REST door: made, rotated, narrowed, ended; and never more than the key that asks may do."""

from datetime import timedelta

import pytest
from django.utils import timezone

from executions import keys, operations
from executions.hop import rows
from executions.models import Agent, ApiKey, AuditEvent, Usage
from executions.serializers import SessionRequest
from executions.states import Scope

pytestmark = pytest.mark.django_db
AGENTS, KEYS, RUN = "/api/v1/agents", "/api/v1/keys", "/api/v1/executions"


@pytest.fixture
def team_key(team) -> str:
    """A token of Ada's whole team, with every scope."""
    return keys.make_key(team=team, name="of the team", scopes=Scope.values)[1]


async def test_an_agent_is_made_changed_and_switched_off_and_all_of_it_is_in_the_audit(call, team_key):
    made = await call("POST", AGENTS, {"name": "scraper", "network_allow": ["data.example"]}, token=team_key)
    agent = made.json()
    where = f"{AGENTS}/{agent['id']}"
    changed = await call("PATCH", where, {"timeout_seconds": 30, "packages": ["emoji"]}, token=team_key)
    off = await call("DELETE", where, token=team_key)

    assert (made.status_code, agent["name"], agent["timeout_seconds"]) == (201, "scraper", 60)
    assert (changed.status_code, changed.json()["timeout_seconds"]) == (200, 30)
    assert changed.json()["network_allow"] == ["data.example"]
    assert (off.status_code, (await call("GET", where, token=team_key)).json()["is_active"]) == (204, False)
    told = [e async for e in AuditEvent.objects.filter(subject=agent["id"]).order_by("seq")]
    assert [e.action for e in told] == ["agent_made", "agent_changed", "agent_changed"]
    assert (told[1].before, told[1].after) == (
        {"packages": [], "timeout_seconds": 60},
        {"packages": ["emoji"], "timeout_seconds": 30},
    )
    refused = await call("POST", RUN, {"code": "#= 1", "agent": "scraper"}, token=team_key)
    assert refused.status_code == 403


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"name": "etl"}, 409, "name"),
        ({"name": "a b"}, 400, "name"),
        ({}, 400, "name"),
        ({"name": "x", "route": ["mars"]}, 400, "route"),
        ({"name": "x", "template": "none"}, 400, "template"),
        ({"name": "x", "timeout_seconds": 700}, 400, "timeout_seconds"),
        ({"name": "x", "isolation_floor": "thick"}, 400, "isolation_floor"),
        ({"name": "x", "network_allow": ["http://a"]}, 400, "network_allow"),
        ({"name": "x", "surprise": 1}, 400, "surprise"),
    ],
)
async def test_an_agent_that_cannot_be_is_refused_by_its_field(call, team_key, body, status, field):
    answer = await call("POST", AGENTS, body, token=team_key)

    assert (answer.status_code, answer.json()["field"]) == (status, field)


async def test_a_key_is_shown_once_and_does_what_it_may(call, team_key):
    asked = {"name": "ci", "agent": "etl", "scopes": ["read"], "expires_in_seconds": 3600}
    made = (await call("POST", KEYS, asked, token=team_key)).json()

    assert (await call("GET", RUN, token=made["secret"])).status_code == 200
    assert (await call("POST", RUN, {"code": "#= 1"}, token=made["secret"])).status_code == 403
    listed = (await call("GET", KEYS, token=team_key)).json()["results"]
    assert made["secret"] not in str(listed)
    assert made["id"] in [one["id"] for one in listed]
    event = await AuditEvent.objects.aget(action="key_made", subject=made["id"])
    assert made["secret"] not in str(event.after)
    assert (event.after["digest"], event.after["scopes"]) == ("(secret)", ["read"])


async def test_a_key_that_is_asked_for_twice_under_one_idempotency_key_is_one_and_its_secret_is_not_kept(
    call, team_key
):
    once = {"Idempotency-Key": "k"}
    first = await call("POST", KEYS, {"name": "ci", "agent": "etl"}, token=team_key, **once)
    again = await call("POST", KEYS, {"name": "ci", "agent": "etl"}, token=team_key, **once)
    other = await call("POST", KEYS, {"name": "cd", "agent": "etl"}, token=team_key, **once)

    assert first.json()["id"] == again.json()["id"]
    assert (first.json()["secret"][:3], again.json()["secret"]) == ("sg_", None)
    assert again["Idempotency-Replayed"] == "true"
    assert other.status_code == 422
    assert await ApiKey.objects.filter(name="ci").acount() == 1


async def test_a_refused_write_may_be_tried_again_under_the_same_idempotency_key(call, team_key):
    once = {"Idempotency-Key": "k"}
    refused = await call("POST", KEYS, {"name": "ci", "agent": "later"}, token=team_key, **once)
    await call("POST", AGENTS, {"name": "later"}, token=team_key)
    made = await call("POST", KEYS, {"name": "ci", "agent": "later"}, token=team_key, **once)

    assert (refused.status_code, made.status_code) == (404, 201)


@pytest.fixture
def of_oauth(agent) -> ApiKey:
    """The row that stands for what a person's client does, as it is made when that first signs in."""
    fields = {"team": agent.team, "agent": agent, "name": "OAuth: Chat", "scopes": Scope.values}
    return ApiKey.objects.create(public="0123456789abcdef", **fields)


async def test_what_stands_for_an_oauth_client_is_no_key_to_rotate_but_can_be_revoked(call, team_key, of_oauth):
    where = f"{KEYS}/{of_oauth.pk}"
    refused = await call("POST", f"{where}/rotate", {"overlap_seconds": 0}, token=team_key)
    untouched = await ApiKey.objects.aget(pk=of_oauth.pk)
    revoked = await call("DELETE", where, token=team_key)

    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "signs in by OAuth" in refused.json()["detail"]
    assert untouched.is_live
    assert not await ApiKey.objects.filter(name="OAuth: Chat").exclude(pk=of_oauth.pk).aexists()
    assert revoked.status_code == 204
    assert not (await ApiKey.objects.aget(pk=of_oauth.pk)).is_live


async def test_a_rotated_key_works_beside_the_old_one_until_the_overlap_is_over(call, team_key):
    old = (await call("POST", KEYS, {"name": "ci", "agent": "etl"}, token=team_key)).json()
    new = (await call("POST", f"{KEYS}/{old['id']}/rotate", {"overlap_seconds": 600}, token=team_key)).json()

    assert (new["replaces"], new["name"], new["scopes"]) == (old["id"], "ci", old["scopes"])
    assert (await call("GET", RUN, token=old["secret"])).status_code == 200
    assert (await call("GET", RUN, token=new["secret"])).status_code == 200
    ends = (await ApiKey.objects.aget(pk=old["id"])).expires_at
    assert timedelta(seconds=590) < ends - timezone.now() < timedelta(seconds=601)
    at_once = (await call("POST", f"{KEYS}/{new['id']}/rotate", {"overlap_seconds": 0}, token=team_key)).json()
    assert (await call("GET", RUN, token=new["secret"])).status_code == 401
    assert (await call("GET", RUN, token=at_once["secret"])).status_code == 200
    over = await call("POST", f"{KEYS}/{new['id']}/rotate", {}, token=team_key)
    assert (over.status_code, over.json()["code"]) == (409, "conflict")


async def test_a_revoked_key_is_refused_and_stays_on_the_list(call, team_key):
    made = (await call("POST", KEYS, {"name": "ci", "agent": "etl"}, token=team_key)).json()
    assert (await call("DELETE", f"{KEYS}/{made['id']}", token=team_key)).status_code == 204
    assert (await call("DELETE", f"{KEYS}/{made['id']}", token=team_key)).status_code == 204

    assert (await call("GET", RUN, token=made["secret"])).status_code == 401
    assert not (await call("GET", f"{KEYS}/{made['id']}", token=team_key)).json()["is_live"]
    assert await AuditEvent.objects.filter(action="key_revoked", subject=made["id"]).acount() == 1


async def test_a_key_is_good_in_its_networks_only(call, team_key):
    asked = {"name": "here", "agent": "etl", "allow_from": ["10.1.2.3/8", "127.0.0.1"]}
    here = (await call("POST", KEYS, asked, token=team_key)).json()
    there = (await call("POST", KEYS, asked | {"allow_from": ["2001:db8::/32"]}, token=team_key)).json()
    wrong = await call("POST", KEYS, asked | {"allow_from": ["everywhere"]}, token=team_key)

    assert here["allow_from"] == ["10.0.0.0/8", "127.0.0.1/32"]
    assert (await call("GET", RUN, token=here["secret"])).status_code == 200
    refused = await call("GET", RUN, token=there["secret"])
    assert (refused.status_code, refused.json()["detail"]) == (401, "The key is not good at this address.")
    assert (wrong.status_code, wrong.json()["field"]) == (400, "allow_from")


async def test_a_test_key_neither_finds_nor_changes_what_is_real(call, caller, team_key):
    made = (await call("POST", KEYS, {"name": "ci", "agent": "etl", "test": True}, token=team_key)).json()
    real = (await operations.open_session(caller=caller, request=SessionRequest())).pk

    async def refused(method: str, path: str, **body) -> int:
        return (await call(method, path, body or None, token=made["secret"])).status_code

    assert await refused("POST", RUN, code="#= 1", session_id=real) == 404
    assert await refused("POST", f"/api/v1/sessions/{real}/commands", command="#> hi") == 404
    assert await refused("DELETE", f"/api/v1/sandboxes/{real}") == 404
    assert await refused("PATCH", f"{AGENTS}/etl", description="mine now") == 403


async def test_a_test_key_runs_nothing_always_says_the_same_and_costs_nothing(call, team_key):
    made = (await call("POST", KEYS, {"name": "ci", "agent": "etl", "test": True}, token=team_key)).json()
    asked = {"code": "#> hello\n#= 42", "route": ["second"]}
    answers = [(await call("POST", RUN, asked, token=made["secret"])).json() for _ in range(2)]

    assert (made["test"], made["backend"]) == (True, "scripted")
    for body in answers:
        assert (body["state"], body["backend"], body["isolation"]) == ("succeeded", "scripted", "simulated")
        assert (body["logs"]["stdout"], body["results"]) == ("hello\n", [{"text/plain": "42"}])
        assert (body["cost_nano_usd"], body["cost_usd"]) == (0, "0")
    assert not await Usage.objects.exclude(cost_nano_usd=0).aexists()


async def test_a_key_makes_none_that_could_do_more_than_itself(call, team, agent, team_key):
    async def key(**fields) -> str:
        return (await rows(lambda: keys.make_key(team=team, name="narrow", **fields)))[1]

    manage = [Scope.MANAGE.value, Scope.READ.value]
    soon = timezone.now() + timedelta(hours=1)
    no_run = await key(scopes=manage)
    of_agent = await key(scopes=Scope.values, agent=agent)
    bound = await key(scopes=Scope.values, backend="scripted")
    near = await key(scopes=Scope.values, allow_from=["127.0.0.0/8"])
    short = await key(scopes=Scope.values, expires_at=soon)
    other = await rows(Agent.objects.create, team=team, name="other")
    theirs = (await call("POST", KEYS, {"name": "theirs", "agent": "other"}, token=team_key)).json()
    mine = (await call("POST", KEYS, {"name": "mine", "agent": "etl"}, token=team_key)).json()

    async def refused(token: str, path: str = KEYS, **body) -> int:
        return (await call("POST", path, body, token=token)).status_code

    assert await refused(no_run, name="x", scopes=["run"]) == 403
    assert await refused(no_run, f"{KEYS}/{mine['id']}/rotate") == 403
    assert await refused(of_agent, name="x", agent=other.name) == 404
    assert await refused(of_agent, f"{KEYS}/{theirs['id']}/rotate") == 404
    assert await refused(of_agent, AGENTS, name="x") == 403
    assert await refused(bound, f"{KEYS}/{mine['id']}/rotate") == 403
    assert await refused(near, name="x", allow_from=["0.0.0.0/0"]) == 403
    assert await refused(near, f"{KEYS}/{mine['id']}/rotate") == 403
    assert await refused(short, name="x") == 403
    assert await refused(short, name="x", expires_in_seconds=60) == 201
    within = (await call("POST", KEYS, {"name": "x"}, token=near)).json()
    assert within["allow_from"] == ["127.0.0.0/8"]
    assert await refused(bound, name="x") == 403  # a test key makes none
    assert (await call("POST", KEYS, {"name": "x"}, token=of_agent)).json()["agent"] == "etl"


async def test_another_teams_agents_and_keys_are_not_found(call, agent, team_key, eve_key):
    made = (await call("POST", KEYS, {"name": "ci", "agent": "etl"}, token=team_key)).json()

    for method, path in (("GET", f"{AGENTS}/{agent.pk}"), ("GET", f"{KEYS}/{made['id']}"), ("DELETE", f"{KEYS}/{made['id']}")):  # fmt: skip
        assert (await call(method, path, token=eve_key)).status_code == 404
    assert made["id"] not in str((await call("GET", KEYS, token=eve_key)).json())

"""The control plane, by E2B's own SDK."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from e2b import (
    AuthenticationException,
    RateLimitException,
    SandboxException,
    SandboxNotFoundException,
    SandboxQuery,
    SandboxState,
)
from e2b_code_interpreter import Sandbox

from tests.gateway.conftest import options


def test_a_sandbox_is_made_found_and_killed(mine):
    sandbox = Sandbox.create(
        timeout=60, metadata={"who": "Ada & Bob", "x__contains": "=%20"}, envs={"MARK": "1"}, **mine
    )

    assert sandbox.sandbox_id.isalnum()
    assert sandbox.sandbox_id == sandbox.sandbox_id.lower()
    info = sandbox.get_info()
    assert info.allow_internet_access is False
    assert (info.template_id, info.name, info.state) == ("code-interpreter-v1", "default", SandboxState.RUNNING)
    assert info.metadata == {"who": "Ada & Bob", "x__contains": "=%20"}
    assert sandbox.run_code("import os\nos.environ['MARK']").text == "1"
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    assert sandbox.is_running() is False
    with pytest.raises(SandboxNotFoundException):
        sandbox.get_info()


def test_it_ends_exactly_when_it_was_asked_to(mine):
    before = datetime.now(UTC)
    sandbox = Sandbox.create(timeout=5, **mine)
    end = sandbox.get_info().end_at

    assert timedelta(seconds=4) < end - before < timedelta(seconds=7)
    sandbox.kill()


def test_set_timeout_may_shorten_and_connect_never_does(mine, sandbox):
    sandbox.set_timeout(30)
    shortened = sandbox.get_info().end_at
    connected = Sandbox.connect(sandbox.sandbox_id, timeout=10, **mine)
    kept = connected.get_info().end_at
    Sandbox.connect(sandbox.sandbox_id, timeout=90, **mine)
    grown = connected.get_info().end_at

    assert shortened < datetime.now(UTC) + timedelta(seconds=31)
    assert kept == shortened
    assert grown > shortened + timedelta(seconds=50)


def test_a_connected_sandbox_has_the_same_variables(mine, sandbox):
    sandbox.run_code("x = 41")

    assert Sandbox.connect(sandbox.sandbox_id, **mine).run_code("x + 1").text == "42"


def test_lists_are_filtered_ordered_and_paged(mine):
    made = [Sandbox.create(timeout=60, metadata={"page": "one two"}, **mine) for _ in range(3)]
    ours = SandboxQuery(metadata={"page": "one two"})
    pages = Sandbox.list(query=ours, limit=2, order="asc", **mine)
    first, second = pages.next_items(), pages.next_items()
    newest = Sandbox.list(query=ours, **mine).next_items()
    nothing = Sandbox.list(query=SandboxQuery(metadata={"page": "three"}), **mine).next_items()
    paused = Sandbox.list(
        query=SandboxQuery(metadata={"page": "one two"}, state=[SandboxState.PAUSED]), **mine
    ).next_items()
    for sandbox in made:
        sandbox.kill()
    after = Sandbox.list(query=ours, **mine).next_items()

    ids = [sandbox.sandbox_id for sandbox in made]
    assert [info.sandbox_id for info in first + second] == ids
    assert (len(first), pages.has_next) == (2, False)
    assert [info.sandbox_id for info in newest] == ids[::-1]
    assert (nothing, paused, after) == ([], [], [])


def test_a_repeated_create_with_one_idempotency_key_makes_one_sandbox(mine):
    one = Sandbox.create(timeout=60, idempotency_key="once-0001", **mine)
    again = Sandbox.create(timeout=60, idempotency_key="once-0001", **mine)
    with pytest.raises(SandboxException) as refused:
        Sandbox.create(timeout=61, idempotency_key="once-0001", **mine)
    one.kill()
    with pytest.raises(SandboxException) as ended:
        Sandbox.create(timeout=60, idempotency_key="once-0001", **mine)

    assert again.sandbox_id == one.sandbox_id
    assert refused.value.status_code == 422
    assert ended.value.status_code == 409


def test_older_sdks_find_their_paths_and_may_send_the_sandbox_header_everywhere(product, raw, sandbox):
    headers = {"X-API-KEY": product.key, "E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    made = raw.post(
        "/sandboxes", json={"templateID": "base", "secure": True, "allow_internet_access": True}, headers=headers
    )
    listed = raw.get("/sandboxes", headers=headers)
    connected = raw.post(f"/sandboxes/{made.json()['sandboxID']}/connect", json={"timeout": 20}, headers=headers)
    killed = raw.delete(f"/sandboxes/{made.json()['sandboxID']}", headers=headers)

    assert (made.status_code, listed.status_code, connected.status_code) == (201, 200, 200)
    assert made.json()["envdAccessToken"] == connected.json()["envdAccessToken"]
    assert {made.json()["sandboxID"], sandbox.sandbox_id} <= {entry["sandboxID"] for entry in listed.json()}
    assert (killed.status_code, killed.content) == (204, b"")


# Who may


def test_another_team_finds_nothing(product, tenants, sandbox):
    eves = options(product, tenants["eve"])

    for attempt in (
        lambda: Sandbox.connect(sandbox.sandbox_id, **eves),
        lambda: Sandbox.get_info(sandbox.sandbox_id, **eves),
        lambda: Sandbox.set_timeout(sandbox.sandbox_id, 1, **eves),
    ):
        with pytest.raises(SandboxNotFoundException):
            attempt()
    assert Sandbox.kill(sandbox.sandbox_id, **eves) is False
    assert Sandbox.list(**eves).next_items() == []
    assert sandbox.is_running()


@pytest.mark.parametrize("key", ["sg_nonsense", "e2b_" + "0" * 88])
def test_a_wrong_key_is_not_let_in(product, key):
    with pytest.raises(AuthenticationException):
        Sandbox.create(**options(product, key))


def test_the_same_key_opens_with_e2bs_prefix(product):
    sandbox = Sandbox.create(timeout=20, **options(product, product.key.replace("sg_", "e2b_")))

    assert sandbox.kill() is True


def test_a_key_that_may_only_read_makes_nothing(product, tenants):
    with pytest.raises(SandboxException) as refused:
        Sandbox.create(**options(product, tenants["reader"]))

    assert refused.value.status_code == 403


def test_a_used_up_quota_is_one_request_and_a_rate_limit(product, tenants):
    with pytest.raises(RateLimitException, match="quota_exceeded"):
        Sandbox.create(**options(product, tenants["poor"]))

    with product.http(params={}) as http:
        http.headers["Authorization"] = f"Bearer {tenants['poor']}"
        (refusal,) = http.get("/api/v1/refusals").json()["results"]
    assert (refusal["code"], refusal["times"]) == ("quota_exceeded", 1)


def test_an_exhausted_budget_says_what_is_left(product, tenants):
    with pytest.raises(SandboxException, match=r"budget_exhausted: .* left, resets") as refused:
        Sandbox.create(**options(product, tenants["broke"]))

    assert refused.value.status_code == 402


def test_a_used_up_quota_of_runs_refuses_the_cell_in_words(product, tenants):
    sandbox = Sandbox.create(timeout=30, **options(product, tenants["still"]))
    with pytest.raises(SandboxException, match=r"^429 .*quota_exceeded"):
        sandbox.run_code("1")
    sandbox.kill()


def test_a_teams_key_names_its_agent_in_a_header(product, tenants):
    teams = options(product, tenants["of_a_team"])
    with pytest.raises(SandboxException, match="name the agent"):
        Sandbox.create(**teams)
    sandbox = Sandbox.create(timeout=30, api_headers={"Sandgate-Agent": "agent"}, **teams)

    assert sandbox.run_code("1").text == "1"
    assert Sandbox.kill(sandbox.sandbox_id, **teams) is True


def test_a_route_without_a_reachable_backend_is_refused_in_words(raw, tenants):
    answer = raw.post("/v2/sandboxes", json={"templateID": "base"}, headers={"X-API-KEY": tenants["scripted"]})

    assert answer.status_code == 503
    assert answer.headers["Should-Retry"] == "false"
    assert "local runtime" in answer.json()["message"]


# What is not there


@pytest.mark.parametrize(
    ("asked", "status", "word"),
    [
        ({"templateID": "nothing-like-it"}, 404, "nothing-like-it"),
        ({"templateID": "base", "network": {"allowOut": ["1.1.1.1"]}}, 403, "its network is off"),
        ({"templateID": "base", "autoPause": True}, 400, "paused"),
        ({"templateID": "base", "timeout": 0}, 400, "timeout"),
        ({"templateID": "base", "timeout": 90_000}, 400, "Timeout cannot be greater than 24 hours"),
        ({"templateID": "base", "envVars": {"A B": "1"}}, 400, "env"),
        ({}, 400, "templateID"),
    ],
)
def test_what_cannot_be_is_refused_by_name(product, raw, asked, status, word):
    answer = raw.post("/v2/sandboxes", json=asked, headers={"X-API-KEY": product.key})

    assert answer.status_code == status
    assert answer.json()["code"] == status
    assert word in answer.json()["message"]


def test_a_body_that_is_not_json_is_refused(product, raw):
    answer = raw.post("/v2/sandboxes", content=b"{", headers={"X-API-KEY": product.key})

    assert (answer.status_code, answer.json()["code"]) == (400, 400)


def test_a_paused_sandbox_is_listed_as_such_and_goes_on_where_it_was_once_connected_to(sandbox):
    sandbox.run_code("kept = 41")

    assert (sandbox.pause(), sandbox.pause()) == (True, False)
    assert sandbox.get_info().state == "paused"
    again = sandbox.connect()

    assert again.run_code("kept + 1").text == "42"
    assert sandbox.get_info().state == "running"

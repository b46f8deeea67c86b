"""What an agent is told when it could have known better: a code, why, what to do, what is left."""

from __future__ import annotations

import pytest

from executions.backends.base import Backend
from executions.backends.scripted import ScriptedBackend
from executions.models import Agent, Execution, Quota, Rate, Sandbox
from executions.states import Unit, Window
from tests.mcp_door.conftest import connected, http, scripted_key, text

pytestmark = pytest.mark.django_db(transaction=True)

BAD = {
    "an unknown language": ({"code": "1", "language": "cobol"}, "invalid", "language"),
    "a language that the agent may not use": ({"code": "1", "language": "bash"}, "invalid", "language"),
    "no code": ({"code": "   "}, "invalid", "code"),
    "code left out": ({}, "invalid", "code"),
    "an enormous timeout": ({"code": "1", "timeout_seconds": 10**9}, "invalid", "timeout_seconds"),
    "a timeout of nothing": ({"code": "1", "timeout_seconds": 0}, "invalid", "timeout_seconds"),
    "code over a megabyte": ({"code": "x" * 1_000_001}, "too_large", "code"),
    "an argument that does not exist": ({"code": "1", "gpu": True}, "invalid", "gpu"),
    "a file that is not base64": ({"code": "1", "files": {"a": {"base64": "?"}}}, "invalid", "files"),
    "a session that does not exist": ({"code": "1", "session_id": "sbx_none"}, "not_found", "session_id"),
}


@pytest.mark.parametrize("bad", BAD)
async def test_a_bad_request_is_an_error_result_that_names_its_field(agent, key, bad):
    arguments, code, field = BAD[bad]
    await Agent.objects.filter(pk=agent.pk).aupdate(languages=["python"])

    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", arguments)

    assert result.is_error
    assert result.structured_content["code"] == code
    assert result.structured_content["field"] == field
    assert text(result).startswith(f"{code}: ")
    assert result.structured_content["remedy"] in text(result)
    assert not await Execution.objects.aexists()
    assert not await Sandbox.objects.filter(ended_at__isnull=True).aexists()


async def test_a_session_of_another_team_is_not_there(key, eve):
    spy = await Agent.objects.acreate(team=(await eve.memberships.select_related("team").aget()).team, name="spy")
    async with connected(key) as mcp:
        mine = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content

    async with connected(await make_key(spy)) as mcp:
        ran = await mcp.call_tool("execute_code", {"code": "#= 1", "session_id": mine["session_id"]})
        looked = await mcp.call_tool("get_execution", {"execution_id": mine["id"]})
        stopped = await mcp.call_tool("cancel_execution", {"execution_id": mine["id"]})
        ended = await mcp.call_tool("end_session", {"session_id": mine["session_id"]})
        read = await mcp.call_tool("read_file", {"session_id": mine["session_id"], "path": "a"})

    assert {r.structured_content["code"] for r in (ran, looked, stopped, ended, read)} == {"not_found"}


async def test_a_used_up_quota_says_what_is_used_and_when_to_come_back(agent, key):
    await Quota.objects.acreate(agent=agent, unit=Unit.EXECUTIONS, window=Window.DAY, limit=1)

    async with connected(key) as mcp:
        await mcp.call_tool("execute_code", {"code": "#= 1"})
        result = await mcp.call_tool("execute_code", {"code": "#= 1"})

    assert result.structured_content["code"] == "quota_exceeded"
    assert result.structured_content["remaining"] == 0
    assert result.structured_content["retry_after"] > 0
    assert await Sandbox.objects.filter(ended_at__isnull=True).acount() == 1  # none was kept for the refused one


async def test_a_budget_that_is_too_small_says_what_is_left_and_not_to_retry(agent, key):
    await Rate.objects.filter(backend="scripted").aupdate(nano_usd=1_000)  # a second costs 2,000 with one GiB
    await Quota.objects.acreate(agent=agent, unit=Unit.NANO_USD, window=Window.DAY, limit=200_000)
    small = {"code": "#= 1", "keep_session": False, "timeout_seconds": 70}

    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#= 1"})
        smaller = await mcp.call_tool("execute_code", small)

    assert result.is_error
    assert result.structured_content["code"] == "budget_exhausted"
    assert "agent etl has $0.0002 of $0.0002 per day left" in text(result)
    assert "keep_session=false and timeout_seconds ≤ 70 fit." in text(result)
    assert "Do not retry unchanged." in text(result)
    assert smaller.structured_content["state"] == "succeeded"


async def test_a_package_outside_the_policy_is_denied_with_what_is_allowed(key):
    async with connected(key) as mcp:
        session_id = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content["session_id"]
        result = await mcp.call_tool("install_package", {"packages": ["leftpad"], "session_id": session_id})
        nowhere = await mcp.call_tool("install_package", {"packages": ["leftpad"]})

    assert text(result).startswith("package_denied: Agent etl may not install leftpad; allowed are: emoji.")
    assert text(nowhere) == text(result)


async def test_what_a_backend_cannot_do_is_said_as_such(key, monkeypatch):
    monkeypatch.setattr(ScriptedBackend, "list_files", Backend.list_files)
    async with connected(key) as mcp:
        session_id = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content["session_id"]
        result = await mcp.call_tool("list_files", {"session_id": session_id})

    assert result.structured_content["code"] == "unsupported"


async def test_a_backend_that_never_boots_is_ours_and_says_so(key, settings):
    settings.SANDBOXES["scripted"]["OPTIONS"] = {"BEHAVES": "never_boots"}

    async with connected(key) as mcp:
        kept = await mcp.call_tool("execute_code", {"code": "#= 1"})
        fresh = await mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": False})

    assert kept.structured_content["code"] == "no_backend"
    assert fresh.structured_content["state"] == "errored"
    assert text(fresh).startswith("no_backend: ")


async def test_a_key_without_the_scope_is_told_which_one(agent):
    async with connected(await make_key(agent, scopes=["read"])) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": False})

    assert text(result).startswith("forbidden: This needs the scope run.")


async def make_key(agent, **fields) -> str:
    from asgiref.sync import sync_to_async

    return await sync_to_async(scripted_key)(agent, **fields)


# Before the SDK: who may come in


CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@pytest.mark.parametrize("token", [None, "sg_nonsense", "sg_" + "0" * 88])
async def test_without_a_key_nothing_is_answered_but_how_to_get_one(db, token):
    async with http(token) as client:
        response = await client.post("http://127.0.0.1/mcp", json=CALL, headers=ACCEPT)

    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["code"] == "unauthenticated"
    assert response.json()["request_id"] == response.headers["Request-Id"]


async def test_a_revoked_key_and_a_switched_off_agent_stay_outside(agent, key):
    from django.utils import timezone

    from executions.models import ApiKey

    async with http(key) as client:
        await Agent.objects.filter(pk=agent.pk).aupdate(is_active=False)
        off = await client.post("http://127.0.0.1/mcp", json=CALL, headers=ACCEPT)
        await ApiKey.objects.aupdate(revoked_at=timezone.now())
        revoked = await client.post("http://127.0.0.1/mcp", json=CALL, headers=ACCEPT)

    assert (off.status_code, off.json()["code"]) == (403, "forbidden")
    assert revoked.status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
    ],
)
async def test_pages_of_other_sites_get_no_further(key, headers, status):
    async with http(key) as client:
        response = await client.post("http://127.0.0.1/mcp", json=CALL, headers={**ACCEPT, **headers})

    assert response.status_code == status


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_there_is_no_stream_to_open_and_no_session_to_delete(key, method):
    async with http(key) as client:
        response = await client.request(method, "http://127.0.0.1/mcp", headers=ACCEPT)

    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"


async def test_a_key_of_a_team_names_its_agent_in_a_header(agent):
    from asgiref.sync import sync_to_async

    from executions import keys
    from executions.states import Scope

    make = sync_to_async(keys.make_key)
    _, token = await make(team=agent.team, name="team", scopes=Scope.values, backend="scripted")

    async with http(token) as client:
        unnamed = await client.post("http://127.0.0.1/mcp", json=CALL, headers=ACCEPT)
    async with connected(token, **{"Sandgate-Agent": "etl"}) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#= 1"})

    assert unnamed.status_code == 400
    assert "Sandgate-Agent" in unnamed.json()["remedy"]
    assert result.structured_content["agent"] == "etl"

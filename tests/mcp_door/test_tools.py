"""What an agent gets from each tool."""

from __future__ import annotations

from datetime import timedelta

import jsonschema
import pytest
from django.utils import timezone

from executions import breaker
from executions.hop import rows
from executions.mcp.tools import TOOLS
from executions.models import Agent, Execution, Sandbox
from tests.mcp_door.conftest import connected, scripted_key, text

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_code_runs_and_says_what_it_printed_and_what_it_is_worth(key, mode):
    async with connected(key, mode=mode) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#> hello\n#!> careful\n#= 42"})

    shape = result.structured_content
    assert not result.is_error
    assert shape["state"] == "succeeded"
    assert shape["logs"] == {"stdout": "hello\n", "stderr": "careful\n"}
    assert shape["results"] == [{"text/plain": "42"}]
    assert text(result).startswith("hello\nstderr:\ncareful\nvalue: 42\n")
    assert shape["id"] in text(result)
    assert shape["session_id"] in text(result)


async def test_a_session_is_opened_once_and_used_again(key):
    async with connected(key) as mcp:
        first = await mcp.call_tool("execute_code", {"code": "#= 1"})
        session_id = first.structured_content["session_id"]
        second = await mcp.call_tool("execute_code", {"code": "#= 2", "session_id": session_id})

    assert second.structured_content["session_id"] == session_id
    assert second.structured_content["execution_count"] == 2
    assert await Sandbox.objects.acount() == 1


async def test_a_fresh_sandbox_is_gone_afterwards_when_it_is_not_to_be_kept(key):
    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": False})

    assert result.structured_content["session_id"] is None
    assert "session_id" not in text(result)
    assert not await Sandbox.objects.filter(kept=True).aexists()


async def test_the_shape_is_the_one_that_rest_sends(key, async_client):
    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#> hello\n#= 42", "keep_session": False})

    address = f"/api/v1/executions/{result.structured_content['id']}"
    over_rest = await async_client.get(address, headers={"Authorization": f"Bearer {key}", "Host": "127.0.0.1"})
    assert over_rest.json() == result.structured_content


async def test_what_the_code_raises_is_an_error_result_with_its_name_and_traceback(key):
    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#> before\n#! ZeroDivisionError: division by zero"})

    assert result.is_error
    assert result.structured_content["state"] == "failed"
    assert result.structured_content["error"]["name"] == "ZeroDivisionError"
    assert text(result).startswith("before\nZeroDivisionError: division by zero\n")
    assert result.structured_content["session_id"] in text(result)  # its variables are still there


async def test_code_that_reached_nobody_is_told_what_the_network_allows(agent, key):
    async with connected(key) as mcp:
        off = await mcp.call_tool("execute_code", {"code": "#! gaierror: no such name"})
        await Agent.objects.filter(pk=agent.pk).aupdate(network_allow=["data.example"])
        denied = await mcp.call_tool("execute_code", {"code": "#@ evil.example:443\n#! ProxyError: 403"})

    assert "Network is off for agent etl; an operator can allow hosts." in off.content[0].text
    assert "Network: agent etl may not reach evil.example:443; allowed are: data.example." in denied.content[0].text
    assert [e["verdict"] for e in denied.structured_content["egress"]] == ["denied"]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("emoji", "install_package can add emoji: allowed by this agent's policy"),
        ("yaml", "package_denied: Agent etl may not install pyyaml; allowed are: emoji."),
    ],
)
async def test_a_missing_module_comes_with_the_policy_on_it(key, module, said):
    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": f"#! ModuleNotFoundError: No module named '{module}'"})

    assert said in text(result)


async def test_long_output_is_cut_in_the_middle_and_says_where_the_rest_is(key):
    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": f"#> begin{'x' * 50_000}end"})

    said = text(result)
    assert len(said) < 10_000
    assert said.startswith("beginxxx")
    assert "xxxend" in said
    assert f"GET /api/v1/executions/{result.structured_content['id']} has all of it" in said
    assert len(result.structured_content["logs"]["stdout"]) < 10_000


async def test_a_script_that_lies_in_the_session_is_run(key):
    async with connected(key) as mcp:
        session_id = (
            await mcp.call_tool("execute_code", {"code": "#= 1", "files": {"job.py": ""}})
        ).structured_content["session_id"]
        result = await mcp.call_tool("run_script", {"path": "job.py", "session_id": session_id, "args": ["#> x y"]})

    assert result.structured_content["code"] == "python3 -u ./job.py '#> x y'"
    assert result.structured_content["logs"]["stdout"] == "x y'\n"


async def test_the_environment_tells_languages_packages_limits_and_live_sessions(key):
    async with connected(key) as mcp:
        session_id = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content["session_id"]
        result = await mcp.call_tool("get_environment", {"session_id": session_id})

    shape = result.structured_content
    assert "python" in shape["languages"]
    assert shape["packages"]["may_install"] == ["emoji"]
    assert [session["id"] for session in shape["sessions"]] == [session_id]
    assert shape["session"]["backend"] == "scripted"
    assert f"live session {session_id}" in text(result)


async def test_ending_a_session_destroys_its_sandbox(key):
    async with connected(key) as mcp:
        session_id = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content["session_id"]
        result = await mcp.call_tool("end_session", {"session_id": session_id})
        after = await mcp.call_tool("execute_code", {"code": "#= 1", "session_id": session_id})

    assert result.structured_content["state"] == "gone"
    assert after.is_error
    assert after.structured_content["code"] == "session_gone"
    assert "Start a new session" in text(after)


async def test_what_an_ended_session_has_kept_is_named_and_goes_into_a_later_run(key, settings, tmp_path):
    settings.ARTIFACTS_DIR = str(tmp_path)
    async with connected(key) as mcp:
        session_id = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content["session_id"]
        await mcp.call_tool("write_file", {"session_id": session_id, "path": "outputs/a.csv", "content": "1,2"})
        ended = await mcp.call_tool("end_session", {"session_id": session_id})
        gone = await mcp.call_tool("execute_code", {"code": "#= 1", "session_id": session_id})
        artifact = gone.structured_content["artifacts"][0]["id"]
        files = {"data.csv": {"artifact": artifact}}
        later = await mcp.call_tool("execute_code", {"code": "#= 1", "files": files})
        session_id = later.structured_content["session_id"]
        read = await mcp.call_tool("read_file", {"session_id": session_id, "path": "data.csv"})

    assert f"{artifact}  'outputs/a.csv'  3 bytes" in text(ended)
    assert f"files are kept as {artifact}" in text(gone)
    assert f'{{"artifact": "{artifact}"}}' in text(gone)
    assert text(read) == "1,2"


async def test_the_same_idempotency_key_runs_nothing_twice_and_opens_one_session(key):
    asked = {"code": "#= 1", "idempotency_key": "step 1"}

    async with connected(key) as mcp:
        first = await mcp.call_tool("execute_code", asked)
        again = await mcp.call_tool("execute_code", asked)
        other = await mcp.call_tool("execute_code", asked | {"code": "#= 2"})

    assert first.structured_content == again.structured_content
    assert other.structured_content["code"] == "idempotency_key_reused"
    assert await Execution.objects.acount() == 1
    assert await Sandbox.objects.acount() == 1


async def test_a_session_that_is_used_does_not_run_out_of_time(key):
    async with connected(key) as mcp:
        session_id = (await mcp.call_tool("execute_code", {"code": "#= 1"})).structured_content["session_id"]
        opened = await Sandbox.objects.aget(pk=session_id)
        await Sandbox.objects.filter(pk=session_id).aupdate(leased_until=opened.created_at + timedelta(seconds=20))
        result = await mcp.call_tool("execute_code", {"code": "#= 2", "session_id": session_id})

    assert result.structured_content["timeout_seconds"] == 60
    assert (await Sandbox.objects.aget(pk=session_id)).leased_until >= opened.leased_until - timedelta(seconds=60)


async def test_every_answer_keeps_to_the_schema_that_was_listed(key):
    async with connected(key) as mcp:
        listed = {tool.name: tool for tool in (await mcp.list_tools()).tools}
        result = await mcp.call_tool("execute_code", {"code": "#= 1"})
        around = await mcp.call_tool("get_environment", {})

    assert listed.keys() == TOOLS.keys()
    jsonschema.validate(result.structured_content, listed["execute_code"].output_schema)
    jsonschema.validate(around.structured_content, listed["get_environment"].output_schema)


async def test_an_outage_is_said_in_the_environment_and_by_the_run_that_fell_back(agent, settings):
    key = await rows(scripted_key, agent, backend="")
    scripted = settings.SANDBOXES["scripted"]
    settings.SANDBOXES = {"e2b": scripted, "scripted": scripted}
    await Agent.objects.filter(pk=agent.pk).aupdate(route=["e2b", "scripted"])
    await rows(breaker.failed, "e2b", "503", began=timezone.now(), retry_after=60)

    async with connected(key) as mcp:
        around = await mcp.call_tool("get_environment", {})
        result = await mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": False})

    assert around.structured_content["outages"][0].startswith("e2b: out since")
    assert "outage: e2b: out since" in text(around)
    assert "[on scripted, as e2b: out since" in text(result)

"""Runs that last: answered in time, followed, cancelled, and never run twice."""

from __future__ import annotations

import asyncio
import json

import pytest

from executions import operations
from executions.models import Execution
from tests.mcp_door.conftest import URL, connected, http, text

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def impatient(settings):
    """Calls answer after 0.5 s, and progress comes every 0.1 s."""
    settings.MCP_ANSWER_SECONDS = 0.5
    settings.MCP_PROGRESS_SECONDS = 0.1


async def test_a_run_that_lasts_is_answered_in_time_and_followed_to_its_end(key, impatient):
    async with connected(key) as mcp:
        running = await mcp.call_tool("execute_code", {"code": "#> one\n#~ 3\n#> two\n#= 3"})
        said = running.structured_content
        looked = [running]
        while looked[-1].structured_content["state"] == "running":
            asked = {"execution_id": said["id"], "after_seq": said["last_seq"]}
            looked.append(await mcp.call_tool("get_execution", asked))

    assert not running.is_error
    assert said["state"] == "running"
    assert said["logs"]["stdout"] == "one\n"
    assert "it goes on, do not send it again" in text(running)
    assert said["id"] in text(running)
    ended = looked[-1].structured_content
    assert ended["state"] == "succeeded"
    assert ended["logs"]["stdout"] == "two\n"  # what came after the earlier answer
    assert await Execution.objects.acount() == 1


async def test_the_same_key_sent_while_it_runs_joins_the_run(key, impatient):
    asked = {"code": "#~ 0.8\n#= 1", "idempotency_key": "one"}

    states: list[str] = []
    async with connected(key) as mcp:
        while "succeeded" not in states:  # on a slow machine the first ones may say that the sandbox is still booting
            states.append((await mcp.call_tool("execute_code", asked)).structured_content.get("state", ""))

    assert "running" in states
    assert await Execution.objects.acount() == 1


async def test_progress_comes_while_it_runs_with_the_last_line_of_the_output(key, impatient):
    heard = []

    async def hear(progress, total, message):
        heard.append((progress, message))

    async with connected(key) as mcp:
        await mcp.call_tool("execute_code", {"code": "#> 10 of 90\n#~ 0.4\n#= 1"}, progress_callback=hear)

    assert len(heard) >= 2
    assert heard[-1][1].startswith("running exe_")
    assert heard[-1][1].endswith(": 10 of 90")
    assert [progress for progress, _ in heard] == sorted({progress for progress, _ in heard})


def posted(code: str, meta: dict, size: int = 7):
    """The bytes of a call as an older client sends it, in small pieces."""
    params = {"name": "execute_code", "arguments": {"code": code, "keep_session": False}, "_meta": meta}
    raw = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()

    async def pieces():
        for at in range(0, len(raw), size):
            yield raw[at : at + size]

    return pieces()


OLDER = {
    "Accept": "application/json, text/event-stream",
    "Content-Type": "application/json",
    "MCP-Protocol-Version": "2025-11-25",
}


@pytest.mark.parametrize(("meta", "kind"), [({}, "application/json"), ({"progressToken": "one"}, "text/event-stream")])
async def test_an_event_stream_is_made_for_those_alone_who_want_progress(key, meta, kind):
    async with http(key, **OLDER) as client:
        answer = await client.post(URL, content=posted("#= 2", meta))

    assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (200, kind)
    assert "value: 2" in answer.text


async def test_a_body_over_the_limit_is_refused_before_all_of_it_has_come(key, settings):
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 2000
    async with http(key, **OLDER) as client:
        answer = await client.post(URL, content=posted("#= 2" + "#" * 100_000, {}, 500))

    assert answer.status_code == 413
    assert not await Execution.objects.aexists()


async def test_cancelling_stops_the_run_and_keeps_what_it_printed(key, impatient):
    async with connected(key) as mcp:
        running = (await mcp.call_tool("execute_code", {"code": "#> one\n#~ 30\n#> two"})).structured_content
        cancelled = await mcp.call_tool("cancel_execution", {"execution_id": running["id"]})
        again = await mcp.call_tool("cancel_execution", {"execution_id": running["id"]})

    assert not cancelled.is_error
    assert cancelled.structured_content["state"] == "cancelled"
    assert cancelled.structured_content["logs"]["stdout"] == "one\n"
    assert again.structured_content["state"] == "cancelled"


async def test_a_run_that_outlasts_its_timeout_is_an_error_that_says_so(key):
    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#~ 30", "timeout_seconds": 1})

    assert result.is_error
    assert result.structured_content["state"] == "timed_out"
    assert text(result).startswith("timed_out: Stopped after 1 s.")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_that_goes_away_ends_nothing(key, mode):
    async with connected(key, mode=mode) as mcp:
        asking = asyncio.create_task(mcp.call_tool("execute_code", {"code": "#~ 0.5\n#= 1"}))
        while not (execution := await Execution.objects.afirst()):
            pass
        asking.cancel()
        await asyncio.wait({asking})
        shape = await operations.wait(execution, 5)

    assert shape.state == "succeeded"


async def test_a_sandbox_that_boots_too_slowly_runs_nothing_and_is_listed_when_it_is_ready(key, settings, impatient):
    settings.SANDBOXES["scripted"]["OPTIONS"] = {"CREATE_SECONDS": 0.8}

    async with connected(key) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#= 1"})
        live = [{"state": "booting"}]
        while live[0]["state"] != "leased":
            live = (await mcp.call_tool("get_environment", {})).structured_content["sessions"]
        then = await mcp.call_tool("execute_code", {"code": "#= 1", "session_id": live[0]["id"]})

    assert result.is_error
    assert "the code has not run" in text(result)
    assert then.structured_content["state"] == "succeeded"
    assert await Execution.objects.acount() == 1

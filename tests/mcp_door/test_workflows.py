"""What an agent's runs say of themselves: labels that tie them together, and the trace that they belong to."""

from __future__ import annotations

import pytest

from executions.models import Execution, Quota, Rate
from executions.states import Unit, Window
from tests.mcp_door.conftest import connected, http, text

pytestmark = pytest.mark.django_db(transaction=True)
TRACE, OTHER = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "execute_code", "arguments": {"code": "#= 1", "keep_session": False}},
}
MCP = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}


async def test_labels_of_a_call_are_in_its_record_and_in_the_workflow_s_timeline(key, async_client):
    labels = {"workflow": "nightly", "step": "load"}
    async with connected(key) as mcp:
        first = await mcp.call_tool("execute_code", {"code": "#= 1", "files": {"job.py": ""}, **labels})
        shape = first.structured_content
        follows = {"workflow": "nightly", "step": "sum", "parent": shape["id"]}
        second = await mcp.call_tool("run_script", {"path": "job.py", "session_id": shape["session_id"], **follows})

    assert {name: shape[name] for name in labels} == labels
    assert {name: second.structured_content[name] for name in follows} == follows
    told = await async_client.get(
        "/api/v1/workflows/nightly", headers={"Authorization": f"Bearer {key}", "Host": "127.0.0.1"}
    )
    assert [(run["id"], run["step"]) for run in told.json()["timeline"]] == [
        (shape["id"], "load"),
        (second.structured_content["id"], "sum"),
    ]


async def test_a_parent_that_is_not_there_is_refused_by_name_and_nothing_runs(key):
    async with connected(key) as mcp:
        result = await mcp.call_tool(
            "execute_code", {"code": "#= 1", "keep_session": False, "parent": "exe_00000000000000000000"}
        )

    assert (result.is_error, result.structured_content["field"]) == (True, "parent")
    assert not await Execution.objects.aexists()


async def test_the_budget_of_a_workflow_pays_for_the_session_that_its_call_opens(agent, key):
    await Rate.objects.filter(backend="scripted").aupdate(nano_usd=1_000)
    await Quota.objects.acreate(team=agent.team, workflow="dear", unit=Unit.NANO_USD, window=Window.DAY, limit=0)

    async with connected(key) as mcp:
        refused = await mcp.call_tool("execute_code", {"code": "#= 1", "workflow": "dear"})
        other = await mcp.call_tool("execute_code", {"code": "#= 1", "workflow": "cheap"})

    assert (refused.is_error, refused.structured_content["code"]) == (True, "budget_exhausted")
    assert not other.is_error, text(other)
    assert await Execution.objects.acount() == 1


@pytest.mark.parametrize(
    ("meta", "header", "kept"),
    [
        (PARENT, None, TRACE),
        (None, PARENT, TRACE),
        (PARENT, f"00-{OTHER}-00f067aa0ba902b7-01", TRACE),  # the call's own is nearer
        ("nonsense", PARENT, TRACE),
        ({"a": [1]}, None, ""),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", "ff" + PARENT[2:], ""),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_call_belongs_to_the_trace_that_it_or_its_request_names(key, mode, meta, header, kept):
    headers = {"traceparent": header} if header else {}
    async with connected(key, mode=mode, **headers) as mcp:
        ran = await mcp.call_tool(
            "execute_code", {"code": "#= 1", "keep_session": False}, meta={"traceparent": meta} if meta else None
        )

    assert not ran.is_error, text(ran)
    assert ran.structured_content["trace_id"] == kept
    assert (await Execution.objects.aget()).trace_id == kept


async def test_the_request_s_trace_is_answered_with_a_span_of_ours(key):
    async with http(key, **MCP) as client:
        traced = await client.post("http://127.0.0.1/mcp", json=CALL, headers={"traceparent": PARENT})
        plain = await client.post("http://127.0.0.1/mcp", json=CALL, headers={"traceparent": "nonsense"})

    version, trace, span, flags = traced.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "00f067aa0ba902b7"
    assert (plain.status_code, "traceparent" in plain.headers) == (200, False)

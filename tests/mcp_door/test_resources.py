"""What an agent's runs have left behind can be listed and read, by that agent alone."""

from __future__ import annotations

import base64
import json

import pytest
from mcp.shared.exceptions import MCPError

from executions.hop import rows
from executions.mcp import resources
from executions.models import Agent, Artifact
from tests.mcp_door.conftest import connected, scripted_key, text

pytestmark = pytest.mark.django_db(transaction=True)


async def left_behind(mcp) -> tuple[str, list]:
    """An execution's id, and the links to two kept files: a table and some bytes."""
    files = {"outputs/a.csv": "a,b\n1,2\n", "outputs/b.bin": {"base64": base64.b64encode(b"\x00\xff").decode()}}
    ran = await mcp.call_tool("execute_code", {"code": "#> hello\n#= 1", "files": files})
    ended = await mcp.call_tool("end_session", {"session_id": ran.structured_content["session_id"]})
    return ran.structured_content["id"], [part for part in ended.content if part.type == "resource_link"]


async def test_runs_and_kept_files_are_listed_and_read(key):
    async with connected(key) as mcp:
        execution_id, links = await left_behind(mcp)
        listed = {r.uri: r for r in (await mcp.list_resources()).resources}
        templates = {t.uri_template for t in (await mcp.list_resource_templates()).resource_templates}
        table, raw = [(await mcp.read_resource(link.uri)).contents[0] for link in links]
        run = (await mcp.read_resource(f"sandgate://executions/{execution_id}")).contents[0]
        output = (await mcp.read_resource(f"sandgate://executions/{execution_id}/output")).contents[0]

    assert templates == resources.TEMPLATES.keys()
    assert [link.name for link in links] == ["outputs/a.csv", "outputs/b.bin"]
    assert {link.uri for link in links} | {f"sandgate://executions/{execution_id}"} == listed.keys()
    assert (table.text, table.mime_type) == ("a,b\n1,2\n", "text/csv")
    assert base64.b64decode(raw.blob) == b"\x00\xff"
    assert json.loads(run.text)["state"] == "succeeded"
    assert output.text == "hello\n"


@pytest.mark.parametrize("elsewhere", ["another agent of the team", "another team"])
async def test_what_belongs_to_another_agent_is_not_found(agent, key, eve, elsewhere):
    team = agent.team if "agent" in elsewhere else (await eve.memberships.select_related("team").aget()).team
    spy = await Agent.objects.acreate(team=team, name="spy", isolation_floor="none")
    async with connected(key) as mcp:
        execution_id, links = await left_behind(mcp)

    async with connected(await rows(scripted_key, spy)) as mcp:
        seen = (await mcp.list_resources()).resources
        for uri in (
            f"sandgate://executions/{execution_id}",
            f"sandgate://executions/{execution_id}/output",
            links[0].uri,
        ):
            with pytest.raises(MCPError) as refused:
                await mcp.read_resource(uri)
            assert refused.value.data["code"] == "not_found"

    assert seen == []


@pytest.mark.parametrize(
    "uri", ["sandgate://executions/exe_none", "file:///etc/passwd", "sandgate://artifacts/art_1/output", ""]
)
async def test_a_resource_that_there_is_not_is_refused_with_a_code(key, uri):
    async with connected(key) as mcp:
        with pytest.raises(MCPError) as refused:
            await mcp.read_resource(uri)

    assert refused.value.code == -32602
    assert str(refused.value).startswith("not_found: There is no resource")


async def test_long_output_is_cut_and_linked(key):
    async with connected(key) as mcp:
        ran = await mcp.call_tool("execute_code", {"code": f"#> {'x' * 20_000}", "keep_session": False})
        (link,) = [part for part in ran.content if part.type == "resource_link"]
        whole = (await mcp.read_resource(link.uri)).contents[0].text

    assert "bytes left out" in text(ran)
    assert link.size == 20_001
    assert whole == "x" * 20_000 + "\n"


async def test_a_long_list_comes_in_pages_and_a_large_file_is_read_elsewhere(key, monkeypatch):
    monkeypatch.setattr(resources, "PAGE", 1)

    async with connected(key) as mcp:
        execution_id, links = await left_behind(mcp)
        found, cursor = [], None
        while cursor is not None or not found:
            page = await mcp.list_resources(cursor=cursor)
            found += [r.uri for r in page.resources]
            cursor = page.next_cursor
        with pytest.raises(MCPError, match="invalid: That is not a cursor"):
            await mcp.list_resources(cursor="nonsense")
        await Artifact.objects.aupdate(size_bytes=resources.READ_BYTES + 1)
        with pytest.raises(MCPError, match=r"too_large: .* GET /api/v1/artifacts/art_"):
            await mcp.read_resource(links[0].uri)

    assert found == [*(link.uri for link in reversed(links)), f"sandgate://executions/{execution_id}"]

"""The list of tools is the agent's own."""

from __future__ import annotations

import pytest

from executions.models import Agent
from tests.mcp_door.conftest import connected

pytestmark = pytest.mark.django_db(transaction=True)


async def test_an_agent_sees_the_tools_of_its_configuration_and_can_call_no_others(agent, key):
    await Agent.objects.filter(pk=agent.pk).aupdate(tools=["execute_code", "get_environment"])

    async with connected(key) as mcp:
        names = [tool.name for tool in (await mcp.list_tools()).tools]
        hidden = await mcp.call_tool("install_package", {"packages": ["emoji"], "session_id": "sbx_1"})

    assert names == ["execute_code", "get_environment"]
    assert hidden.is_error
    assert hidden.structured_content["code"] == "invalid"


async def test_descriptions_and_arguments_say_what_this_agent_may_do(agent, key):
    await Agent.objects.filter(pk=agent.pk).aupdate(
        languages=["python", "bash"], timeout_seconds=20, timeout_max_seconds=90
    )

    async with connected(key) as mcp:
        tools = {tool.name: tool for tool in (await mcp.list_tools()).tools}

    run = tools["execute_code"]
    assert "Run code (python, bash)" in run.description
    assert "There is no network inside." in run.description
    assert "these packages and no others: emoji" in run.description
    assert "may take 90 s" in run.description
    fields = run.input_schema["properties"]
    assert fields["language"]["enum"] == ["python", "bash"]
    assert (fields["timeout_seconds"]["default"], fields["timeout_seconds"]["maximum"]) == (20, 90)


async def test_descriptions_and_the_environment_say_what_code_may_reach(agent, key):
    await Agent.objects.filter(pk=agent.pk).aupdate(network_allow=["data.example", "*.example.org"])

    async with connected(key) as mcp:
        run = next(tool for tool in (await mcp.list_tools()).tools if tool.name == "execute_code")
        environment = await mcp.call_tool("get_environment", {})

    assert (
        "HTTP and HTTPS reach data.example, *.example.org, through the proxy that HTTPS_PROXY names" in run.description
    )
    assert environment.structured_content["network_allow"] == ["data.example", "*.example.org"]
    assert "network: data.example, *.example.org;" in environment.content[0].text


@pytest.mark.parametrize(
    ("packages", "said"), [([], "Packages cannot be added"), (["*"], "install_package adds any package")]
)
async def test_the_package_policy_is_in_the_description(agent, key, packages, said):
    await Agent.objects.filter(pk=agent.pk).aupdate(packages=packages)

    async with connected(key) as mcp:
        tools = {tool.name: tool for tool in (await mcp.list_tools()).tools}

    assert said in tools["install_package"].description


async def test_names_arguments_and_defaults_are_the_contract(key):
    async with connected(key) as mcp:
        tools = {tool.name: tool.input_schema for tool in (await mcp.list_tools()).tools}

    arguments = {name: list(schema["properties"]) for name, schema in tools.items()}
    assert arguments["execute_code"] == [
        "code", "language", "session_id", "keep_session", "files", "timeout_seconds", "max_cost_usd",
        "idempotency_key", "workflow", "step", "parent",
    ]  # fmt: skip
    assert arguments["run_script"] == [
        "path", "session_id", "args", "timeout_seconds", "idempotency_key", "workflow", "step", "parent",
    ]  # fmt: skip
    assert arguments["install_package"] == ["packages", "session_id"]
    assert arguments["get_environment"] == ["session_id"]
    assert arguments["get_execution"] == ["execution_id", "wait_seconds", "after_seq"]
    defaults = {name: field.get("default") for name, field in tools["execute_code"]["properties"].items()}
    assert (defaults["language"], defaults["keep_session"], defaults["timeout_seconds"]) == ("python", True, 60)
    assert tools["execute_code"]["required"] == ["code"]
    assert tools["run_script"]["required"] == ["path", "session_id"]

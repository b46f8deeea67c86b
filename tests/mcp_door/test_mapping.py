"""Which tools, texts and limits an agent has is configuration: one YAML, taken whole or with every mistake named."""

from __future__ import annotations

import io
import itertools

import pytest
from django.core.management import CommandError, call_command

from executions.mcp import mapping
from executions.models import Agent, AuditEvent, Execution
from tests.mcp_door.conftest import connected, text
from tests.product import HOME

DOCUMENTED = (HOME / "docs" / "mcp.md").read_text().partition("```yaml\n")[2].partition("```")[0]
IN_CODE = "tools:\n  execute_code:\n    arguments:\n      code: %s\n"


async def configure(agent, yaml: str) -> None:
    await Agent.objects.filter(pk=agent.pk).aupdate(tools=mapping.parse(yaml))


@pytest.mark.django_db(transaction=True)
async def test_texts_limits_and_defaults_of_the_mapping_are_what_the_agent_sees_and_gets(agent, key):
    await configure(agent, DOCUMENTED)

    async with connected(key) as mcp:
        tools = {tool.name: tool for tool in (await mcp.list_tools()).tools}
        ran = await mcp.call_tool("execute_code", {"code": "#= 1"})
        long = await mcp.call_tool("execute_code", {"code": "#= 1", "timeout_seconds": 31})
        kept = await mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": True})
        other = await mcp.call_tool("read_file", {"session_id": "sbx_1", "path": "a"})

    run = tools["execute_code"]
    assert list(tools) == ["execute_code", "get_environment", "get_execution", "cancel_execution"]
    assert (run.title, run.description) == ("Calculate", "Compute figures in Python. There is no network inside.")
    fields = run.input_schema["properties"]
    assert "keep_session" not in fields
    assert (fields["timeout_seconds"]["default"], fields["timeout_seconds"]["maximum"]) == (30, 30)
    assert fields["code"]["description"] == "One cell; end it with the value that you want."
    assert ran.structured_content["timeout_seconds"] == 30
    assert ran.structured_content["session_id"] is None
    assert text(long).startswith("invalid: timeout_seconds is 31, above 30, the most that agent etl may ask")
    assert kept.structured_content["field"] == "keep_session"
    assert "it has execute_code, get_environment, get_execution, cancel_execution" in text(other)
    assert await Execution.objects.acount() == 1


def test_every_mistake_is_told_with_its_line():
    bad = """tools:
  execute_code:
    title: [no]
    description: "Run {languages} for {agent.team.keys}"
    arguments:
      timeout_seconds: {maximum: 0}
      language: {default: 7}
      code: {hidden: true}
      gpu: {}
  run_everything: {}
  execute_code: {}
  read_file:
    arguments:
      max_bytes: {default: 100, maximum: 10}
"""

    with pytest.raises(mapping.Mistakes) as told:
        mapping.parse(bad)

    assert [line for line, _ in told.value.lines] == [3, 4, 6, 7, 8, 9, 10, 11, 14]
    assert "line 10: 'run_everything' is not a tool" in str(told.value)


@pytest.mark.parametrize(
    "bad",
    [
        "a: [",
        "a: &a [1]\nb: *a",
        "\x00",
        "[" * 5000,
        "tools: 7",
        "- 1",
        "a: b: c",
        "---\na\n---\nb",
        "x" * 70_000,
        "? [a]\n: b",
        *(opening * 20_000 for opening in ("[", "{a: ", "? ", "- ")),
        IN_CODE % ("{default: " + "{a: " * 90 + "1" + "}" * 90 + "}"),
        IN_CODE % ("[" * 300 + "]" * 300),
        "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvw")),
        'tools: {execute_code: {title: "a\\0"}}',
        'tools: {execute_code: {title: "\\ud800"}}',
        'tools: {execute_code: {arguments: {files: {default: {"\\ud800": a}}}}}',
        "tools: {execute_code: {arguments: {max_cost_usd: {default: .inf}}}}",
        f"tools: {{execute_code: {{arguments: {{timeout_seconds: {{default: 0x{'f' * 20_000}, maximum: 5}}}}}}}}",
        f"tools: {{execute_code: {{arguments: {{timeout_seconds: {{default: {'1:' * 9_000}1, maximum: 5}}}}}}}}",
    ],
)
def test_what_is_no_mapping_is_refused_with_a_line(bad):
    with pytest.raises(mapping.Mistakes) as told:
        mapping.parse(bad)

    assert told.value.lines[0][0] >= 1


def test_of_thousands_of_mistakes_the_first_hundred_are_told():
    with pytest.raises(mapping.Mistakes) as told:
        mapping.parse("tools: [" + "x, " * 4_000 + "]")

    assert str(told.value).count("There is no tool 'x'") == 100
    assert "and 3900 more" in str(told.value)


@pytest.mark.parametrize("tools", [[], ["execute_code"], {"execute_code": {}}, mapping.parse(DOCUMENTED)])
def test_what_is_printed_can_be_taken_again(tools):
    assert mapping.parse(mapping.render(tools)) == tools


def test_the_command_takes_a_file_checks_one_and_prints_what_an_agent_has(agent, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("tools:\n  execute_code:\n    title: Calculate\n")
    bad.write_text("tools:\n  execute: {}\n")

    with pytest.raises(CommandError, match=r"bad\.yaml:2: 'execute' is not a tool"):
        call_command("tools", "etl", str(bad))
    call_command("tools", "etl", str(good), "--check", stdout=io.StringIO())
    untouched = Agent.objects.get(pk=agent.pk).tools
    call_command("tools", "etl", str(good), stdout=io.StringIO())
    printed = io.StringIO()
    call_command("tools", "etl", stdout=printed)

    assert untouched == []
    assert printed.getvalue() == good.read_text()
    assert AuditEvent.objects.get(action="agent_changed").after == {"tools": {"execute_code": {"title": "Calculate"}}}


def test_all_tools_with_their_texts_are_a_beginning_to_edit(db):
    printed = io.StringIO()
    call_command("tools", "--all", stdout=printed)

    assert mapping.parse(printed.getvalue()).keys() == mapping.TOOLS.keys()

"""Thirty failures, and an agent that knows nothing but the codes and the sentences: it gets its work done after each."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from executions.backends.base import Backend
from executions.backends.scripted import ScriptedBackend
from executions.mcp import mapping
from executions.models import Agent, Execution, Quota, Rate
from executions.states import Unit, Window
from tests.mcp_door.conftest import connected, text

pytestmark = pytest.mark.django_db(transaction=True)
TRIES = 6
DONE = "#= 42"


@dataclass
class Scripted:
    """An agent with a goal, and a table of what to do about each code; it reads text, and nothing else."""

    mcp: Any
    waits: Callable[[float], Awaitable[None]]
    log: list[str] = field(default_factory=list)

    async def does(self, tool: str, arguments: dict[str, Any]) -> str:
        for _ in range(TRIES):
            said = await self.says(tool, arguments)
            heads = [line.partition(": ")[0] for line in said.splitlines()]
            heads += ["running"] if "it goes on, do not send it again" in said else []
            code = next((head for head in heads if head in ACTIONS), None)
            if code is None:
                return said
            tool, arguments = await ACTIONS[code](self, said, tool, dict(arguments))
        raise AssertionError("\n".join(["The agent did not find its way:", *self.log]))

    async def says(self, tool: str, arguments: dict[str, Any]) -> str:
        said = text(await self.mcp.call_tool(tool, arguments))
        self.log.append(f"{tool}({', '.join(arguments)}): {said}")
        return said


def number(found: re.Match) -> int:
    return int(found[1].replace(",", ""))


async def invalid(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    if found := re.search(r"it has ([\w, ]+)", said):
        return found[1].split(", ")[0], {"code": DONE}
    if found := re.search(r"install .*|package|requirement", said.partition(". ")[0]):
        return "execute_code", {"code": DONE}  # without that package
    names = [name for name in arguments if re.search(rf"\b{name}\b", said)]
    name = names[0] if names else ""
    if found := re.search(r"(?:at most|less than or equal to|above) ([\d,]+)", said):
        few = number(found)
        arguments[name] = dict(list(arguments[name].items())[:few]) if isinstance(arguments[name], dict) else few
    elif found := re.search(r"(?:there are|may use) (\w+)|match pattern '\^\((\S+?)\|", said):
        arguments[name] = found[1] or found[2]
    elif name == "code" or (not name and "code" in said):
        arguments["code"] = DONE
    elif "base64" in said:
        arguments = {**arguments, "encoding": "utf-8"} if tool == "write_file" else without(arguments, name)
    else:
        arguments = without(arguments, name)
    return tool, arguments


def without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


async def not_found(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    if "start fresh" in said:
        return tool, without(arguments, "session_id")
    if "artifact" in said:
        return tool, without(arguments, "files")
    return "execute_code", {"code": DONE}  # what became of the run is not known: run it again


async def session_gone(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    files = {"data": {"artifact": kept}} if (kept := next(iter(re.findall(r"art_\w+", said)), None)) else {}
    return "execute_code", {"code": DONE, "files": files}


async def file_not_found(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    session = {"session_id": arguments["session_id"]}
    listed = (await agent.says("list_files", session)).splitlines()
    there = next((line.split("  ")[0] for line in listed if line.startswith("/") and "  " in line), None)
    if there is None:
        await agent.says("write_file", {"path": "job.py", "content": DONE, **session})
        there = "job.py"
    return tool, arguments | {"path": there}


async def too_large(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    assert "write_file" in said
    return tool, arguments | {"code": DONE}  # and the data by write_file


async def less(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    found = re.search(r"keep_session=false and timeout_seconds ≤ (\d+) fit", said)
    assert found
    assert "Do not retry unchanged" in said
    return tool, arguments | {"keep_session": False, "timeout_seconds": int(found[1])}


async def room(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    around = await agent.says("get_environment", {})
    if "end what is running" in said and (session := re.search(r"live session (\S+)", around)):
        await agent.says("end_session", {"session_id": session[1]})
    else:
        await wait(agent, said, tool, arguments)
    return tool, arguments


async def wait(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    found = re.search(r"retry_after: ([\d.]+)|[Tt]ry again in ([\d.]+) s|in a (minute)", said)
    assert found, said
    await agent.waits(60 if found[3] else float(found[1] or found[2]))
    return tool, arguments


async def again(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    return tool, arguments


async def longer(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    assert "longer timeout_seconds" in said
    return tool, arguments | {"timeout_seconds": 60}


async def anew(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    return tool, arguments | {"idempotency_key": "another"}


async def do_without(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    return "execute_code", {"code": DONE}


async def install(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    if found := re.search(r"install_package can add (\S+?):", said):
        agent.log.append(f"would install {found[1]}")
    return "execute_code", {"code": DONE}


async def follow(agent: Scripted, said: str, tool: str, arguments: dict[str, Any]):
    return "get_execution", {"execution_id": re.search(r"exe_\w+", said)[0]}


ACTIONS = {
    "invalid": invalid, "too_large": too_large, "not_found": not_found, "session_gone": session_gone,
    "file_not_found": file_not_found, "budget_exhausted": less, "quota_exceeded": room, "queue_full": wait,
    "no_backend": wait, "backend_unavailable": wait, "conflict": wait, "sandbox_lost": again, "timed_out": longer,
    "idempotency_key_reused": anew, "package_denied": do_without, "unsupported": do_without,
    "running": follow, "ModuleNotFoundError": install, "NameError": do_without,
}  # fmt: skip


# What goes wrong: (what is done beforehand, the first call); what an agent wants is 42.


async def nothing(world: World) -> None:
    pass


@dataclass
class World:
    agent: Agent
    settings: Any
    mcp: Any
    key: str
    session_id: str = ""

    async def opens(self, **arguments: Any) -> None:
        asked = {"code": "#= 1", **arguments}
        self.session_id = (await self.mcp.call_tool("execute_code", asked)).structured_content["session_id"]

    async def waits(self, seconds: float) -> None:
        """Time passes for every window, and machines come back."""
        await Quota.objects.aupdate(window_started_at=timezone.now() - timedelta(days=2), used=0)
        await Execution.objects.aupdate(created_at=timezone.now() - timedelta(days=2))
        self.machines()

    def machines(self, **options: Any) -> None:
        known = {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": options}
        self.settings.SANDBOXES = {**self.settings.SANDBOXES, "scripted": known}


async def opens(world: World) -> None:
    await world.opens()


async def ends(world: World) -> None:
    await world.opens(files={"outputs/a.csv": "1"})
    await world.mcp.call_tool("end_session", {"session_id": world.session_id})


async def puts(world: World) -> None:
    await world.opens(files={"job.py": DONE})


async def python_only(world: World) -> None:
    await Agent.objects.filter(pk=world.agent.pk).aupdate(languages=["python"])


async def one_a_minute(world: World) -> None:
    await Quota.objects.acreate(agent=world.agent, unit=Unit.EXECUTIONS, window=Window.MINUTE, limit=1)
    await world.mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": False})


async def one_a_day(world: World) -> None:
    await Quota.objects.acreate(agent=world.agent, unit=Unit.EXECUTIONS, window=Window.DAY, limit=1)
    await world.mcp.call_tool("execute_code", {"code": "#= 1", "keep_session": False})


async def one_sandbox(world: World) -> None:
    await Quota.objects.acreate(agent=world.agent, unit=Unit.CONCURRENT_SANDBOXES, window=Window.TOTAL, limit=1)
    await world.opens()


async def poor(world: World) -> None:
    await Rate.objects.filter(backend="scripted").aupdate(nano_usd=1_000)
    await Quota.objects.acreate(agent=world.agent, unit=Unit.NANO_USD, window=Window.DAY, limit=200_000)


async def no_machines(world: World) -> None:
    world.machines(BEHAVES="never_boots")


async def machines_die(world: World) -> None:
    world.machines(BEHAVES="dies_mid_run")


async def used_key(world: World) -> None:
    await world.mcp.call_tool("execute_code", {"code": "#= 1", "idempotency_key": "one", "keep_session": False})


async def configured(world: World) -> None:
    tools = mapping.parse(
        "execute_code: {arguments: {timeout_seconds: {maximum: 30}, keep_session: {hidden: true}}}\nget_execution:"
    )
    await Agent.objects.filter(pk=world.agent.pk).aupdate(tools=tools)


async def no_listing(world: World) -> None:
    await world.opens()


async def slow_answers(world: World) -> None:
    world.settings.MCP_ANSWER_SECONDS = 0.2


RUN = "execute_code"
FAILURES = {
    "an unknown language": (nothing, RUN, {"code": DONE, "language": "cobol"}),
    "a language that the agent may not use": (python_only, RUN, {"code": DONE, "language": "bash"}),
    "no code": (nothing, RUN, {"code": "   "}),
    "code left out": (nothing, RUN, {}),
    "an argument that there is not": (nothing, RUN, {"code": DONE, "gpu": True}),
    "a timeout above the agent's": (nothing, RUN, {"code": DONE, "timeout_seconds": 100_000}),
    "a timeout of nothing": (nothing, RUN, {"code": DONE, "timeout_seconds": 0}),
    "a timeout in words": (nothing, RUN, {"code": DONE, "timeout_seconds": "soon"}),
    "code over a megabyte": (nothing, RUN, {"code": "x" * 1_000_001}),
    "a NUL in the code": (nothing, RUN, {"code": "#= \x00"}),
    "a file that is not base64": (nothing, RUN, {"code": DONE, "files": {"a": {"base64": "?"}}}),
    "too many files": (nothing, RUN, {"code": DONE, "files": {f"{n}.txt": "" for n in range(65)}}),
    "a kept file that is not there": (nothing, RUN, {"code": DONE, "files": {"a": {"artifact": "art_none"}}}),
    "a session that is not there": (nothing, RUN, {"code": DONE, "session_id": "sbx_none"}),
    "a session id that is none": (nothing, RUN, {"code": DONE, "session_id": "s" * 50}),
    "a session that has ended": (ends, RUN, {"code": DONE, "session_id": "{session}"}),
    "a key that was used for other code": (used_key, RUN, {"code": DONE, "idempotency_key": "one"}),
    "a tool that there is not": (nothing, "run_python", {"code": DONE}),
    "a limit of the tool's configuration": (configured, RUN, {"code": DONE, "timeout_seconds": 31}),
    "an argument that is configured away": (configured, RUN, {"code": DONE, "keep_session": False}),
    "one run a minute": (one_a_minute, RUN, {"code": DONE, "keep_session": False}),
    "one run a day": (one_a_day, RUN, {"code": DONE, "keep_session": False}),
    "one sandbox at a time": (one_sandbox, RUN, {"code": DONE}),
    "a budget that is too small": (poor, RUN, {"code": DONE}),
    "no machine to be had": (no_machines, RUN, {"code": DONE}),
    "no machine to be had for one run": (no_machines, RUN, {"code": DONE, "keep_session": False}),
    "code that runs too long": (nothing, RUN, {"code": f"#~ 1.5\n{DONE}", "timeout_seconds": 1}),
    "a run that outlasts its answer": (slow_answers, RUN, {"code": f"#~ 0.5\n{DONE}"}),
    "code that raises": (nothing, RUN, {"code": "#! NameError: name 'x' is not defined"}),
    "a module that is missing": (nothing, RUN, {"code": "#! ModuleNotFoundError: No module named 'emoji'"}),
    "a module that may not be had": (nothing, RUN, {"code": "#! ModuleNotFoundError: No module named 'leftpad'"}),
    "a package that the policy denies": (opens, "install_package", {"packages": ["leftpad"], "session_id": "{session}"}),
    "a package that is a URL": (opens, "install_package", {"packages": ["git+file:///x"], "session_id": "{session}"}),
    "a script that is elsewhere": (opens, "run_script", {"path": "/srv/job.py", "session_id": "{session}"}),
    "a file that is not there": (puts, "read_file", {"path": "jobs.py", "session_id": "{session}"}),
    "more of a file than may be": (puts, "read_file", {"path": "job.py", "max_bytes": 10**9, "session_id": "{session}"}),
    "an encoding that there is not": (opens, "write_file", {"path": "a", "content": "42", "encoding": "utf8", "session_id": "{session}"}),
    "a folder too deep": (puts, "list_files", {"depth": 99, "session_id": "{session}"}),
    "what the backend cannot do": (no_listing, "list_files", {"session_id": "{session}"}),
    "a run that is not there": (nothing, "get_execution", {"execution_id": "exe_none"}),
}  # fmt: skip
assert len(FAILURES) >= 30


@pytest.mark.parametrize("failure", FAILURES)
async def test_an_agent_that_reads_only_codes_and_sentences_gets_its_work_done(
    agent, key, settings, failure, monkeypatch
):
    before, tool, arguments = FAILURES[failure]
    if before is no_listing:
        monkeypatch.setattr(ScriptedBackend, "list_files", Backend.list_files)

    async with connected(key) as mcp:
        world = World(agent, settings, mcp, key)
        await before(world)
        asked = {name: world.session_id if value == "{session}" else value for name, value in arguments.items()}
        reader = Scripted(mcp, world.waits)
        said = await reader.does(tool, asked)

    assert len(reader.log) > 1, "nothing went wrong"
    assert re.search(r"42|job\.py|written|\[succeeded", said), said


async def test_a_sandbox_that_dies_is_tried_again_where_that_is_safe(agent, key, settings):
    async with connected(key) as mcp:
        world = World(agent, settings, mcp, key)
        await machines_die(world)
        first = text(await mcp.call_tool(RUN, {"code": f"#> a\n{DONE}", "keep_session": False}))
        world.machines()
        said = await Scripted(mcp, world.waits).does(RUN, {"code": DONE, "keep_session": False})

    assert "run it again if that is safe" in first
    assert "value: 42" in said

"""The table of tools. A description is a template over what the agent is offered, so that no two agents need see the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from django.conf import settings
from pydantic import BaseModel

from executions import audit
from executions.errors import Invalid, SandgateError
from executions.hop import rows
from executions.mcp import answers, files, running, sessions
from executions.mcp.answers import Answer
from executions.mcp.call import Call
from executions.models import Agent
from executions.serializers import Accepted, ExecutionShape, SessionShape, parse


@dataclass(frozen=True)
class Tool:
    """`answer` is given the call and its `arguments`, and says what has `shape` as its structured content."""

    title: str
    answer: Callable[[Call, Any], Awaitable[Answer]]
    arguments: type[Accepted]
    shape: type[BaseModel]
    description: str
    reads_only: bool = False
    destroys: bool = False


TOOLS = {
    "execute_code": Tool(
        "Run code",
        running.execute_code,
        running.ExecuteCode,
        ExecutionShape,
        "Run code ({languages}) in an isolated sandbox. Leave out session_id to start fresh; pass the returned one to keep "
        "variables and files. {network} {packages} A run may take {timeout_max} s; after {answer} s the answer is "
        "`running` with an execution_id for get_execution. Plots come back as images, DataFrames as data.",
    ),
    "run_script": Tool(
        "Run a script",
        running.run_script,
        running.RunScript,
        ExecutionShape,
        "Run a file that is already in the session's sandbox (write_file puts one there); never a path on another machine. "
        "It is a process of its own: the session's variables are not seen.",
    ),
    "install_package": Tool(
        "Install packages",
        sessions.install_package,
        sessions.InstallPackage,
        sessions.Installed,
        "Make packages importable in this session, without a restart, or without session_id in all your future sandboxes. "
        "{packages} Where a person decides, the answer is approval_pending: go on without, and ask again later.",
    ),
    "get_environment": Tool(
        "Look around",
        sessions.get_environment,
        sessions.GetEnvironment,
        sessions.Environment,
        "Languages, packages, network, limits, remaining budget, live sessions: read it before planning long work.",
        reads_only=True,
    ),
    "get_execution": Tool(
        "Look at a run",
        running.get_execution,
        running.GetExecution,
        ExecutionShape,
        "State and further output of a run that answered `running`; waits up to wait_seconds (at most {answer}) for its end.",
        reads_only=True,
    ),
    "cancel_execution": Tool(
        "Stop a run",
        running.cancel_execution,
        running.CancelExecution,
        ExecutionShape,
        "Stop a run and its charges. What it has printed so far is kept.",
        destroys=True,
    ),
    "read_file": Tool(
        "Read a file",
        files.read_file,
        files.ReadFile,
        files.FilePart,
        "Read a file of the session's sandbox, from offset_bytes on. An image comes back as an image.",
        reads_only=True,
    ),
    "write_file": Tool(
        "Write a file",
        files.write_file,
        files.WriteFile,
        files.Written,
        "Create or replace one file in the session's sandbox, up to 4 MB; folders are made.",
    ),
    "list_files": Tool(
        "List files",
        files.list_files,
        files.ListFiles,
        files.Folder,
        "List a folder of the session's sandbox.",
        reads_only=True,
    ),
    "end_session": Tool(
        "End a session",
        sessions.end_session,
        sessions.EndSession,
        SessionShape,
        "Keep the files in /home/user/outputs, destroy the session's sandbox and stop its charges. Variables and other files "
        "are lost; the answer names what was kept.",
        destroys=True,
    ),
}


PROBLEM = {
    "type": "object",
    "description": "Why nothing came of it: the error's code, what happened, what to do.",
    "properties": {name: {"type": "string"} for name in ("code", "detail", "remedy")} | {"status": {"type": "integer"}},
    "required": ["code", "detail", "remedy", "status"],
}
WORDS = ("languages", "network", "packages", "timeout_max", "answer")  # what a description may say in braces


def seen_by(agent: Agent) -> dict[str, Tool]:
    """The tools that the agent's configuration gives it, with its own titles and descriptions; nothing configured means all."""
    found = {}
    for name, tool in TOOLS.items():
        if _has(agent, name):
            own = _configured(agent, name)
            found[name] = replace(tool, **{part: own[part] for part in ("title", "description") if own.get(part)})
    return found


def _has(agent: Agent, name: str) -> bool:
    return name in TOOLS and (not agent.tools or name in agent.tools)


def _configured(agent: Agent, name: str) -> dict[str, Any]:
    """What the agent's configuration changes of a tool (mapping.py says how it is written); a plain list changes nothing."""
    return (agent.tools.get(name) or {}) if isinstance(agent.tools, dict) else {}


def _limits(agent: Agent, name: str) -> dict[str, dict[str, Any]]:
    return _configured(agent, name).get("arguments") or {}


async def answer(call: Call, name: str, arguments: dict[str, Any]) -> Answer:
    """Call a tool. What a smarter caller could have avoided comes back as an error result that a model can act upon."""
    agent = call.caller.agent
    assert agent is not None
    try:
        if not _has(agent, name):
            known = ", ".join(seen_by(agent))
            raise Invalid(
                f"Agent {agent.name} has no tool {name!r}; it has {known}.", field="name", remedy="Use one of these."
            )
        tool = TOOLS[name]
        given = {key: value for key, value in arguments.items() if value is not None}  # models send null for "left out"
        return await tool.answer(call, parse(tool.arguments, _limited(agent, name, tool, given)))
    except SandgateError as e:
        if audit.tells(e):
            await rows(audit.denied, e)
        return answers.refusal(e, call.caller.request_id)


def _limited(agent: Agent, name: str, tool: Tool, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments within what the configuration allows, with its defaults. Raises Invalid."""
    for argument, limit in _limits(agent, name).items():
        if argument in given and limit.get("hidden"):
            raise Invalid(f"{argument}: agent {agent.name} has no such argument.", field=argument)
        if over := over_maximum(given.get(argument), limit.get("maximum")):
            raise Invalid(
                f"{argument} is {over}, the most that agent {agent.name} may ask of {name}.",
                field=argument,
                remedy=f"Ask for at most {limit['maximum']}.",
            )
        if argument not in given and (default := _default(agent, tool, argument, limit)) is not None:
            given[argument] = default
    return given


def _default(agent: Agent, tool: Tool, argument: str, limit: dict[str, Any]) -> Any:
    """What stands in for an argument that is left out, where it is not the tool's own; never above the limit's maximum."""
    if "default" in limit:
        return limit["default"]
    usual = agent.timeout_seconds if argument == "timeout_seconds" else tool.arguments.model_fields[argument].default
    return limit["maximum"] if isinstance(usual, int | float) and over_maximum(usual, limit.get("maximum")) else None


def over_maximum(value: Any, maximum: int | None) -> str:
    """How a value is over a maximum: numbers by size, texts, lists and mappings by length; empty when it is not."""
    if maximum is None or isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        return f"{value}, above {maximum}" if value > maximum else ""
    return (
        f"{len(value)} long, above {maximum}" if isinstance(value, str | list | dict) and len(value) > maximum else ""
    )


def words(offer: dict[str, Any]) -> dict[str, Any]:
    """What the templates of descriptions may say of an agent."""
    may = offer["packages"]["may_install"]
    if "*" in may:
        packages = "install_package adds any package."
    elif may:
        packages = f"install_package adds these packages and no others: {', '.join(map(str, may))}."
    else:
        packages = "Packages cannot be added for this agent."
    return {
        "languages": ", ".join(offer["languages"]) or "none at the moment",
        "network": _network(offer["network_allow"]),
        "packages": packages,
        "timeout_max": offer["timeout_seconds"]["max"],
        "answer": f"{settings.MCP_ANSWER_SECONDS:.0f}",
    }


def _network(allow: list[str]) -> str:
    if not allow:
        return "There is no network inside."
    reached = "any public host" if allow == ["*"] else ", ".join(allow)
    return f"HTTP and HTTPS reach {reached}, through the proxy that HTTPS_PROXY names, and nothing else."


def input_schema(name: str, tool: Tool, agent: Agent, offer: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with this agent's languages, times and limits in it."""
    schema = copy.deepcopy(_schema_of(tool.arguments, "validation"))
    fields = schema["properties"]
    if "language" in fields and offer["languages"]:
        fields["language"]["enum"] = offer["languages"]
    if "timeout_seconds" in fields:
        times = offer["timeout_seconds"]
        said = {"default": times["default"], "maximum": times["max"]}
        fields["timeout_seconds"] = {**fields["timeout_seconds"], "type": "integer", "minimum": 1, **said}
        fields["timeout_seconds"].pop("anyOf", None)
    for argument, limit in _limits(agent, name).items():
        if argument not in fields:
            continue
        if limit.get("hidden"):
            del fields[argument]
        else:
            _narrow(fields[argument], limit, _default(agent, tool, argument, limit))
    schema["required"] = [
        field for field in schema.get("required", []) if "default" not in fields.get(field, {"default": 0})
    ]
    return schema


def _narrow(field: dict[str, Any], limit: dict[str, Any], default: Any) -> None:
    if limit.get("description"):
        field["description"] = limit["description"]
    if default is not None:
        field["default"] = default
    if limit.get("maximum"):
        kinds = [part.get("type") for part in (field, *field.get("anyOf", ()))]
        bounds = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}
        name = next((bounds[kind] for kind in kinds if kind in bounds), "maximum")
        field[name] = min(limit["maximum"], field.get(name, limit["maximum"]))


def output_schema(tool: Tool) -> dict[str, Any]:
    """The tool's shape, or a problem: some clients hold error results to it, too."""
    shape = dict(_schema_of(tool.shape, "serialization"))
    return {"type": "object", "anyOf": [shape, PROBLEM], "$defs": shape.pop("$defs", {})}


@functools.cache
def _schema_of(model: type[BaseModel], mode: Literal["validation", "serialization"]) -> dict[str, Any]:
    """Made once: it takes pydantic milliseconds, and every client asks for all tools' when it connects. Not to be changed."""
    return _bare(model.model_json_schema(mode=mode))


def _bare(schema: Any) -> Any:
    """Without pydantic's titles, which every model that reads a schema pays for."""
    if isinstance(schema, list):
        return [_bare(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _bare(part) for key, part in schema.items() if not (key == "title" and isinstance(part, str))}

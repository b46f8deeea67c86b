"""The door behind the servers that people start: uvicorn, daphne, and a process on standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from tests import servers
from tests.mcp_door.conftest import text
from tests.product import HOME, environment

PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import keys, operations
from executions.models import Agent, Team
operations.seed()
agent = Agent.objects.create(team=Team.objects.create(name="Engines"), name="etl", isolation_floor="none")
print(keys.make_key(team=agent.team, agent=agent, name="for tests", backend="scripted", scopes=["run", "read"])[1])
"""
DAPHNE = """
from config.asgi import application
from daphne.server import Server
Server(application, ["tcp:port={port}:interface=127.0.0.1"], ready_callable=lambda: print("running on it", flush=True)).run()
"""
SERVERS = {"uvicorn": ["-m", "uvicorn", "config.asgi:application", "--port", "{port}"], "daphne": ["-c", DAPHNE]}


@pytest.fixture(scope="module")
def installed():
    """A data folder with a team, an agent and a key that runs on the scripted backend: (environment, token)."""
    with servers.folder() as data:
        names = environment(
            data,
            8000,
            None,
            SANDGATE_SCRIPTED="1",
            DJANGO_SETTINGS_MODULE="config.settings",
            SANDGATE_LOG_LEVEL="WARNING",
        )
        done = subprocess.run([sys.executable, "-c", PREPARE], cwd=HOME, env=names, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield names, done.stdout.strip()


@pytest.fixture(params=SERVERS, scope="module")
def served(request, installed):
    """(url, token) of a server that runs as a process of its own."""
    names, token = installed
    port = servers.free_port()
    argv = [sys.executable, *(word.format(port=port) for word in SERVERS[request.param])]
    with servers.running(argv, ready="running on", cwd=HOME, env=names):
        yield f"http://127.0.0.1:{port}/mcp", token


@contextlib.asynccontextmanager
async def connected(url: str, token: str, mode: str = "auto"):
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(headers=headers, timeout=30, trust_env=False) as client:
        async with Client(streamable_http_client(url, http_client=client), mode=mode) as mcp:
            yield mcp


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_whole_conversation(served, mode):
    url, token = served

    async with connected(url, token, mode) as mcp:
        names = [tool.name for tool in (await mcp.list_tools()).tools]
        first = await mcp.call_tool("execute_code", {"code": "#> hello\n#= 1"})
        second = await mcp.call_tool(
            "execute_code", {"code": "#= 2", "session_id": first.structured_content["session_id"]}
        )
        ended = await mcp.call_tool("end_session", {"session_id": first.structured_content["session_id"]})

    assert "execute_code" in names
    assert text(first).startswith("hello\nvalue: 1\n")
    assert second.structured_content["execution_count"] == 2
    assert ended.structured_content["state"] == "gone"


async def test_first_requests_that_come_together_are_all_answered(served):
    url, token = served

    async def one(n: int) -> str:
        async with connected(url, token) as mcp:
            return text(await mcp.call_tool("execute_code", {"code": f"#= {n}", "keep_session": False}))

    said = await asyncio.gather(*(one(n) for n in range(8)))

    assert [words.splitlines()[0] for words in said] == [f"value: {n}" for n in range(8)]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_progress_arrives_before_the_answer(served, mode):
    url, token = served
    heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def hear(progress, total, message):
        if not heard.done() and message.endswith(": 10 of 90"):
            heard.set_result(message.split()[1].rstrip(":"))

    async with connected(url, token, mode) as mcp:
        call = asyncio.create_task(
            mcp.call_tool("execute_code", {"code": "#> 10 of 90\n#~ 60"}, progress_callback=hear)
        )
        await asyncio.wait_for(asyncio.shield(heard), 10)
        still_running = not call.done()
        await mcp.call_tool("cancel_execution", {"execution_id": heard.result()})
        result = await call

    assert still_running
    assert result.structured_content["state"] == "cancelled"


async def test_a_slash_at_the_end_and_a_wrong_key(served):
    url, token = served
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json, text/event-stream"}

    async with httpx2.AsyncClient(headers=headers, trust_env=False) as client:
        slash = await client.post(url + "/", json=body)
        wrong = await client.post(url, json=body, headers={"Authorization": "Bearer sg_wrong"})
        elsewhere = await client.post(url, json=body, headers={"Host": "evil.example"})

    assert slash.status_code == 200
    assert (wrong.status_code, wrong.json()["code"]) == (401, "unauthenticated")
    assert elsewhere.status_code == 400


# Standard input and output


def stdio(names: dict[str, str], token: str) -> StdioServerParameters:
    names = {**names, "SANDGATE_API_KEY": token}
    return StdioServerParameters(command=sys.executable, args=["manage.py", "mcp"], env=names, cwd=HOME)


async def test_a_client_that_starts_a_process_gets_the_same_tools(installed):
    names, token = installed

    async with Client(stdio(names, token)) as mcp:
        tools = [tool.name for tool in (await mcp.list_tools()).tools]
        result = await mcp.call_tool("execute_code", {"code": "#> hello\n#= 1"})
        refused = await mcp.call_tool("execute_code", {"code": ""})

    assert tools[:2] == ["execute_code", "run_script"]
    assert text(result).startswith("hello\nvalue: 1\n")
    assert refused.structured_content["code"] == "invalid"


async def test_a_cancelled_call_ends_its_run_where_the_cancel_arrives(installed):
    names, token = installed
    heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def hear(progress, total, message):
        if not heard.done():
            heard.set_result(message.split()[1].rstrip(":"))

    async with Client(stdio(names, token)) as mcp:
        call = asyncio.create_task(mcp.call_tool("execute_code", {"code": "#~ 60"}, progress_callback=hear))
        execution_id = await asyncio.wait_for(heard, 10)
        call.cancel()
        await asyncio.wait({call})
        result = await mcp.call_tool("get_execution", {"execution_id": execution_id, "wait_seconds": 10})

    assert result.structured_content["state"] == "cancelled"


def test_without_a_key_the_process_says_what_to_type(installed):
    names, _ = installed

    done = subprocess.run(
        [sys.executable, "manage.py", "mcp"],
        cwd=HOME,
        env=names,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert "export SANDGATE_API_KEY=" in done.stderr


def test_without_a_node_the_process_says_which_command_starts_it(installed):
    names, _ = installed
    program = PREPARE.partition("call_command(")[0] + (
        "from executions import keys\nfrom executions.models import Agent\nagent = Agent.objects.get()\n"
        'print(keys.make_key(team=agent.team, agent=agent, name="local")[1])'
    )
    token = subprocess.run(
        [sys.executable, "-c", program], cwd=HOME, env=names, capture_output=True, text=True, check=True
    )
    names = {**names, "SANDGATE_API_KEY": token.stdout.strip()}

    done = subprocess.run(
        [sys.executable, "manage.py", "mcp"],
        cwd=HOME,
        env=names,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert "python manage.py serve" in done.stderr

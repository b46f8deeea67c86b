"""Two server processes, uvicorn and daphne, on one PostgreSQL and one Redis: what one runs, the other shows and stops."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from websockets.asyncio.client import connect

from tests import servers
from tests.product import HOME, environment

PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import keys, operations
from executions.models import Agent, User
first = operations.first_start()
Agent.objects.update(route=["scripted"], isolation_floor="none")
print(first.token, keys.make_sign_in_link(User.objects.get()), keys.make_sign_in_link(User.objects.get()))
"""
DAPHNE = """
from config.asgi import application
from daphne.server import Server
Server(application, ["tcp:port={port}:interface=127.0.0.1"], ready_callable=lambda: print("running on it", flush=True)).run()
"""
RUN = "/api/v1/executions"


@dataclass
class Pair:
    uvicorn: str
    daphne: str
    token: str
    links: list[str]

    def http(self, url: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with servers.postgresql() as database, servers.redis() as redis, servers.folder() as data:
        names = environment(
            data,
            8000,
            None,
            DATABASE_URL=database,
            REDIS_URL=redis,
            SANDGATE_SCRIPTED="1",
            DJANGO_SETTINGS_MODULE="config.settings",
            SANDGATE_LOG_LEVEL="WARNING",
        )
        command = [sys.executable, "-W", "ignore", "-c", PREPARE]
        done = subprocess.run(command, cwd=HOME, env=names, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        token, *links = done.stdout.split()
        one = servers.free_port()
        uvicorn = [sys.executable, "-m", "uvicorn", "config.asgi:application", "--port", str(one)]
        with servers.running(uvicorn, ready="running on", cwd=HOME, env=names):
            two = servers.free_port()
            daphne = [sys.executable, "-c", DAPHNE.format(port=two)]
            worker = [sys.executable, "-u", "manage.py", "worker"]
            with (
                servers.running(daphne, ready="running on", cwd=HOME, env=names),
                servers.running(worker, ready="Working", cwd=HOME, env=names),
            ):
                yield Pair(f"http://127.0.0.1:{one}", f"http://127.0.0.1:{two}", token, links)


@pytest.mark.parametrize(("runs", "shows"), [("uvicorn", "daphne"), ("daphne", "uvicorn")])
async def test_what_one_process_runs_the_other_streams_as_it_happens(pair, runs, shows):
    async with pair.http(getattr(pair, runs)) as one, pair.http(getattr(pair, shows)) as other:
        body = {"code": "#> first\n#~ 6\n#> last\n#= 7"}
        started = (await one.post(RUN, json=body, headers={"Prefer": "respond-async"})).json()
        assert started["state"] in ("starting", "running")
        lines, came = [], {}
        async with other.stream("GET", f"{RUN}/{started['id']}/events") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("event: "):
                    lines.append(line.removeprefix("event: "))
                    came[len(lines)] = time.monotonic()

    assert lines == ["stdout", "stdout", "result", "end"]
    assert came[2] - came[1] > 1  # the first line was there while the code was still running


async def test_a_cancel_sent_to_the_other_process_stops_the_run(pair):
    async with pair.http(pair.uvicorn) as one, pair.http(pair.daphne) as other:
        waiting = asyncio.create_task(one.post(RUN, json={"code": "#~ 60", "timeout_seconds": 120}))
        async with asyncio.timeout(10):
            while not (found := (await other.get(RUN, params={"state": "running"})).json()["results"]):
                await asyncio.sleep(0.05)
        await other.post(f"{RUN}/{found[0]['id']}/cancel", json={"reason": "from the other side"})
        async with asyncio.timeout(10):
            ended = (await waiting).json()

    assert (ended["state"], ended["detail"]) == ("cancelled", "from the other side")


async def test_a_repeated_request_finds_the_run_of_the_other_process_and_waits_for_it(pair):
    async with pair.http(pair.uvicorn) as one, pair.http(pair.daphne) as other:
        send = {"json": {"code": "#~ 1\n#= 5"}, "headers": {"Idempotency-Key": "one order"}}
        first = asyncio.create_task(one.post(RUN, **send))
        second = asyncio.create_task(other.post(RUN, **send))
        answers = [(await first).json(), (await second).json()]

    assert answers[0]["id"] == answers[1]["id"]
    assert [a["results"] for a in answers] == [[{"text/plain": "5"}]] * 2


@pytest.mark.parametrize("server", ["uvicorn", "daphne"])
async def test_the_consoles_socket_runs_code_behind_either_server(pair, server):
    url = getattr(pair, server)
    async with pair.http(url) as http:
        session = (await http.post("/api/v1/sessions", json={})).json()["id"]
    async with httpx.AsyncClient(base_url=url, trust_env=False, follow_redirects=True) as person:
        page = await person.get(pair.links.pop())
        assert "sessionid" in person.cookies, page.text[:300]
        cookie = "; ".join(f"{k}={v}" for k, v in person.cookies.items())
    where = url.replace("http", "ws") + f"/ws/sessions/{session}"
    heard = []
    async with asyncio.timeout(15), connect(where, origin=url, additional_headers={"Cookie": cookie}, proxy=None) as ws:
        await ws.send(json.dumps({"type": "subscribe", "after_seq": 0}))
        await ws.send(json.dumps({"type": "execute_request", "client_id": f"on {server}", "code": "#> hi\n#= 1"}))
        async for raw in ws:
            heard.append(json.loads(raw))
            if heard[-1]["type"] == "state" and heard[-1]["state"] == "succeeded":
                break

    assert [h["text"] for h in heard if h["type"] == "stdout"] == ["hi\n"]


async def test_daphne_names_what_to_start_for_e2bs_data_plane(pair):
    async with pair.http(pair.daphne) as http:
        headers = {"E2b-Sandbox-Id": "x", "E2b-Sandbox-Port": "49999"}
        answer = await http.post("/e2b/execute", json={"code": "1"}, headers=headers)

    assert answer.status_code == 501
    assert "manage.py serve" in answer.text


def test_two_that_start_at_once_on_an_empty_database_both_serve_and_one_makes_the_first_key():
    with servers.postgresql() as database, servers.folder() as data:
        started = []
        for name in ("one", "two"):
            env = environment(data / name, servers.free_port(), None, DATABASE_URL=database)
            command = [sys.executable, "manage.py", "serve", "--no-node"]
            out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, cwd=HOME, env=env, preexec_fn=servers.die_with_parent, **out))
        screens: list[list[str]] = [[], []]
        try:
            came = [servers.came(p, "Ctrl-C ends it", 60, s) for p, s in zip(started, screens, strict=True)]
            assert came == [True, True], screens
            keys = [line for screen in screens for line in screen if "SANDGATE_API_KEY=" in line]
            assert len(keys) == 1, screens
        finally:
            for process in started:
                servers.end(process)

"""Two server processes, uvicorn and daphne, on one PostgreSQL and one Redis: what one runs, the other shows and stops.

And does so when Redis is gone, or hangs: it is a doorbell.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect

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
print(first.token, *(keys.make_sign_in_link(User.objects.get()) for _ in range(8)))
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
    redis_home: Path
    redis: subprocess.Popen[str]
    stack: ExitStack  # of what is started later

    def http(self, url: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with (
        servers.postgresql() as database,
        servers.folder() as home,
        servers.redis_in(home) as redis,
        servers.folder() as data,
        ExitStack() as stack,
    ):
        names = environment(
            data,
            8000,
            None,
            DATABASE_URL=database,
            REDIS_URL=f"unix://{home}/redis.sock",
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
                yield Pair(f"http://127.0.0.1:{one}", f"http://127.0.0.1:{two}", token, links, home, redis, stack)


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
    heard = []
    async with asyncio.timeout(15), socket_to(pair, url, f"/ws/sessions/{session}") as ws:
        await ws.send(json.dumps({"type": "subscribe", "after_seq": 0}))
        await ws.send(json.dumps({"type": "execute_request", "client_id": f"on {server}", "code": "#> hi\n#= 1"}))
        async for raw in ws:
            heard.append(json.loads(raw))
            if heard[-1]["type"] == "state" and heard[-1]["state"] == "succeeded":
                break

    assert [h["text"] for h in heard if h["type"] == "stdout"] == ["hi\n"]


@asynccontextmanager
async def socket_to(pair: Pair, url: str, path: str) -> AsyncIterator[ClientConnection]:
    """A socket of the console, of somebody who has signed in."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, follow_redirects=True) as person:
        page = await person.get(pair.links.pop())
        assert "sessionid" in person.cookies, page.text[:300]
        cookie = "; ".join(f"{k}={v}" for k, v in person.cookies.items())
    where = url.replace("http", "ws") + path
    async with connect(where, origin=url, additional_headers={"Cookie": cookie}, proxy=None) as ws:
        yield ws


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


@pytest.mark.parametrize("how", [pytest.param("hangs", marks=pytest.mark.long), "is killed"])  # which is started anew
async def test_when_redis_is_gone_all_that_waits_goes_on_and_hears_it_again_when_it_is_back(pair, how):
    async with asyncio.timeout(60), pair.http(pair.uvicorn) as one, pair.http(pair.daphne) as other:
        body = {"code": "#> first\n#~ 3\n#> last\n#= 7"}
        key = {"Idempotency-Key": f"when redis {how}"}
        waits = asyncio.create_task(one.post(RUN, json=body, headers=key))
        while not (found := (await one.get(RUN, params={"state": "running"})).json()["results"]):
            await asyncio.sleep(0.02)
        run = f"{RUN}/{found[0]['id']}"
        elsewhere = asyncio.create_task(other.post(RUN, json=body, headers=key))
        begun = [asyncio.Event(), asyncio.Event()]
        streams = asyncio.create_task(streamed(other, run, begun[0]))
        socket = asyncio.create_task(followed(pair, pair.daphne, found[0]["id"], begun[1]))
        for event in begun:
            await event.wait()

        pair.redis.send_signal(signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
        ends = (await waits).json()
        told = [(await elsewhere).json()["state"], await streams, await socket]
        left = (await one.post(RUN, json={"code": "#= 8"}, headers={"Prefer": "respond-async"})).json()
        fresh = await followed(pair, pair.daphne, left["id"], asyncio.Event())
        long = asyncio.create_task(one.post(RUN, json={"code": "#~ 60", "timeout_seconds": 120}))
        while not (found := (await other.get(RUN, params={"state": "running"})).json()["results"]):
            await asyncio.sleep(0.02)
        await other.post(f"{RUN}/{found[0]['id']}/cancel", json={"reason": "no bell"})
        stopped = (await long).json()

        if how == "hangs":
            pair.redis.send_signal(signal.SIGCONT)
        else:
            pair.redis = pair.stack.enter_context(servers.redis_in(pair.redis_home))
        watched = asyncio.create_task(streamed(other, run.replace(ends["id"], left["id"]), asyncio.Event()))
        body = {"code": "#> again\n#~ 60", "timeout_seconds": 120}
        again = asyncio.create_task(one.post(RUN, json=body))
        while not (found := (await one.get(RUN, params={"state": "running"})).json()["results"]):
            await asyncio.sleep(0.02)
        bell = asyncio.create_task(followed(pair, pair.daphne, found[0]["id"], asyncio.Event()))
        while f"execution.{found[0]['id']}" not in await listened(pair):
            await asyncio.sleep(0.05)
        await other.post(f"{RUN}/{found[0]['id']}/cancel", json={"reason": "enough"})
        last = [(await again).json()["state"], await bell, await watched]

    assert (ends["state"], ends["logs"]["stdout"], ends["results"]) == (
        "succeeded",
        "first\nlast\n",
        [{"text/plain": "7"}],
    )
    assert told == ["succeeded", ["stdout", "stdout", "result", "end"], "succeeded"]
    assert (fresh, stopped["state"], stopped["detail"]) == ("succeeded", "cancelled", "no bell")
    assert last == ["cancelled", "cancelled", ["result", "end"]]


async def streamed(http: httpx.AsyncClient, run: str, begun: asyncio.Event) -> list[str]:
    """The names of all events of a run; `begun` once there is one."""
    names = []
    async with http.stream("GET", f"{run}/events") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
                begun.set()
    return names


async def followed(pair: Pair, url: str, execution_id: str, begun: asyncio.Event) -> str:
    """The state in which a socket of the console says that it has ended; `begun` once it has said anything of it."""
    async with socket_to(pair, url, f"/ws/executions/{execution_id}") as ws:
        await ws.send(json.dumps({"type": "subscribe", "after_seq": 0}))
        async for raw in ws:
            said = json.loads(raw)
            if said["type"] == "stdout":
                begun.set()
            if said["type"] == "state" and said["state"] not in ("queued", "starting", "running"):
                return said["state"]
    raise AssertionError("the socket closed before the run had ended")


async def listened(pair: Pair) -> str:
    """What somebody listens to at Redis."""
    async with Redis(unix_socket_path=f"{pair.redis_home}/redis.sock") as redis:
        return b" ".join(await redis.pubsub_channels()).decode()

"""The database is away for ten seconds, or the disk is full: nothing that ran is lost, and all goes on by itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests import servers
from tests.product import HOME, environment

pytestmark = pytest.mark.long
PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import operations
from executions.models import Agent, Quota
first = operations.first_start()
Agent.objects.update(route=["scripted"], isolation_floor="none")
Quota.objects.all().delete()
print(first.token)
"""
RUN = "/api/v1/executions"
AWAY_SECONDS = 10
SERVE = [sys.executable, "manage.py", "serve"]


def client(port: int, token: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False)


async def running(http: httpx.AsyncClient, count: int) -> list[str]:
    """Their ids, once so many run."""
    while len(found := (await http.get(RUN, params={"state": "running"})).json()["results"]) < count:
        await asyncio.sleep(0.05)
    return [one["id"] for one in found]


async def streamed(http: httpx.AsyncClient, execution_id: str) -> list[str]:
    async with http.stream("GET", f"{RUN}/{execution_id}/events") as stream:
        lines = [line async for line in stream.aiter_lines()]
    return [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]


def prepared(env: dict[str, str]) -> str:
    """The first key."""
    command = [sys.executable, "-W", "ignore", "-c", PREPARE]
    return subprocess.run(command, cwd=HOME, env=env, capture_output=True, text=True, check=True).stdout.strip()


def verified(env: dict[str, str], *within: str) -> None:
    command = [*within, sys.executable, "-W", "ignore", "manage.py", "verify"]
    told = subprocess.run(command, cwd=HOME, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


async def test_ten_seconds_without_the_database_lose_no_run_and_run_nothing_twice():
    with servers.folder() as home, servers.folder() as data, ExitStack() as stack:
        servers.cluster(home)
        database = stack.enter_context(servers.postgresql_in(home, remembers=True))
        port = servers.free_port()
        more = {"SANDGATE_SCRIPTED": "1", "DJANGO_SETTINGS_MODULE": "config.settings", "SANDGATE_LOG_LEVEL": "WARNING"}
        env = environment(data, port, None, DATABASE_URL=f"postgresql://sandgate@/{home}/postgres", **more)
        token = await asyncio.to_thread(prepared, env)
        serve = servers.running([*SERVE, "--no-node"], ready="Ctrl-C ends it", cwd=HOME, env=env)
        stack.enter_context(serve)

        async with client(port, token) as http, asyncio.timeout(150):
            lengths = (1, 4, 7, 14)  # some end before, some while it is away, one afterwards
            codes = [f"#> first {n}\n#~ {n}\n#> middle {n}\n#~ 1\n#> last {n}\n#= {n}" for n in lengths]
            asks = [
                {"json": {"code": code}, "headers": {"Idempotency-Key": f"number {n}"}} for n, code in enumerate(codes)
            ]
            waiting = [asyncio.create_task(http.post(RUN, **one)) for one in asks]
            ids = await running(http, len(codes))
            streams = [asyncio.create_task(streamed(http, one)) for one in ids]
            again = [asyncio.create_task(http.post(RUN, **one)) for one in asks]
            looks = [asyncio.create_task(http.get(f"{RUN}/{one}")) for one in ids]
            await asyncio.wait(looks)

            await asyncio.to_thread(lambda: (database.kill(), database.wait()))
            once = {"Idempotency-Key": "sent while it was away"}
            meanwhile = asyncio.create_task(http.post(RUN, json={"code": "#= 1"}, headers=once))
            await asyncio.sleep(AWAY_SECONDS)
            stack.enter_context(servers.postgresql_in(home, remembers=True))

            ends = [(await task).json() for task in waiting]
            told = [await task for task in streams]
            replayed = [(await task).json() for task in again]
            answers = [await meanwhile]
            while answers[-1].status_code != 201:
                await asyncio.sleep(1)
                answers.append(await http.post(RUN, json={"code": "#= 1"}, headers=once))
            counts = (await http.get(RUN)).json()["results"]

        assert [(end["state"], end["logs"]["stdout"]) for end in ends] == [
            ("succeeded", f"first {n}\nmiddle {n}\nlast {n}\n") for n in lengths
        ]
        assert [len(end["attempts"]) for end in ends] == [1] * len(codes)
        whole = ["stdout", "result", "end"]  # what was said while it was away is one event
        assert [list(dict.fromkeys(names)) for names in told] == [whole] * len(codes)
        for one, end in zip(replayed, ends, strict=True):  # which may not have begun to wait before
            assert one.get("id") == end["id"] or one["code"] == "database_away"
        refused = {(answer.status_code, answer.json()["code"]) for answer in answers[:-1]}
        assert refused <= {(503, "database_away")}
        assert len(counts) == len(codes) + 1
        verified(env)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a small disk needs root")
async def test_a_full_disk_refuses_with_one_code_and_loses_nothing_and_all_goes_on_when_there_is_room(template_python):
    with servers.folder() as data:
        port = servers.free_port()
        small = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=400m tmpfs {data} && exec "$@"', "-"]
        scratch = {"TMPDIR": str(data), "PYTHONUNBUFFERED": "1"}
        env = environment(data, port, template_python, **scratch)
        said: list[str] = []
        served = servers.running([*small, *SERVE], ready="Ctrl-C ends it", cwd=HOME, env=env, said=said)
        with served as process:
            disk = Path(f"/proc/{process.pid}/root{data}")  # as the product sees it
            token = next(line.rpartition("=")[2] for line in said if "SANDGATE_API_KEY=" in line).strip()
            async with client(port, token) as http, asyncio.timeout(200):
                local = await http.post(RUN, json={"code": "print(6 * 7)", "route": ["local"]})
                slowly = "import time\nprint('first')\nfor n in range(100): time.sleep(0.1); print('much', flush=True)"
                goes_on = {"code": slowly, "route": ["local"]}
                long = asyncio.create_task(http.post(RUN, json=goes_on))
                keeps = {
                    "code": "open('a.bin', 'wb').write(bytes(1 << 20))",
                    "keep_files": ["*.bin"],
                    "route": ["local"],
                }
                assert (await http.post(RUN, json=keeps)).json()["state"] == "succeeded"
                await running(http, 1)

                ballast = disk / "ballast"
                await asyncio.to_thread(fill, ballast, leave=64 << 20)
                kept = (await http.post(RUN, json=keeps)).json()
                await asyncio.to_thread(fill, ballast, leave=0)
                answers = []
                while not answers or answers[-1].status_code == 201:
                    body = {"name": f"agent-{len(answers)}", "description": "x" * 300}
                    answers.append(await http.post("/api/v1/agents", json=body))
                full = [answers[-1], await http.post("/api/v1/sessions", json={"metadata": {"a": "x" * 4000}})]
                reads = await http.get(f"{RUN}/{local.json()['id']}")

                ballast.unlink()
                end = (await long).json()
                after = [await http.post(RUN, json={"code": "print(1)", "route": ["local"]}) for _ in range(2)]
                again = (await http.post(RUN, json=keeps)).json()
            verified(env, "nsenter", f"--mount=/proc/{process.pid}/ns/mnt", f"--wd={HOME}")

    assert local.json()["logs"]["stdout"] == "42\n"
    assert (kept["state"], "the disk of this installation is full" in kept["kept"]) == ("succeeded", True), kept
    assert all("json" in answer.headers["Content-Type"] for answer in full), "".join(said[-60:])
    problems = [answer.json() for answer in full if answer.status_code != 201]
    assert {(problem["status"], problem["code"]) for problem in problems} == {(507, "storage_full")}, problems
    assert "no room left" in problems[0]["detail"]
    assert reads.json()["state"] == "succeeded"
    assert (end["state"], end["logs"]["stdout"]) == ("succeeded", "first\n" + "much\n" * 100)
    assert [answer.json()["state"] for answer in after] == ["succeeded"] * 2
    assert again["kept"].startswith("1 file kept")


def fill(path: Path, *, leave: int) -> None:
    """Take all the room but so much."""
    found = os.statvfs(path.parent)
    with path.open("ab") as file:
        left = found.f_bavail * found.f_frsize - leave
        while left > 0:
            try:
                left -= file.write(b"\0" * min(left, 1 << 20))
                file.flush()
            except OSError:
                return

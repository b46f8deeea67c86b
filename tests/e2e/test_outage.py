"""E2B goes down under a steady load, and comes back: two servers, one database, E2B's double over a socket."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests import servers
from tests.double import Double, running_double
from tests.product import HOME, environment

RATE = int(os.environ.get("SANDGATE_TEST_OUTAGE_RATE", "20"))  # the published figures are of 50
HEALTHY_SECONDS, OUTAGE_SECONDS, AFTER_SECONDS = 3, 6, 12
PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import operations
from executions.models import Agent, Quota
first = operations.first_start()
Agent.objects.update(route=["e2b", "scripted"], isolation_floor="none")
Quota.objects.all().delete()
print(first.token)
"""
LOOK = """
import django, json; django.setup()
from django.db.models import Count
from executions.models import Attempt, BackendState, Execution, Sandbox
row = BackendState.objects.get(alias="e2b")
attempts = Attempt.objects.values("execution", "backend", "outcome", "started_at", "reason", "execution__running_at")
print(json.dumps({
    "state": row.state, "opened_at": row.opened_at.timestamp(), "closed_at": row.closed_at and row.closed_at.timestamp(),
    "open": list(Sandbox.objects.open().values_list("pk", "state")),
    "unfinished": Execution.objects.open().count(),
    "attempts": [{**a, "started_at": a["started_at"].timestamp()} for a in attempts],
}, default=str))
"""


@dataclass
class Installation:
    urls: list[str]
    token: str
    env: dict[str, str]

    def look(self) -> dict[str, Any]:
        """What its database says, read by a process of its own."""
        command = [sys.executable, "-W", "ignore", "-c", LOOK]
        done = subprocess.run(command, cwd=HOME, env=self.env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)


@dataclass
class Load:
    """Runs at a steady rate, one server after the other, however long the answers take."""

    at: Installation
    answers: list[tuple[float, float, int, dict[str, Any]]] = field(default_factory=list)  # sent, took, status, body

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        sent, began = time.time(), time.monotonic()
        url = self.at.urls[number % len(self.at.urls)]
        answer = await client.post(f"{url}/api/v1/executions", json={"code": f"#= {number}", "timeout_seconds": 20})
        self.answers.append((sent, time.monotonic() - began, answer.status_code, answer.json()))

    async def run(self, seconds: dict[str, float], turn: dict[str, Any]) -> dict[str, float]:
        """`turn` is done when its name's time has come; returns when each was."""
        moments: dict[str, float] = {}
        began, number = time.monotonic(), 0
        headers = {"Authorization": f"Bearer {self.at.token}"}
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(headers=headers, timeout=90, trust_env=False, limits=limits) as client:
            async with asyncio.TaskGroup() as tasks:
                while (now := time.monotonic() - began) < sum(seconds.values()):
                    due = 0.0
                    for name, length in seconds.items():
                        if now >= due and name not in moments:
                            await asyncio.to_thread(turn[name])
                            moments[name] = time.time()
                        due += length
                    tasks.create_task(self.one(client, number))
                    number += 1
                    await asyncio.sleep(max(0, began + number / RATE - time.monotonic()))
        return moments


@pytest.fixture(scope="module")
def cloud() -> Iterator[Double]:
    with running_double() as started:
        yield started


@pytest.fixture
def installation(cloud: Double) -> Iterator[Installation]:
    with ExitStack() as stack:
        database = stack.enter_context(servers.postgresql())
        data = stack.enter_context(servers.folder())
        ports = [servers.free_port() for _ in range(2)]
        more = {"DATABASE_URL": database, "SANDGATE_SCRIPTED": "1", "DJANGO_SETTINGS_MODULE": "config.settings"}
        env = environment(data, ports[0], None, **more, **cloud.settings(), SANDGATE_LOG_LEVEL="WARNING")
        prepared = [sys.executable, "-W", "ignore", "-c", PREPARE]
        token = subprocess.run(prepared, cwd=HOME, env=env, capture_output=True, text=True, check=True).stdout.strip()
        for port in ports:
            serve = [sys.executable, "manage.py", "serve", "--no-node"]
            of_its_own = env | {"PORT": str(port), "PYTHONUNBUFFERED": "1"}
            stack.enter_context(servers.running(serve, ready="Ctrl-C ends it", cwd=HOME, env=of_its_own))
        yield Installation([f"http://127.0.0.1:{port}" for port in ports], token, env)


@pytest.mark.parametrize("down", ["503", *(pytest.param(how, marks=pytest.mark.long) for how in ("reset", "swallow"))])
async def test_an_outage_loses_nothing_that_could_be_served_runs_nothing_twice_and_leaks_nothing(
    cloud, installation, record_property, down
):
    cloud.forget()
    cloud.tell(create_ms=[491, 740])
    load = Load(installation)

    moments = await load.run(
        {"healthy": HEALTHY_SECONDS, "outage": OUTAGE_SECONDS, "recovery": AFTER_SECONDS},
        {
            "healthy": lambda: None,
            "outage": lambda: cloud.tell(down=down),
            "recovery": lambda: cloud.tell(down=""),
        },
    )
    async with asyncio.timeout(45):  # what was made and never heard of is listed every thirty seconds
        while (found := await asyncio.to_thread(installation.look))["open"] or cloud.live():
            await asyncio.sleep(0.5)

    lost = [body for _, _, status, body in load.answers if (status, body["state"]) != (201, "succeeded")]
    runs = Counter(a["execution"] for a in found["attempts"] if a["outcome"] in ("ran", "lost"))
    back = min(
        a["started_at"]
        for a in found["attempts"]
        if (a["backend"], a["outcome"]) == ("e2b", "ran") and a["started_at"] > moments["recovery"]
    )
    after = [body["backend"] for sent, _, _, body in load.answers if sent > back + 1]
    during = sorted(took for sent, took, *_ in load.answers if moments["outage"] < sent < moments["recovery"])
    figures = {
        "down": down,
        "runs": len(load.answers),
        "lost": len(lost),
        "open_after": round(found["opened_at"] - moments["outage"], 2),
        "back_after": round(back - moments["recovery"], 2),
        "p50_during": round(during[len(during) // 2], 3),
        "max_during": round(during[-1], 3),
    }
    record_property("figures", json.dumps(figures))

    assert found["state"] == "closed"
    assert found["unfinished"] == 0
    assert figures["open_after"] <= 2
    assert figures["back_after"] <= 10
    assert max(runs.values()) == 1
    ends = {(body["state"], body["attempts"][-1]["outcome"]) for body in lost}
    assert ends <= {("errored", "lost"), ("timed_out", "ran")}
    began = [body["running_at"] for body in lost]  # only what was in E2B's hands when it went down
    outage = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moments["outage"] + 3))  # a slow machine is late to say so
    assert all(running_at < outage for running_at in began)
    assert Counter(after).most_common(1)[0][0] == "e2b"
    assert {body["results"][0]["text/plain"] for *_, body in load.answers if body["state"] == "succeeded"} <= {
        str(n) for n in range(len(load.answers))
    }


async def test_a_drill_on_the_running_system_reports_what_moved_and_that_all_is_well(cloud, installation):
    cloud.forget()
    load, drills = Load(installation), []
    command = [sys.executable, "-W", "ignore", "manage.py", "outage_drill", "--seconds", "4", "--json"]

    def drill() -> None:
        options = {"cwd": HOME, "env": installation.env, "stdout": subprocess.PIPE, "text": True}
        drills.append(subprocess.Popen(command, preexec_fn=servers.die_with_parent, **options))

    await load.run({"healthy": 3, "drill": 16}, {"healthy": lambda: None, "drill": drill})
    told, _ = await asyncio.to_thread(drills[0].communicate, timeout=60)
    report = json.loads(told)

    assert drills[0].returncode == 0
    assert report["passed"]
    assert report["opened_after_seconds"] <= 2
    assert report["recovered_after_seconds"] <= 10
    assert report["served_again_after_seconds"] <= 10
    assert set(report["moved"]) == {"scripted"}
    assert (report["refused"], report["not_served"], report["ran_twice"]) == ({}, [], [])
    assert {(status, body["state"]) for _, _, status, body in load.answers} == {(201, "succeeded")}

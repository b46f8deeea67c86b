"""Several machines on one PostgreSQL and one Redis: what one admits another runs, once, and a session stays where it is."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.fleet import Fleet, running_fleet

RUN = "/api/v1/executions"
LATER = {"Prefer": "respond-async"}
ENDED = ("succeeded", "failed", "timed_out", "cancelled", "errored")
LOOK = """
import django; django.setup()
import json
from collections import Counter
from executions.models import Execution, Sandbox
from django.db.models import Count
print(json.dumps({
    "attempts": dict(Counter(Execution.objects.annotate(n=Count("attempts")).values_list("n", flat=True))),
    "sandboxes": dict(Counter(Sandbox.objects.values_list("state", flat=True))),
    "nodes": sorted(set(Sandbox.objects.exclude(node="").values_list("node", flat=True))),
}))
"""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet() as found:
        yield found


@pytest.fixture(scope="module")
def machines(fleet, template_python) -> list[str]:
    """Two machines with all that one has: where their webs are."""
    return [fleet.whole(machine, template_python) for machine in ("a", "b")]


def ended(http: httpx.Client, execution_id: str) -> dict:
    deadline = time.monotonic() + 60
    while (found := http.get(f"{RUN}/{execution_id}").json())["state"] not in ENDED:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)  # seen through the API alone
    return found


def test_what_a_killed_web_process_had_taken_is_run_by_workers_once_and_shared(fleet):
    url, web = fleet.web("a")
    other = fleet.urls["b"] = fleet.web("b")[0]
    body = {"code": "#~ 0.05\n#= 1", "route": ["scripted"]}
    with fleet.http(url) as http:
        answers = [http.post(RUN, json=body, headers=LATER).json() for _ in range(60)]
    assert {answer["state"] for answer in answers} == {"starting"}
    web.send_signal(signal.SIGKILL)
    web.wait()

    for machine in ("a", "b"):
        fleet.worker(machine)
    with fleet.http(other) as http:
        done = [ended(http, answer["id"]) for answer in answers]

    assert {found["state"] for found in done} == {"succeeded"}
    told = json.loads(fleet.ask(LOOK))
    assert told["attempts"] == {"1": 60}
    assert set(told["sandboxes"]) == {"gone"}


def test_a_worker_takes_what_a_web_process_leaves_as_soon_as_it_is_rung_for(fleet):
    """The workers of the test before are there."""
    with fleet.http(fleet.urls["b"]) as http:
        taken = []
        for _ in range(5):
            answer = http.post(RUN, json={"code": "#= 1", "route": ["scripted"]}, headers=LATER).json()
            taken.append(ended(http, answer["id"])["usage"]["queue_seconds"])

    assert min(taken) < 1  # the best of five: a machine may be slow, a rung bell is not waited for


@pytest.mark.long  # two nodes
async def test_a_local_session_is_used_from_another_machine_and_stays_on_its_own(fleet, machines):
    here, there = machines
    async with fleet.many(here) as a, fleet.many(there) as b:
        opened = await a.post("/api/v1/sessions", json={"route": ["local"], "timeout_seconds": 300})
        assert opened.status_code == 201, opened.text
        session = opened.json()["id"]
        await a.post(RUN, json={"code": "x = 20", "session_id": session})
        from_b = (await b.post(RUN, json={"code": "x + 1", "session_id": session})).json()
        files = {"params": {"path": "f.txt"}, "content": b"1"}
        put_a, put_b = [await http.put(f"/api/v1/sessions/{session}/files", **files) for http in (a, b)]

        endless = asyncio.create_task(b.post(RUN, json={"code": "while True: pass", "session_id": session}))
        async with asyncio.timeout(30):
            while not (found := (await b.get(RUN, params={"state": "running"})).json()["results"]):
                await asyncio.sleep(0.05)
        await b.post(f"{RUN}/{found[0]['id']}/cancel", json={"reason": "from b"})
        stopped = (await endless).json()
        still = (await b.post(RUN, json={"code": "x + 2", "session_id": session})).json()
        alone = (await b.post(RUN, json={"code": "40 + 2", "route": ["local"]})).json()
        ending = await b.delete(f"/api/v1/sessions/{session}")
        async with asyncio.timeout(30):
            while (await b.get(f"/api/v1/sessions/{session}")).json()["state"] != "gone":
                await asyncio.sleep(0.1)

    assert [r["text/plain"] for r in (*from_b["results"], *still["results"], *alone["results"])] == ["21", "22", "42"]
    assert (put_a.status_code, put_b.status_code) == (201, 421)
    assert put_b.json()["code"] == "session_elsewhere"
    assert "lives on machine a, and this is b" in put_b.json()["detail"]
    assert (stopped["state"], stopped["detail"]) == ("cancelled", "from b")
    assert ending.status_code in (200, 202, 204)
    assert json.loads(fleet.ask(LOOK))["nodes"] == ["a", "b"]

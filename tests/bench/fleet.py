"""What the pieces of a scaled-out installation hold, and where they are full.

    python -m tests.bench.fleet

One PostgreSQL, one Redis, web processes and workers on this machine; the machines behind them are simulated, so that what
is measured is the plane alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from subprocess import Popen

import httpx

from tests.bench.__main__ import posted
from tests.bench.load import drive, request
from tests.bench.table import row, timed
from tests.fleet import Fleet, running_fleet

SECONDS = float(os.environ.get("BENCH_SECONDS", "8"))
BURST_SECONDS, JOB_SECONDS = 8, 10.0
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
HEAD = "| what | p50 ms | p95 ms | rate or size |\n|---|---|---|---|"
CONNECTIONS = """
import django; django.setup()
from django.db import connection
with connection.cursor() as cursor:
    cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    print(cursor.fetchone()[0])
"""
IN_FLIGHT = """
import django; django.setup()
import json
from executions.models import Execution
left = Execution.objects.open()
print(json.dumps(left.exists() and {"running": left.filter(state="running").count()}))
"""
WAITED = """
import django; django.setup()
import json
from executions.models import Execution
burst = Execution.objects.filter(timeout_seconds=601).order_by("-created_at")[:100]
print(json.dumps([(one.started_at - one.created_at).total_seconds() for one in burst]))
"""


def main() -> None:
    print(HEAD)
    with running_fleet() as fleet:
        url, web = fleet.web("a")
        with fleet.http(url) as http:
            ran(http, 0)
            row("a web process, having served a little", figure=f"{mib(web):.0f} MiB, {connections(fleet)} connections")
            held = connections(fleet)
            worker = fleet.worker("a")
            idle_latency(http)
            row(
                "a worker, having run a little",
                figure=f"{mib(worker):.0f} MiB, {connections(fleet) - held} connections",
            )
            many(http, fleet, [worker])
            second = fleet.worker("b")
            many(http, fleet, [worker, second])
        saturation(fleet, [url])
        saturation(fleet, [url, fleet.web("b")[0]])


def mib(process: Popen[str]) -> float:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def connections(fleet: Fleet) -> int:
    return int(fleet.ask(CONNECTIONS))


def ran(http: httpx.Client, seconds: float) -> dict:
    return http.post("/api/v1/executions", json={"code": f"#~ {seconds}\n#= 1", "route": ["scripted"]}).json()


def left(http: httpx.Client, seconds: float) -> str:
    body = {"code": f"#~ {seconds}\n#= 1", "route": ["scripted"], "timeout_seconds": 600}
    answer = http.post("/api/v1/executions", json=body, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def ended(http: httpx.Client, execution_id: str) -> dict:
    while (found := http.get(f"/api/v1/executions/{execution_id}").json())["ended_at"] is None:
        time.sleep(0.02)
    assert found["state"] == "succeeded", found
    return found


def idle_latency(http: httpx.Client) -> None:
    """From the admission to the claim, when there is nothing else to do."""
    waits = sorted(ended(http, left(http, 0))["usage"]["queue_seconds"] for _ in range(50))
    told = timed(waits)
    row("left to a worker: until it has it", f"{told.p50_ms:.1f}", f"{told.p95_ms:.1f}")


def many(http: httpx.Client, fleet: Fleet, workers: list[Popen[str]]) -> None:
    """A burst that is left to workers: how far they are behind, and what those in flight hold."""
    port = int(str(http.base_url).rstrip("/").rsplit(":", 1)[1])
    before = sum(map(mib, workers))
    body = json.dumps({"code": f"#~ {JOB_SECONDS}\n#= 1", "route": ["scripted"], "timeout_seconds": 601}).encode()
    raw = request("POST", "/api/v1/executions", key=fleet.token, body=body)
    raw = raw.replace(b"\r\n\r\n", b"\r\nPrefer: respond-async\r\n\r\n", 1)
    taken = asyncio.run(drive(port, raw, clients=16, seconds=BURST_SECONDS, good=(202,)))
    assert not taken.failed, taken
    most, at_once = before, 0
    while left_over := json.loads(fleet.ask(IN_FLIGHT)):
        most, at_once = max(most, sum(map(mib, workers))), max(at_once, left_over["running"])
    waited = timed(json.loads(fleet.ask(WAITED)))
    name = f"runs of {JOB_SECONDS:g} s left to {len(workers)} worker{'s' * (len(workers) > 1)}"
    row(f"{name}: taken in", f"{taken.p50_ms:.0f}", f"{taken.p95_ms:.0f}", f"{taken.rate:.0f}/s")
    row(f"{name}: until one has it", f"{waited.p50_ms:.0f}", f"{waited.p95_ms:.0f}")
    added = (most - before) * 1024 / max(1, at_once)
    row(f"{name}: memory of the workers for each, {at_once} at once", figure=f"{added:.0f} KiB")


def saturation(fleet: Fleet, urls: list[str]) -> None:
    """Governed executions a second as callers grow."""
    ports = [int(url.rsplit(":", 1)[1]) for url in urls]
    raw = posted(fleet.token, code="1 #= 1", route=["scripted"])
    for clients in CLIENTS:
        if clients < len(ports):
            continue

        async def all_of_them(share: int = clients // len(ports)) -> list:
            return await asyncio.gather(*(drive(port, raw, clients=share, seconds=SECONDS / 2) for port in ports))

        found = asyncio.run(all_of_them())
        assert not sum(figures.failed for figures in found), found
        rate = sum(figures.rate for figures in found)
        worst = max(found, key=lambda figures: figures.p95_ms)
        name = f"{clients} caller{'s' * (clients > 1)} at {len(ports)} web process{'es' * (len(ports) > 1)}"
        row(name, f"{worst.p50_ms:.0f}", f"{worst.p95_ms:.0f}", f"{rate:.0f}/s")


if __name__ == "__main__":
    main()

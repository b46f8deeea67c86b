"""What a warm pool is worth, measured on E2B's double: `python -m tests.bench.pool`.

Ten runs a second arrive by chance (a Poisson process) for a minute, once without a pool and once with one; beside them
the run itself, by E2B's SDK in a sandbox that lives. The double takes 491 ms (p50) and 740 ms (p99) to make a sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests import servers
from tests.bench.double import _open_wide
from tests.bench.load import Figures, one, percentile, request
from tests.bench.table import HEAD, at_least, at_most, row, show, timed
from tests.double import Double, running_double
from tests.product import HOME, environment, start

RATE = float(os.environ.get("BENCH_RATE", "10"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "60"))
TARGET = int(os.environ.get("BENCH_TARGET", "20"))
BOOT = [491, 740]
CODE = "#~ 0.02\n#= 1"
AIM_MS, AIM_HITS = 30, 0.99


def main() -> None:
    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    python = Path(named) if named else None
    print(HEAD)
    with running_double("--faults", json.dumps({"create_ms": BOOT})) as double, servers.folder() as data:
        database = os.environ.get("DATABASE_URL") or f"sqlite:///{data}/bench.sqlite3"
        name = database.split(":")[0].replace("sqlite", "SQLite").replace("postgresql", "PostgreSQL")
        settings = double.settings() | {"SANDGATE_LOG_LEVEL": "WARNING", "DATABASE_URL": database}
        product = start(data, servers.free_port(), python, **settings)
        try:
            _open_wide(data, database)
            port = int(product.url.rsplit(":", 1)[1])
            itself = asyncio.run(run_itself(double))
            show("the run itself (20 ms), by E2B's SDK in a living sandbox", itself)
            asyncio.run(arrivals(port, product.key, 2))  # the first ones load modules
            cold, _ = asyncio.run(arrivals(port, product.key, SECONDS))
            show(f"{name}: {RATE:g} runs a second without a pool: what the caller waits", cold)
            pool(data, settings, "--target", str(TARGET))
            wait_until_full(double)
            warm, hits = asyncio.run(arrivals(port, product.key, SECONDS))
            added = warm.p95_ms - itself.p95_ms
            show(f"{name}: the same with a pool of {TARGET}", warm)
            row("beyond the run itself", figure=f"p95 {added:.1f} ms", aim=at_most(AIM_MS, added))
            row("taken from the pool", figure=f"{hits:.2%}", aim=at_least(AIM_HITS * 100, hits * 100, "%"))
            told = product.http().get("/api/v1/backends").json()["results"][0]["pools"][0]
            row("the claim, within the admission", f"{told['claim_p50_ms']:.2f}", f"{told['claim_p95_ms']:.2f}")
        finally:
            servers.end(product.process)


async def run_itself(double: Double) -> Figures:
    from e2b_code_interpreter import AsyncSandbox

    sandbox = await AsyncSandbox.create(timeout=120, **double.options())
    taken = []
    for n in range(105):
        began = time.perf_counter()
        await sandbox.run_code(CODE)
        if n >= 5:
            taken.append(time.perf_counter() - began)
    await sandbox.kill()
    return timed(taken)


def pool(data: Path, settings: dict[str, str], *options: str) -> None:
    command = [sys.executable, "-W", "ignore", "manage.py", "pool", "e2b", *options]
    subprocess.run(command, cwd=HOME, env=environment(data, 1, None, **settings), check=True, stdout=subprocess.DEVNULL)


def wait_until_full(double: Double) -> None:
    deadline = time.monotonic() + 60
    while double.meter()["live"] < TARGET:
        if time.monotonic() > deadline:
            sys.exit(f"The pool was not full after a minute: {double.meter()['counts']}")
        time.sleep(0.2)


async def arrivals(port: int, key: str, seconds: float) -> tuple[Figures, float]:
    """Runs that arrive by chance, whatever became of those before; how long each took, and the share out of the pool."""
    chance = random.Random(1)
    raw = request("POST", "/api/v1/executions", key=key, body=json.dumps({"code": CODE, "route": ["e2b"]}).encode())
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    taken: list[float] = []
    failed = hits = 0

    async def arrive() -> None:
        nonlocal failed, hits
        began = time.perf_counter()
        while idle and idle[-1][0].at_eof():  # the server has closed what was idle for long
            idle.pop()[1].close()
        pair = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        status, body = await one(*pair, raw)
        taken.append(time.perf_counter() - began)
        idle.append(pair)
        if status != 201:
            failed += 1
            if failed == 1:
                print(status, body.decode()[:500], file=sys.stderr)
        hits += json.loads(body).get("from_pool", False)

    async with asyncio.TaskGroup() as group:
        began = at = time.perf_counter()
        while (at := at + chance.expovariate(RATE)) < began + seconds:
            await asyncio.sleep(at - time.perf_counter())
            group.create_task(arrive())
    for _, writer in idle:
        writer.close()
    spent = time.perf_counter() - began
    taken.sort()
    figures = Figures(len(taken) / spent, percentile(taken, 0.5) * 1000, percentile(taken, 0.95) * 1000, failed)
    return figures, hits / len(taken)


if __name__ == "__main__":
    main()

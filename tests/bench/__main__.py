"""`make bench`: what is measured side by side in one run, as a table in Markdown.

The server is pinned to the first core and the load to the second, where there are two; figures are comparable within one
run only, so the ratios are what counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tests import servers
from tests.bench.load import Figures, drive, one, percentile, request
from tests.node import RunningNode, running_node
from tests.product import HOME, environment

CELL = "import numpy as np, pandas as pd; pd.DataFrame({'a': np.arange(1000)}).a.sum()"
SMALL = "1 + 1"
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "200"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "8"))
table: list[tuple[str, str, str, str]] = []


def show(what: str, figures: Figures, beside: str = "") -> Figures:
    row = (what, f"{figures.p50_ms:.2f}", f"{figures.p95_ms:.2f}", beside or f"{figures.rate:.0f}/s")
    table.append(row)
    print("| " + " | ".join(row) + " |", flush=True)
    if figures.failed:
        sys.exit(f"{what}: {figures.failed} failed")
    return figures


def timed(taken: list[float]) -> Figures:
    taken.sort()
    return Figures(len(taken) / sum(taken), percentile(taken, 0.5) * 1000, percentile(taken, 0.95) * 1000, 0)


# The node


async def fresh_and_warm(node: RunningNode) -> None:
    from executions.backends.base import SandboxSpec

    backend = node.backend

    async def run(handle, code) -> None:
        kinds = [event.kind async for event in backend.run_code(handle, code, timeout_seconds=30)]
        assert kinds.count("result") == 1, kinds

    async def fresh() -> float:
        began = time.perf_counter()
        handle = await backend.create(SandboxSpec(f"bench{secrets.token_hex(8)}", "default", 60))
        await run(handle, CELL)
        took = time.perf_counter() - began
        await backend.kill(handle)
        return took

    await fresh()
    show("fresh sandbox to first result (numpy, pandas), at the node", timed([await fresh() for _ in range(ROUNDS)]))
    handle = await backend.create(SandboxSpec(f"bench{secrets.token_hex(8)}", "default", 120))
    taken = []
    for _ in range(ROUNDS + 10):
        began = time.perf_counter()
        await run(handle, SMALL)
        taken.append(time.perf_counter() - began)
    show("warm cell, at the node", timed(taken[10:]))
    await backend.kill(handle)


def bwrap_per_run(python: Path) -> None:
    """`bwrap … python -c` for each run, with the same interpreter and the same cell."""
    folder = HOME / "var" / "bench"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    marker = folder / "pyvenv.cfg"
    if not marker.exists():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    peers = [uv, "pip", "install", "-q", "--python", str(folder), "-r", str(HOME / "tests/bench/peers.txt")]
    subprocess.run(peers, check=True)
    bwrap = next(folder.rglob("_bin/bwrap"))
    flags = "--ro-bind / / --dev /dev --proc /proc --tmpfs /run --unshare-all --die-with-parent".split()

    def run(code: str) -> float:
        began = time.perf_counter()
        subprocess.run(
            [bwrap, *flags, python, "-c", f"print({code!r})" if code is SMALL else code], check=True, stdout=-3
        )
        return time.perf_counter() - began

    run(CELL)
    show("bwrap … python3 per run, numpy and pandas imported", timed([run(CELL) for _ in range(max(5, ROUNDS // 20))]))
    show("bwrap … python3 per run, nothing imported", timed([run(SMALL) for _ in range(max(5, ROUNDS // 10))]))


# The plane


@contextmanager
def server(data: Path, database: str, python: Path | None, **more: str):
    """`manage.py serve` on the first core; yields (port, key)."""
    from tests.product import start

    product = start(data, servers.free_port(), python, DATABASE_URL=database, SANDGATE_LOG_LEVEL="WARNING", **more)
    for task in Path(f"/proc/{product.process.pid}/task").iterdir():
        _pin(int(task.name), 0)
    try:
        yield int(product.url.rsplit(":", 1)[1]), product.key
    finally:
        servers.end(product.process)


def _pin(pid: int, core: int) -> None:
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(pid, {core})


def posted(key: str, **body) -> bytes:
    return request("POST", "/api/v1/executions", key=key, body=json.dumps(body).encode())


async def session(port: int, key: str, route: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"route": [route], "timeout_seconds": 600}).encode()
    status, answer = await one(reader, writer, request("POST", "/api/v1/sessions", key=key, body=body))
    writer.close()
    assert status == 201, answer
    return json.loads(answer)["id"]


async def through_rest(port: int, key: str) -> None:
    kept = await session(port, key, "local")
    warm = posted(key, code=SMALL, session_id=kept)
    await drive(port, warm, clients=1, seconds=1)
    show("warm cell through REST, with its full record", await drive(port, warm, clients=1, seconds=SECONDS))
    fresh = posted(key, code=CELL, route=["local"])
    show("fresh sandbox through REST, with its full record", await drive(port, fresh, clients=1, seconds=SECONDS))


async def governed(port: int, key: str, database: str) -> None:
    trivial = request("GET", "/healthz")
    await drive(port, trivial, clients=16, seconds=1)
    fresh = posted(key, code="1 #= 1", route=["scripted"])
    await drive(port, fresh, clients=16, seconds=1)
    kept = posted(key, code="1 #= 1", session_id=await session(port, key, "scripted"))
    base = show(f"{database}: a trivial view, 16 clients", await drive(port, trivial, clients=16, seconds=SECONDS))
    for name, raw in (("fresh sandbox", fresh), ("in a session", kept)):
        many = await drive(port, raw, clients=16, seconds=SECONDS)
        show(
            f"{database}: governed execution, {name}, 16 clients",
            many,
            f"{many.rate:.0f}/s, {many.rate / base.rate:.3f}",
        )
        show(
            f"{database}: governed execution, {name}, 1 client", await drive(port, raw, clients=1, seconds=SECONDS / 2)
        )


def allow_much(data: Path, database: str) -> None:
    """Ceilings that a load test does not reach; they stay in force and are paid for."""
    env = environment(data, 1, None, DATABASE_URL=database)
    code = "from executions.models import Quota; Quota.objects.update(limit=10**15)"
    subprocess.run(
        [sys.executable, "-W", "ignore", "manage.py", "shell", "--no-imports", "-c", code],
        cwd=HOME,
        env=env,
        check=True,
    )


def main() -> None:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    from executions.backends.local import environment as templates

    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    python = Path(named) if named else templates.make(HOME / "var" / "templates")
    print("| what | p50 ms | p95 ms | rate, and of a trivial view |\n|---|---|---|---|")
    part = sys.argv[1] if len(sys.argv) > 1 else "all"
    _pin(0, 1)
    if part in ("all", "node"):
        with running_node(python) as node:
            for task in Path(f"/proc/{node.process.pid}/task").iterdir():
                _pin(int(task.name), 0)
            asyncio.run(fresh_and_warm(node))
        bwrap_per_run(python)
        with servers.folder() as data, server(data, f"sqlite:///{data}/bench.sqlite3", python) as (port, key):
            asyncio.run(through_rest(port, key))
    if part in ("all", "plane"):
        with servers.folder() as data:
            database = f"sqlite:///{data}/bench.sqlite3"
            with server(data, database, python, SANDGATE_SCRIPTED="true") as (port, key):
                allow_much(data, database)
                asyncio.run(governed(port, key, "SQLite"))
        with servers.postgresql() as database, servers.folder() as data:
            with server(data, database, python, SANDGATE_SCRIPTED="true") as (port, key):
                allow_much(data, database)
                asyncio.run(governed(port, key, "PostgreSQL"))


if __name__ == "__main__":
    main()

"""`make bench`: what is measured side by side in one run, as a table in Markdown.

    python -m tests.bench [node | plane | e2b | mcp | crowd | packages]

Figures are comparable within one run only, so the ratios are what counts. In the part `plane` the server is pinned to the
first core and the load to the second, where there are two.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests import servers
from tests.bench import crowd, double, mcp, packages, peers
from tests.bench import node as at_node
from tests.bench.load import Figures, drive, one, request
from tests.bench.node import CELL, SMALL
from tests.bench.table import HEAD, at_most, show, times
from tests.node import running_node
from tests.product import HOME, environment

SECONDS = float(os.environ.get("BENCH_SECONDS", "8"))

# The plane


@contextmanager
def server(data: Path, database: str, python: Path | None, *, pinned: bool = False, **more: str):
    """`manage.py serve`; yields (port, key)."""
    from tests.product import start

    product = start(data, servers.free_port(), python, DATABASE_URL=database, SANDGATE_LOG_LEVEL="WARNING", **more)
    try:
        if pinned:
            _pin(0, 1)
            for task in Path(f"/proc/{product.process.pid}/task").iterdir():
                _pin(int(task.name), 0)
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


async def through_rest(port: int, key: str) -> Figures:
    """A warm cell's figures."""
    kept = await session(port, key, "local")
    raw = posted(key, code=SMALL, session_id=kept)
    await drive(port, raw, clients=1, seconds=1)
    warm = await drive(port, raw, clients=1, seconds=SECONDS)
    show("warm cell through REST, with its full record", warm, aim=at_most(10, warm.p50_ms))
    fresh = posted(key, code=CELL, route=["local"])
    show("fresh sandbox through REST, with its full record", await drive(port, fresh, clients=1, seconds=SECONDS))
    return warm


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
    at_the_shell(data, database, "from executions.models import Quota; Quota.objects.update(limit=10**15)")


def test_key(data: Path, database: str) -> str:
    """Of the same agent, bound to the scripted backend."""
    bound = "team=key.team, agent=key.agent, name='test', backend='scripted'"
    code = f"from executions import keys, models; key = models.ApiKey.objects.get(); print(keys.make_key({bound})[1])"
    return at_the_shell(data, database, code)


def at_the_shell(data: Path, database: str, code: str) -> str:
    """What it prints."""
    argv = [sys.executable, "-W", "ignore", "manage.py", "shell", "--no-imports", "-c", code]
    env = environment(data, 1, None, DATABASE_URL=database)
    return subprocess.run(argv, cwd=HOME, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def local_runtime(python: Path) -> None:
    """The node and REST beside their peers, and how they compare."""
    with running_node(python) as node:
        fresh, warm = asyncio.run(at_node.measure(node))
    with servers.folder() as data, server(data, f"sqlite:///{data}/bench.sqlite3", python) as (port, key):
        rest = asyncio.run(through_rest(port, key))
    found = peers.measure()
    gateway = found["gateway"]
    times("a fresh sandbox, beside the Gateway's new kernel", fresh.p50_ms, gateway["new"].p50_ms, 20)
    times(
        "the same, where the Gateway's kernel need not import",
        fresh.p50_ms,
        gateway["new, nothing imported"].p50_ms,
        20,
    )
    times("a warm cell at the node, beside the Gateway's", warm.p50_ms, gateway["warm"].p50_ms, 20)
    times("warm cells through REST at one client, beside the Gateway's", 1 / rest.rate, 1 / gateway["warm"].rate, 4)
    quick = found["gateway-nodelay"]["warm"]
    times("a warm cell at the node, beside the Gateway's with TCP_NODELAY", warm.p50_ms, quick.p50_ms)
    times("a fresh sandbox, beside bwrap with the same imports", fresh.p50_ms, found["bwrap"]["new"].p50_ms)
    times("a fresh sandbox, beside sandlock with the same imports", fresh.p50_ms, found["sandlock"]["new"].p50_ms)


def agents(python: Path) -> None:
    """Tool calls, the server on one core and the client on the other."""
    with servers.folder() as data:
        database = f"sqlite:///{data}/bench.sqlite3"
        with server(data, database, python, pinned=True, SANDGATE_SCRIPTED="true") as (port, key):
            allow_much(data, database)

            async def go() -> None:
                kept = {alias: await session(port, key, alias) for alias in ("local", "scripted")}
                await mcp.figures(port, key, kept, SECONDS)

            asyncio.run(go())


def at_once(python: Path) -> None:
    """A crowd on one process of uvicorn."""
    from tests.product import start

    with servers.folder() as data:
        database = f"sqlite:///{data}/bench.sqlite3"
        more = {"DATABASE_URL": database, "SANDGATE_LOG_LEVEL": "WARNING", "SANDGATE_SCRIPTED": "true"}
        product = start(data, servers.free_port(), python, **more)
        try:
            allow_much(data, database)
            port, clients = int(product.url.rsplit(":", 1)[1]), test_key(data, database)
            asyncio.run(crowd.figures(port, product.key, clients, product.process.pid))
        finally:
            servers.end(product.process)


def main() -> None:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    from executions.backends.local import environment as templates

    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    python = Path(named) if named else templates.make(HOME / "var" / "templates")
    print(HEAD)
    part = sys.argv[1] if len(sys.argv) > 1 else "all"
    if part in ("all", "node"):
        local_runtime(python)
    if part in ("all", "e2b"):
        double.main(python)
    if part in ("all", "mcp"):
        agents(python)
    if part in ("all", "crowd"):
        at_once(python)
    if part in ("all", "packages"):
        packages.measured(python)
    if part in ("all", "plane"):
        with servers.folder() as data:
            database = f"sqlite:///{data}/bench.sqlite3"
            with server(data, database, python, pinned=True, SANDGATE_SCRIPTED="true") as (port, key):
                allow_much(data, database)
                asyncio.run(governed(port, key, "SQLite"))
        with servers.postgresql() as database, servers.folder() as data:
            with server(data, database, python, pinned=True, SANDGATE_SCRIPTED="true") as (port, key):
                allow_much(data, database)
                asyncio.run(governed(port, key, "PostgreSQL"))


if __name__ == "__main__":
    main()

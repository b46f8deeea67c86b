"""What the plane costs on E2B, measured on E2B's double: `python -m tests.bench e2b`.

The same double, the same code, by E2B's SDK alone and through REST, in turn; then a thousand at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from executions.backends.base import SandboxSpec
from executions.backends.e2b import E2BBackend
from executions.errors import BackendError
from tests import servers
from tests.bench.load import Figures, one, percentile, request
from tests.bench.table import at_most, row, show, timed
from tests.double import Double, running_double
from tests.product import HOME, environment, start

PAIRS = 60
IN_FLIGHT = 1000
BOOT = [491, 740]  # p50 and p99 of a create, ms
CODE = "#~ 0.5\n#= 1"
AIM_MS = 8


def main(python: Path | None) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with running_double("--faults", json.dumps({"create_ms": [50, 50]})) as double, servers.folder() as data:
        database = f"sqlite:///{data}/bench.sqlite3"
        more = double.settings() | {"SANDGATE_LOG_LEVEL": "WARNING", "DATABASE_URL": database}
        product = start(data, servers.free_port(), python, **more)
        try:
            _open_wide(data, database)
            port = int(product.url.rsplit(":", 1)[1])
            asyncio.run(_added(double, port, product.key, product.process.pid))
            double.tell(create_ms=BOOT)
            asyncio.run(_thousand_by_the_backend(double))
            asyncio.run(_thousand_by_rest(double, port, product.key, product.process.pid))
        finally:
            servers.end(product.process)


async def _added(double: Double, port: int, key: str, pid: int) -> None:
    """One client; the two ways in turn, so that both meet the same load of the machine."""
    from e2b_code_interpreter import AsyncSandbox

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = _posted(key, "#~ 0.02\n#= 1")
    direct, whole, through, worked = [], [], [], 0.0
    for n in range(PAIRS + 5):
        began = time.perf_counter()
        sandbox = await AsyncSandbox.create(timeout=60, **double.options())
        await sandbox.run_code("#~ 0.02\n#= 1")
        ran = time.perf_counter()
        await sandbox.kill()
        ended, before = time.perf_counter(), _cpu_ms(pid)
        status, body = await one(reader, writer, raw)
        told = time.perf_counter()
        assert status == 201, body
        assert json.loads(body)["backend"] == "e2b", body
        if n >= 5:  # the first ones load modules
            direct.append(ran - began)
            whole.append(ended - began)
            through.append(told - ended)
            worked += _cpu_ms(pid) - before
    writer.close()
    alone, rest = show("E2B's SDK alone: create, run", timed(direct)), timed(through)
    show("E2B's SDK alone: create, run, kill", timed(whole))
    added = rest.p50_ms - alone.p50_ms
    show("the same through REST, with its full record and the kill", rest)
    row("what the plane adds to an E2B run", f"{added:.2f}", "", "", at_most(AIM_MS, added))
    row("processor time of the product for one E2B run", figure=f"{worked / PAIRS:.1f} ms")


async def _thousand_by_the_backend(double: Double) -> None:
    """The backend without the plane: what a thousand streams cost by themselves."""
    backend = E2BBackend("e2b", {"API_KEY": double.key, "API_URL": double.url, "SANDBOX_URL": double.url})
    await _run(backend, "warm")
    before, taken, began = _memory(os.getpid()), [], time.perf_counter()

    async def timed_run(n: int) -> None:
        start_ = time.perf_counter()
        await _run(backend, f"n{n}")
        taken.append(time.perf_counter() - start_)

    watch = asyncio.create_task(_peak(os.getpid()))
    await asyncio.gather(*(timed_run(n) for n in range(IN_FLIGHT)))
    spent = time.perf_counter() - began
    watch.cancel()
    most = max(_seen)
    show(
        f"{IN_FLIGHT} E2B runs at once by the backend alone (491 ms create, 500 ms run)",
        _figures(taken, spent),
        f"{IN_FLIGHT / spent:.0f}/s, {most - before:.0f} MB more at most",
    )


async def _run(backend: E2BBackend, name: str) -> None:
    handle = await backend.create(SandboxSpec(f"sbx0{name}", "base", 120))
    async for _ in backend.run_code(handle, CODE):
        pass
    with suppress(BackendError):  # on a busy machine it may be late; the product would ask again
        await backend.kill(handle)


async def _thousand_by_rest(double: Double, port: int, key: str, pid: int) -> None:
    raw, taken, most = _posted(key, CODE), [], 0
    before, began = _memory(pid), time.perf_counter()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begun = time.perf_counter()
        status, body = await one(reader, writer, raw)
        taken.append(time.perf_counter() - begun)
        writer.close()
        assert status == 201, body

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, (await asyncio.to_thread(double.meter))["live"])
            await asyncio.sleep(0.25)

    watch, looking = asyncio.create_task(_peak(pid)), asyncio.create_task(look())
    await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
    spent = time.perf_counter() - began
    watch.cancel()
    looking.cancel()
    show(
        f"{IN_FLIGHT} E2B runs asked for at once through REST, one process",
        _figures(taken, spent),
        f"{IN_FLIGHT / spent:.0f}/s, {max(_seen) - before:.0f} MB more at most, {most} sandboxes alive at once",
    )


_seen: list[float] = []


async def _peak(pid: int) -> None:
    _seen[:] = [_memory(pid)]
    while True:
        await asyncio.sleep(0.1)
        _seen.append(_memory(pid))


def _memory(pid: int) -> float:
    """Resident MB of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _cpu_ms(pid: int) -> float:
    """Processor time of one process so far, in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def _figures(taken: list[float], spent: float) -> Figures:
    taken.sort()
    return Figures(len(taken) / spent, percentile(taken, 0.5) * 1000, percentile(taken, 0.95) * 1000, 0)


def _posted(key: str, code: str) -> bytes:
    body: dict[str, Any] = {"code": code, "route": ["e2b"], "template": "default"}
    return request("POST", "/api/v1/executions", key=key, body=json.dumps(body).encode())


def _open_wide(data: Path, database: str) -> None:
    """Ceilings that a load test does not reach; they stay in force and are paid for."""
    code = "from executions.models import Quota; Quota.objects.update(limit=10**15)"
    command = [sys.executable, "-W", "ignore", "manage.py", "shell", "--no-imports", "-c", code]
    subprocess.run(command, cwd=HOME, env=environment(data, 1, None, DATABASE_URL=database), check=True)

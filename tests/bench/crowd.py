"""A crowd on one process: 500 callers that wait, 1,000 watchers of server-sent events, 200 MCP clients, all at once."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from pathlib import Path

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.bench.load import one, percentile, request
from tests.bench.table import row

SHARE = float(os.environ.get("BENCH_CROWD", "1"))  # of the whole crowd, for a smaller machine
CALLERS, WATCHERS, CLIENTS, WATCHED = (max(1, round(SHARE * n)) for n in (500, 1000, 200, 20))
RUNS = "#> begun\n#~ 4\n#> done\n#= 42"


async def whole(port: int, raw: bytes, ends: bytes = b"") -> bytes:
    """One request on a connection of its own; with `ends`, read until that has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        if not ends:
            status, body = await one(reader, writer, raw)
            assert status in (200, 201, 202), body
            return body
        writer.write(raw)
        return await reader.readuntil(ends)
    finally:
        writer.close()


async def by_client(port: int, key: str) -> str:
    async with (
        httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"}, timeout=120, trust_env=False, verify=False
        ) as http,
        Client(streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)) as client,
    ):
        result = await client.call_tool("execute_code", {"code": RUNS, "keep_session": False})
        return result.content[0].text


async def looks(port: int, taken: list[float]) -> None:
    """How long a health check takes meanwhile."""
    while True:
        began = time.perf_counter()
        await whole(port, request("GET", "/healthz"))
        taken.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)


async def silent(port: int, raw: bytes) -> asyncio.StreamWriter:
    """A watcher that asks, and never reads."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(raw)
    return writer


def memory_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


async def figures(port: int, key: str, pid: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    body = {"code": RUNS, "route": ["scripted"]}
    run = request("POST", "/api/v1/executions", key=key, body=json.dumps(body).encode())
    later = run.replace(b"\r\n", b"\r\nPrefer: respond-async\r\n", 1)
    await whole(port, run)
    before, taken = memory_mib(pid), []
    watched = [json.loads(await whole(port, later))["id"] for _ in range(WATCHED)]
    watch = [request("GET", f"/api/v1/executions/{id}/events", key=key) for id in watched]
    asleep = [await silent(port, watch[0]) for _ in range(20)]
    looking = asyncio.create_task(looks(port, taken))
    began = time.perf_counter()
    answers = asyncio.gather(
        *(whole(port, watch[n % WATCHED], b"event: end\n") for n in range(WATCHERS)),
        *(whole(port, run) for _ in range(CALLERS)),
        *(by_client(port, key) for _ in range(CLIENTS)),
    )
    most = before
    while not answers.done():
        await asyncio.wait({answers}, timeout=0.25)
        most = max(most, memory_mib(pid))
    said, spent = await answers, time.perf_counter() - began
    looking.cancel()
    for writer in asleep:
        writer.close()
    assert all(b"done" in one for one in said[:WATCHERS]), "a watcher missed something"
    assert all(b'"succeeded"' in one for one in said[WATCHERS : WATCHERS + CALLERS])
    assert all("value: 42" in one for one in said[WATCHERS + CALLERS :])
    taken.sort()
    p50, p95 = (f"{percentile(taken, share) * 1000:.0f}" for share in (0.5, 0.95))
    row(
        f"crowd: {CALLERS} callers, {WATCHERS} watchers, {CLIENTS} MCP clients, runs of 4 s",
        figure=f"all in {spent:.1f} s",
    )
    row("crowd: a health check meanwhile", p50, p95)
    row("crowd: memory of the one process, before and at most", figure=f"{before} and {most} MiB")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

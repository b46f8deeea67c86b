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
MOST_SECONDS = 170
RUNS = "#> begun\n#~ 4\n#> done\n#= 42"
LOOKED_AT = "#> begun\n#~ 25\n#> done\n#= 42"  # long enough for all watchers to be there, and then the others


async def whole(port: int, raw: bytes) -> bytes:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        status, body = await one(reader, writer, raw)
        assert status in (200, 201, 202), body
        return body
    finally:
        writer.close()


async def watches(port: int, raw: bytes, there: list[bytes]) -> bytes:
    """All that one watcher hears; it is `there` when the first has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(raw)
        heard = await reader.readuntil(b"begun")
        there.append(heard)
        return heard + await reader.readuntil(b"event: end\n")
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


async def figures(port: int, key: str, test_key: str, pid: int) -> None:
    """`test_key`: of the clients, as no tool names a route to the scripted backend."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    async with asyncio.timeout(MOST_SECONDS):
        await _measured(port, key, test_key, pid)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _measured(port: int, key: str, test_key: str, pid: int) -> None:
    run, long = (
        request("POST", "/api/v1/executions", key=key, body=json.dumps({"code": code, "route": ["scripted"]}).encode())
        for code in (RUNS, LOOKED_AT)
    )
    later = long.replace(b"\r\n", b"\r\nPrefer: respond-async\r\n", 1)
    await whole(port, run)
    before, taken = memory_mib(pid), []
    watched = [json.loads(await whole(port, later))["id"] for _ in range(WATCHED)]
    watch = [request("GET", f"/api/v1/executions/{id}/events", key=key) for id in watched]
    asleep = [await silent(port, watch[0]) for _ in range(20)]
    looking = asyncio.create_task(looks(port, taken))
    began, there = time.perf_counter(), list[bytes]()
    watching = asyncio.gather(*(watches(port, watch[n % WATCHED], there) for n in range(WATCHERS)))
    while len(there) < WATCHERS:
        await asyncio.wait({watching}, timeout=0.1)
        if watching.done():
            watching.result()  # what has gone wrong
    all_there, with_watchers = time.perf_counter() - began, memory_mib(pid)
    answers = asyncio.gather(
        watching, *(whole(port, run) for _ in range(CALLERS)), *(by_client(port, test_key) for _ in range(CLIENTS))
    )
    most = before
    while not answers.done():
        await asyncio.wait({answers}, timeout=0.25)
        most = max(most, memory_mib(pid))
    (heard, *said), spent = await answers, time.perf_counter() - began
    looking.cancel()
    for writer in asleep:
        writer.close()
    assert all(b"done" in one for one in heard), "a watcher missed something"
    assert not (others := [one for one in said[:CALLERS] if b'"succeeded"' not in one]), others[0]
    assert not (others := [one for one in said[CALLERS:] if "value: 42" not in one]), others[0]
    taken.sort()
    p50, p95 = (f"{percentile(taken, share) * 1000:.0f}" for share in (0.5, 0.95))
    row(
        f"crowd: {CALLERS} callers, {WATCHERS} watchers, {CLIENTS} MCP clients, runs of 4 and 25 s",
        figure=f"all in {spent:.1f} s, all watchers there after {all_there:.1f} s",
    )
    row("crowd: a health check meanwhile", p50, p95)
    each = (with_watchers - before) * 1024 // WATCHERS
    row(
        "crowd: memory of the one process, before and at most",
        figure=f"{before} and {most} MiB, {each} KiB for each watcher",
    )

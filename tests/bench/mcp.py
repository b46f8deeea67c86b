"""`execute_code` by the official client, and where its time goes: the client, this product with the SDK's server, the sandbox."""

from __future__ import annotations

import json
import time

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.bench.load import Figures, drive, request
from tests.bench.table import at_most, row, show, timed

CALLS = 200
HEADERS = "Content-Type: application/json\r\nAccept: application/json, text/event-stream\r\nMCP-Protocol-Version: 2025-11-25\r\n"


async def by_client(port: int, key: str, code: str, session_id: str, calls: int = CALLS) -> Figures:
    """One call after the other in one session, by the official client."""
    taken = []
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60, trust_env=False) as http,
        Client(streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)) as client,
    ):
        for _ in range(calls + 20):
            began = time.perf_counter()
            result = await client.call_tool("execute_code", {"code": code, "session_id": session_id})
            taken.append(time.perf_counter() - began)
            assert not result.is_error, result.content[0].text
    return timed(taken[20:])


def posted(key: str, code: str, session_id: str) -> bytes:
    """The same call as bytes, so that no client is measured."""
    arguments = {"code": code, "session_id": session_id}
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "execute_code", "arguments": arguments},
    }
    raw = request("POST", "/mcp", key=key, body=json.dumps(call).encode())
    return raw.replace(b"\r\n", b"\r\n" + HEADERS.encode(), 1)


async def figures(port: int, key: str, kept: dict[str, str], seconds: float) -> None:
    """`kept`: a session on each of local and scripted."""
    warm = await by_client(port, key, "1 + 1", kept["local"])
    show("MCP: execute_code warm, official client, local runtime", warm, aim=at_most(20, warm.p50_ms))
    idle = await by_client(port, key, "#= 2", kept["scripted"])
    show("MCP: the same where nothing runs (client, SDK, plane)", idle)
    raw = posted(key, "#= 2", kept["scripted"])
    await drive(port, raw, clients=1, seconds=1)
    plane = await drive(port, raw, clients=1, seconds=seconds)
    show("MCP: the same without a client (SDK's server, plane)", plane, aim=at_most(8, plane.p50_ms))
    row(
        "MCP: of a warm call",
        figure=f"client {idle.p50_ms - plane.p50_ms:.1f} ms, sandbox {warm.p50_ms - idle.p50_ms:.1f} ms",
    )

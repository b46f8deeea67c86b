"""The double's API: E2B's control plane, answered from the cloud's memory."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, unquote

from executions.gateway.double.cloud import Box, Cloud, Refusal

ENVD_VERSION = "0.5.7"
DISK_MB = 10_240  # included at E2B's smallest plan
PAGE = 100
METRICS_EVERY_SECONDS = 5
Answer = tuple[int, Any, dict[str, str]]


def call_of(method: str, path: str) -> tuple[str, str]:
    """What is asked for, by name, and the sandbox that it is asked of; the name is empty for what is not there."""
    parts = path.strip("/").removeprefix("v2/").split("/")
    match method, parts:
        case "POST", ["sandboxes"]:
            return "create", ""
        case "GET", ["sandboxes"]:
            return "list", ""
        case "GET", ["sandboxes", sandbox_id]:
            return "look", sandbox_id
        case "DELETE", ["sandboxes", sandbox_id]:
            return "kill", sandbox_id
        case "POST", ["sandboxes", sandbox_id, "connect" | "timeout" | "pause" | "refreshes" as verb]:
            return verb, sandbox_id
        case "GET", ["sandboxes", sandbox_id, "metrics"]:
            return "metrics", sandbox_id
        case "PUT", ["sandboxes", sandbox_id, "network"]:
            return "network", sandbox_id
    return "", ""


async def control(cloud: Cloud, call: str, sandbox_id: str, request: Request) -> Answer:
    """Status, body and headers. Raises Refusal."""
    owner = request.headers.get("x-api-key", "")
    if not owner or (cloud.keys and owner not in cloud.keys):
        raise Refusal(401, "Invalid API key")
    if not call:
        raise Refusal(404, "no matching operation was found")
    if call in ("create", "list"):
        return await (_create if call == "create" else _list)(cloud, owner, request)
    return await VERBS[call](cloud, cloud.of(owner, sandbox_id), request)


class Request:
    """What was asked: headers in lower case, the query, the body as it came."""

    def __init__(self, path: str, headers: dict[str, str], query: str, raw: bytes) -> None:
        self.path, self.headers, self.raw = path, headers, raw
        self.query = dict(parse_qsl(query, keep_blank_values=True))

    @property
    def body(self) -> dict[str, Any]:
        try:
            body = json.loads(self.raw or b"{}")
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refusal(400, "Error when parsing request")
        return body


def _head(box: Box) -> dict[str, Any]:
    return {
        "templateID": box.template,
        "alias": box.template,
        "sandboxID": box.sandbox_id,
        "clientID": "double",
        "envdVersion": ENVD_VERSION,
    }


def _made(box: Box) -> dict[str, Any]:
    return _head(box) | {"envdAccessToken": box.token, "domain": None}


def _listed(box: Box) -> dict[str, Any]:
    size = box.machine.spec.limits
    return _head(box) | {
        "startedAt": box.began.isoformat(),
        "endAt": box.moment(box.machine.ends),
        "cpuCount": size.cpu_count,
        "memoryMB": size.memory_mib,
        "diskSizeMB": DISK_MB,
        "state": box.state,
        "metadata": box.metadata,
    }


async def _create(cloud: Cloud, owner: str, request: Request) -> Answer:
    box = await cloud.create(owner, request.body, request.headers.get("idempotency-key", ""), request.raw)
    return 201, _made(box), {}


async def _list(cloud: Cloud, owner: str, request: Request) -> Answer:
    query = request.query
    wanted = {unquote(k): unquote(v) for k, v in parse_qsl(query.get("metadata", ""), keep_blank_values=True)}
    states = {state for state in query.get("state", "").split(",") if state} or {"running", "paused"}
    if not request.path.strip("/").startswith("v2/"):
        states = {"running"}
    found = [
        box
        for box in cloud.live(owner)
        if box.state in states
        and wanted.items() <= box.metadata.items()
        and query.get("template", box.template) == box.template
    ]
    found.sort(key=lambda box: (box.began, box.sandbox_id), reverse=query.get("order") != "asc")
    offset = int(query["nextToken"]) if query.get("nextToken", "").isdigit() else 0
    size = min(int(query["limit"]), PAGE) if query.get("limit", "").isdigit() else PAGE
    headers = {"x-next-token": str(offset + size)} if len(found) > offset + size else {}
    return 200, [_listed(box) for box in found[offset : offset + size]], headers


async def _look(cloud: Cloud, box: Box, request: Request) -> Answer:
    return (
        200,
        _listed(box)
        | {
            "envdAccessToken": box.token,
            "domain": None,
            "allowInternetAccess": box.internet,
            "network": box.network,
            "lifecycle": {"autoResume": False, "onTimeout": "kill"},
        },
        {},
    )


async def _kill(cloud: Cloud, box: Box, request: Request) -> Answer:
    await cloud.kill(box)
    return 204, None, {}


async def _connect(cloud: Cloud, box: Box, request: Request) -> Answer:
    resumed = await cloud.resume(box, request.body.get("timeout", 300))
    return 201 if resumed else 200, _made(box), {}


async def _timeout(cloud: Cloud, box: Box, request: Request) -> Answer:
    if not box.machine.running:
        raise Refusal(404, f"Sandbox {box.sandbox_id} not found")
    await cloud.extend(box, request.body.get("timeout"), shorten=True)
    return 204, None, {}


async def _refreshes(cloud: Cloud, box: Box, request: Request) -> Answer:
    await cloud.extend(box, max(15, request.body.get("duration") or 15), shorten=False)
    return 204, None, {}


async def _pause(cloud: Cloud, box: Box, request: Request) -> Answer:
    await cloud.pause(box)
    return 204, None, {}


async def _network(cloud: Cloud, box: Box, request: Request) -> Answer:
    box.network = request.body
    return 204, None, {}


async def _metrics(cloud: Cloud, box: Box, request: Request) -> Answer:
    """One sample in five seconds of its life; nothing runs, so that they all say little."""
    size, step = box.machine.spec.limits, timedelta(seconds=METRICS_EVERY_SECONDS)
    first = max(box.began, datetime.fromtimestamp(float(request.query.get("start") or 0), UTC))
    last = min(datetime.now(UTC), datetime.fromtimestamp(float(request.query.get("end") or time.time() + 1), UTC))
    moments = [box.began + n * step for n in range(1 + int((datetime.now(UTC) - box.began) / step))]
    samples = [
        {
            "timestamp": at.isoformat(),
            "timestampUnix": int(at.timestamp()),
            "cpuCount": size.cpu_count,
            "cpuUsedPct": 1.5,
            "memUsed": 64 << 20,
            "memTotal": size.memory_mib << 20,
            "memCache": 16 << 20,
            "diskUsed": 1 << 30,
            "diskTotal": DISK_MB << 20,
        }
        for at in moments
        if first <= at <= last
    ]
    return 200, samples, {}


VERBS: dict[str, Callable[[Cloud, Box, Request], Awaitable[Answer]]] = {
    "look": _look, "kill": _kill, "connect": _connect, "timeout": _timeout, "refreshes": _refreshes, "pause": _pause,
    "metrics": _metrics, "network": _network,
}  # fmt: skip

"""Port 49983: E2B's daemon. Health, files, and the Connect services for processes and the file system."""

from __future__ import annotations

import base64
import hashlib
import hmac
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

from . import commands, files, filesystem
from .connect import STATUS, ConnectError
from .http import Refused, Request


def _error(status: int, message: str) -> Refused:
    return Refused(status, {"code": status, "message": message})


def handler(agent: Any) -> Callable[[Request], Awaitable[None]]:
    started = commands.Commands(agent)

    async def handle(request: Request) -> None:
        if request.method == "GET" and request.path == "/health":
            await request.answer(204)
            return
        _authenticate(agent.plan["token"], request)
        match request.method, request.path:
            case "GET", "/files":
                await files.send(request)
            case "POST", "/files":
                await files.receive(request)
            case "GET", "/envs":
                await request.answer(200, agent.plan["env"])
            case "POST", path if path.removeprefix("/process.Process/") in started.streams:
                await started.stream(request, path.removeprefix("/process.Process/"))
            case "POST", path if path.startswith("/process.Process/"):
                await _unary(request, started.unary, path)
            case "POST", path if path.startswith("/filesystem.Filesystem/"):
                await _unary(request, filesystem.unary, path)
            case _:
                raise _error(404, "not found")

    return handle


async def _unary(request: Request, services: dict[str, Callable], path: str) -> None:
    service = services.get(path.rpartition("/")[2])
    try:
        if service is None:
            raise ConnectError("unimplemented", f"{path} is not there")
        answer = service(await request.json())
        if inspect.isawaitable(answer):
            answer = await answer
    except ConnectError as refusal:
        raise Refused(STATUS[refusal.code], refusal.described()) from None
    await request.answer(200, answer)


def _authenticate(token: str, request: Request) -> None:
    """The token in its header; for files also a signature in the query. Refused (401) otherwise."""
    if not token or hmac.compare_digest(request.headers.get("x-access-token", "").encode(), token.encode()):
        return
    if request.path != "/files":
        raise _error(401, "unauthorized")
    query = request.query
    signature = query.get("signature")
    if not signature:
        raise _error(401, "missing signature query parameter")
    operation = "read" if request.method == "GET" else "write"
    signed = [query.get("path", ""), operation, query.get("username", ""), token]
    expiration = query.get("signature_expiration")
    if expiration:
        signed.append(expiration)
    digest = base64.b64encode(hashlib.sha256(":".join(signed).encode()).digest()).decode().rstrip("=")
    if not hmac.compare_digest(signature.encode(), f"v1_{digest}".encode()):
        raise _error(401, "invalid signature")
    if expiration and (not expiration.isdigit() or int(expiration) < time.time()):
        raise _error(401, "signature is already expired")

"""The double as an ASGI application and as a server: chance first, then E2B's two planes, and a way to look behind them."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import asdict
from ipaddress import ip_address
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from executions.errors import SandboxLost
from executions.gateway.asgi import answer, gone, not_found, whole_body
from executions.gateway.data import ID, INTERPRETER, PORT
from executions.gateway.double import inside
from executions.gateway.double.cloud import Cloud, Refusal
from executions.gateway.double.control import Request, call_of, control
from executions.gateway.double.faults import Faults, seconds

API = ("sandboxes", "v2", "v3", "templates", "snapshots", "volumes", "teams", "events")
BEHIND = "/_double/"
BODY_LIMIT_BYTES = 8 << 20
IDLE_SECONDS = 640  # that the cloud keeps a connection open


class Severable(HttpToolsProtocol):
    """Requests that can be answered by breaking their connection off."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["double.sever"] = self.transport.abort  # type: ignore[typeddict-unknown-key]


class Double:
    """E2B, with everything that goes wrong there."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        try:
            if scope["path"].startswith(BEHIND):
                await self._behind(scope, receive, send)
            else:
                await self._asked(scope, receive, send)
        except Refusal as e:
            await _refuse(send, e)

    async def _asked(self, scope: Any, receive: Any, send: Any) -> None:
        cloud, path, method = self.cloud, scope["path"], scope["method"]
        first = path.strip("/").partition("/")[0]
        call, sandbox_id = call_of(method, path) if first in API else (_call_inside(path), "")
        cloud.count(call or "other")
        faults, chance = cloud.faults, cloud.chance
        if faults.down == "reset":
            return await _sever(scope, receive)
        if faults.down == "swallow" or chance.random() < faults.swallows:
            return await gone(receive)
        if faults.down:
            raise Refusal(503, "no healthy upstream")
        if refused := faults.refusal(call, chance):
            cloud.count(f"{call or 'other'} {refused['status']}")
            raise Refusal(refused["status"], f"refused by chance ({call})", retry_after=refused.get("retry_after"))
        if call != "create" and faults.answer_ms[0]:
            await asyncio.sleep(seconds(faults.answer_ms, chance))
        if first in API:
            return await self._control(scope, receive, send, call, sandbox_id)
        await self._inside(scope, receive, send)

    async def _control(self, scope: Any, receive: Any, send: Any, call: str, sandbox_id: str) -> None:
        cloud = self.cloud
        raw = await whole_body(receive, BODY_LIMIT_BYTES)
        if raw is None:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request = Request(scope["path"], headers, scope["query_string"].decode("latin-1"), raw)
        if call == "kill" and cloud.chance.random() < cloud.faults.kill_hangs:
            return await gone(receive)
        try:
            status, body, more = await control(cloud, call, sandbox_id, request)
        except Refusal as e:
            cloud.count(f"{call or 'other'} {e.status}")
            raise
        if call == "create" and cloud.chance.random() < cloud.faults.loses:
            return await _sever(scope, receive)
        await _answer(send, status, body, more)

    async def _inside(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        sandbox_id, port = headers.get(ID, b"").decode("latin-1"), headers.get(PORT, b"").decode("latin-1")
        if not sandbox_id or not port.isdigit():
            raise Refusal(400, "E2b-Sandbox-Id and E2b-Sandbox-Port say where to; one is missing or wrong.")
        box, path = self.cloud.find(sandbox_id), "/" + scope["path"].strip("/")
        if box is None or not box.machine.running:
            return await not_found(send, sandbox_id)
        public = path == "/health" or path.startswith("/contexts")
        if not public and headers.get(b"x-access-token", b"").decode("latin-1") != box.token:
            raise Refusal(401, "unauthenticated")
        try:
            if int(port) == INTERPRETER:
                await inside.interpreter(self.cloud, box, path, scope, receive, send)
            elif int(port) == 49983:
                await inside.envd(self.cloud, box, path, scope, receive, send)
            else:
                message = "The sandbox is running but port is not open"
                await answer(send, 502, {"sandboxId": sandbox_id, "message": message, "port": port, "code": 502})
        except (SandboxLost, inside.Cut):
            await _sever(scope, receive)  # by which the SDK learns that something broke, and asks for its health

    async def _behind(self, scope: Any, receive: Any, send: Any) -> None:
        """What a cloud does not have: its faults, and its meter. From this machine only."""
        if not ip_address(scope["client"][0]).is_loopback:
            raise Refusal(403, "from this machine only")
        what = scope["path"].removeprefix(BEHIND).strip("/")
        match scope["method"], what:
            case "GET", "faults":
                pass
            case "POST", "faults":
                try:
                    self.cloud.faults.change(json.loads(await whole_body(receive, BODY_LIMIT_BYTES) or b"{}"))
                except ValueError as e:
                    raise Refusal(400, str(e)) from None
            case "DELETE", "faults":
                self.cloud.faults = Faults()
            case "GET", "meter":
                return await answer(send, 200, self.cloud.meter())
            case "POST", "vanish":
                body = json.loads(await whole_body(receive, BODY_LIMIT_BYTES) or b"{}")
                for box in self.cloud.boxes.values():
                    if body.get("sandboxID") in (None, box.sandbox_id):
                        box.machine.end("vanished")
            case _:
                raise Refusal(404, "there are GET, POST, DELETE faults, GET meter and POST vanish")
        await answer(send, 200, asdict(self.cloud.faults))


def _call_inside(path: str) -> str:
    first, _, rest = path.strip("/").partition("/")
    return {"execute": "execute", "contexts": "contexts", "files": "files", "health": "health"}.get(
        first, "command" if rest == "Start" else "inside"
    )


async def _sever(scope: Any, receive: Any) -> None:
    scope["double.sever"]()
    await gone(receive)


async def _answer(send: Any, status: int, body: Any, more: dict[str, str]) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    headers = [(name.encode(), value.encode()) for name, value in more.items()]
    if body is not None:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _refuse(send: Any, refusal: Refusal) -> None:
    more = {}
    if refusal.retry_after is not None:
        more["retry-after"] = str(max(1, round(refusal.retry_after)))
    if refusal.retry is not None:
        more["should-retry"] = str(refusal.retry).lower()
    await _answer(send, refusal.status, {"code": refusal.status, "message": refusal.message}, more)


async def serve(cloud: Cloud, listening: socket.socket) -> None:
    """Serve until a signal."""
    config = uvicorn.Config(
        Double(cloud),
        http=Severable,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    await uvicorn.Server(config).serve(sockets=[listening])

"""`/mcp`: who may come in, before the SDK sees a request. The SDK is imported, and its app built, by the first one."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import structlog
from django.conf import settings
from django.http.request import split_domain_port, validate_host
from django.utils.datastructures import CaseInsensitiveMapping

from executions import audit, keys, traces
from executions.errors import Forbidden, Invalid, SandgateError, ours
from executions.hop import rows
from executions.mcp import oauth

log = structlog.get_logger(__name__)
CALLER = "sandgate.caller"  # where the ASGI scope carries it to the tools


class Mounted:
    """An ASGI app whose lifespan is entered at the first request, by one task that also leaves it: any server will do."""

    def __init__(self, build: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self.build = build
        self.ready: asyncio.Future[Any] | None = None
        self.stop: asyncio.Event | None = None
        self.owner: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = await asyncio.shield(self._entered())
        await app(scope, receive, send)

    def _entered(self) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        if self.ready is None or self.ready.get_loop() is not loop:
            self.ready, self.stop = loop.create_future(), asyncio.Event()
            self.owner = loop.create_task(self._own(self.ready, self.stop), context=Context())
        return self.ready

    async def _own(self, ready: asyncio.Future[Any], stop: asyncio.Event) -> None:
        try:
            async with await asyncio.to_thread(self.build) as app:  # the import takes a second
                ready.set_result(app)
                await stop.wait()
        except BaseException as e:
            if not ready.done():
                ready.cancel() if isinstance(e, asyncio.CancelledError) else ready.set_exception(e)
            if not isinstance(e, Exception):
                raise
            log.error("mcp_app_failed", exc_info=e)
        finally:
            if self.ready is ready:
                self.ready = None  # the next request tries again

    async def close(self) -> None:
        """Leave the lifespan, if it was ever entered."""
        if self.owner is not None and self.stop is not None and not self.owner.done():
            self.stop.set()
            await self.owner


def _build() -> AbstractAsyncContextManager[Any]:
    from executions.mcp.server import over_http

    return over_http(caller_of=lambda context: context.request.scope[CALLER])


app = Mounted(_build)


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Host, Origin and key are looked at here; what is refused gets a problem, what may pass carries its Caller."""
    request_id = "req_" + secrets.token_hex(10)
    headers = CaseInsensitiveMapping({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]})
    added = [(b"request-id", request_id.encode())]
    if trace := traces.continued(headers.get("traceparent")):
        added.append((b"traceparent", trace.encode()))

    async def labelled(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    with structlog.contextvars.bound_contextvars(request_id=request_id):
        try:
            _from_a_known_host(headers)
            if scope["method"] != "POST":  # stateless: there is no stream to open and no session to delete
                raise _post_only()
            ip = scope["client"][0] if scope.get("client") else None
            caller = await rows(_authenticated, headers, ip, request_id)
        except SandgateError as e:
            if audit.tells(e):
                await rows(audit.denied, e)
            return await _problem(e, request_id, labelled, sent=bool(keys.bearer(headers)))
        except Exception as e:
            log.exception("mcp_door_failed")
            return await _problem(ours(e), request_id, labelled)
        await app({**scope, CALLER: caller}, receive, labelled)


def _from_a_known_host(headers: CaseInsensitiveMapping) -> None:
    """A page on another site that renamed itself to this machine (DNS rebinding) gets no further. Raises Invalid, Forbidden."""
    allowed = settings.ALLOWED_HOSTS or ([".localhost", "127.0.0.1", "[::1]"] if settings.DEBUG else [])
    domain, _ = split_domain_port(headers.get("Host", ""))
    if not domain or not validate_host(domain, allowed):
        raise Invalid(
            "The Host header names a host that is not this one's.",
            field="Host",
            remedy="Use the address that the console shows, or have the operator add the host to SANDGATE_ALLOWED_HOSTS.",
        )
    if origin := headers.get("Origin"):
        domain, _ = split_domain_port(urlsplit(origin).netloc)
        if not domain or not validate_host(domain, allowed):
            raise Forbidden("Pages of that Origin may not call this.", remedy="Call it from a program, without Origin.")


def _post_only() -> SandgateError:
    refused = Invalid("POST only: this server keeps no MCP session.", remedy="POST one JSON-RPC message to /mcp.")
    refused.code, refused.status = "method_not_allowed", 405
    return refused


def _authenticated(headers: Any, ip: str | None, request_id: str) -> keys.Caller:
    """The caller with its agent settled; a key of a whole team names the agent in `Sandgate-Agent`."""
    token = keys.bearer(headers)
    if settings.OAUTH and token and not token.startswith(("sg_", "e2b_")):
        caller = oauth.caller_of(token, ip=ip, request_id=request_id)
    else:
        caller = keys.authenticate(token, door="mcp", ip=ip, request_id=request_id)
    try:
        acting = caller.acting_as(headers.get("Sandgate-Agent"))
    except Invalid as e:
        e.remedy = "Send the header Sandgate-Agent: <name>, or use a key that is bound to an agent."
        raise
    return replace(acting, trace_id=traces.trace_of(headers.get("traceparent")))


async def _problem(error: SandgateError, request_id: str, send: Any, *, sent: bool = False) -> None:
    body = json.dumps(error.problem() | {"request_id": request_id}).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", oauth.challenge(sent=sent).encode()))
    if error.status == 405:
        headers.append((b"allow", b"POST"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""E2B's data plane: what the SDKs send into a sandbox. A raw ASGI app, as Django would read a whole body first.

A request is for the sandbox in `E2b-Sandbox-Id` and its port in `E2b-Sandbox-Port`. It is passed on to the agent in that
sandbox, which speaks E2B itself; only `/execute` is not: it is an execution, like any other.
"""

from __future__ import annotations

import secrets
from typing import Any

from executions import backends
from executions.errors import SandboxLost
from executions.gateway import cells, relay
from executions.gateway.asgi import answer, not_found
from executions.gateway.control import find
from executions.hop import rows
from executions.keys import Caller
from executions.models import Sandbox
from executions.states import Scope

PREFIX = "/e2b"
CONTROL = frozenset(  # first part of the paths of the control plane; old SDKs send E2b-Sandbox-Id there too
    "sandboxes snapshots templates volumes volumecontent secrets teams api-keys access-tokens nodes admin events v2 v3".split()
)
FORBIDDEN = frozenset(
    "init freeze unfreeze collapse fsfreeze fsthaw upgrade".split()
)  # the agent's, for its orchestrator
INTERPRETER = 49999
CANNOT_STREAM = (
    "The web server that runs here (daphne, as under runserver) cannot stream into sandboxes. "
    "Start Sandgate with `manage.py serve`, or with `uvicorn config.asgi:application`."
)


def is_for(path: str) -> bool:
    """Whether a path is the data plane's: never decided by a header."""
    return path.startswith(PREFIX + "/") and path.split("/", 3)[2] not in CONTROL


async def data(scope: Any, receive: Any, send: Any) -> None:
    if "spec_version" not in scope["asgi"]:  # daphne declares none: it buffers requests and cannot break an answer off
        return await answer(send, 501, {"code": 501, "message": CANNOT_STREAM})
    headers = dict(scope["headers"])
    sandbox_id = headers.get(b"e2b-sandbox-id", b"").decode("latin-1")
    port = headers.get(b"e2b-sandbox-port", b"").decode("latin-1")
    if not sandbox_id or not (port.isascii() and port.isdigit() and int(port) < 65_536):
        message = "The headers E2b-Sandbox-Id and E2b-Sandbox-Port say where to; one of them is missing or wrong."
        return await answer(send, 400, {"code": 400, "message": message})
    sandbox = await rows(find, sandbox_id)
    if sandbox is None:
        return await not_found(send, sandbox_id)
    if not _owner_is_live(sandbox):
        return await answer(
            send, 401, {"code": 401, "message": "The key or agent that made this sandbox is switched off."}
        )
    path = scope["path"].removeprefix(PREFIX)
    if path.strip("/") in FORBIDDEN:
        return await answer(send, 404, {"code": 404, "message": "not found"})
    if int(port) == INTERPRETER and path == "/execute" and scope["method"] == "POST":
        return await cells.execute(_caller(scope, sandbox), sandbox, headers, receive, send)
    await _pass_on(scope, receive, send, sandbox, int(port))


async def _pass_on(scope: Any, receive: Any, send: Any, sandbox: Sandbox, port: int) -> None:
    sandbox_id = sandbox.pk.removeprefix("sbx_")
    try:
        reader, writer = await backends.get(sandbox.backend).open_port(sandbox.handle, port)  # type: ignore[arg-type]
    except ConnectionRefusedError:
        message = "The sandbox is running but port is not open"
        return await answer(send, 502, {"sandboxId": sandbox_id, "message": message, "port": port, "code": 502})
    except SandboxLost:
        return await not_found(send, sandbox_id)
    raw = scope.get("raw_path") or scope["path"].encode()
    target = raw.removeprefix(PREFIX.encode()) + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    try:
        await relay.relay(scope, target, receive, send, reader, writer)
    except relay.BrokenOff as broken:
        if not broken.begun:
            return await not_found(send, sandbox_id)
        # left without an end: the server breaks the connection off, by which the SDK knows that the sandbox died


def _owner_is_live(sandbox: Sandbox) -> bool:
    return sandbox.agent.is_active and (sandbox.key is None or sandbox.key.is_live)


def _caller(scope: Any, sandbox: Sandbox) -> Caller:
    """Whoever made the sandbox: the SDKs send no key here, but the sandbox's own token."""
    return Caller(
        team=sandbox.team,
        agent=sandbox.agent,
        key=sandbox.key,
        person=sandbox.actor,
        scopes=frozenset({Scope.RUN}),
        door="gateway",
        ip=(scope.get("client") or [None])[0],
        request_id="req_" + secrets.token_hex(10),
    )

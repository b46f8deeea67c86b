"""E2B's data plane: what the SDKs send into a sandbox. A raw ASGI app, as Django would read a whole body first.

A request is for the sandbox in `E2b-Sandbox-Id` and its port in `E2b-Sandbox-Port`, or in the host name. It is passed on to the agent in that
sandbox, which speaks E2B itself; only `/execute` is not: it is an execution, like any other.
"""

from __future__ import annotations

import secrets
from typing import Any
from urllib.parse import quote

from django.conf import settings

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
)  # for an orchestrator, not for clients
INTERPRETER = 49999
PASSED_ON = ("health", "contexts")  # all that the interpreter answers by itself
ID, PORT = b"e2b-sandbox-id", b"e2b-sandbox-port"
BY_HOST = "sandgate.by_host"  # in the scope of a request whose host name has said which sandbox
CANNOT_STREAM = (
    "The web server that runs here (daphne, as under runserver) cannot stream into sandboxes. "
    "Start Sandgate with `manage.py serve`, or with `uvicorn config.asgi:application`."
)


def addressed(scope: Any) -> Any:
    """The scope as the header form has it, where SANDGATE_E2B_DOMAIN is set: `api.<domain>` is the control plane,
    `<port>-<id>.<domain>` a port of a sandbox."""
    domain = settings.GATEWAY_DOMAIN.partition(":")[0]
    if not domain:
        return scope
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    label, _, rest = host.partition(":")[0].lower().partition(".")
    if rest != domain:
        return scope
    scope = {**scope, "path": PREFIX + scope["path"]}
    if label != "api":
        port, _, sandbox_id = label.partition("-")
        headers = [header for header in scope["headers"] if header[0] not in (ID, PORT)]
        scope |= {"headers": [*headers, (ID, sandbox_id.encode()), (PORT, port.encode())], BY_HOST: True}
    return scope


def is_for(scope: Any) -> bool:
    """Whether a request is for the data plane: its host name or its path decides, never a header of E2B's."""
    path = scope["path"]
    return BY_HOST in scope or (path.startswith(PREFIX + "/") and path.split("/", 3)[2] not in CONTROL)


async def data(scope: Any, receive: Any, send: Any) -> None:
    if "spec_version" not in scope["asgi"]:  # daphne declares none: it buffers requests and cannot break an answer off
        return await _refuse(send, 501, CANNOT_STREAM)
    headers = dict(scope["headers"])
    sandbox_id, port = headers.get(ID, b"").decode("latin-1"), headers.get(PORT, b"").decode("latin-1")
    if not sandbox_id or not (port.isascii() and port.isdigit() and int(port) < 65_536):
        return await _refuse(send, 400, "E2b-Sandbox-Id and E2b-Sandbox-Port say where to; one is missing or wrong.")
    sandbox = await rows(find, sandbox_id)
    if sandbox is None:
        return await not_found(send, sandbox_id)
    if not sandbox.is_here:
        return await _refuse(send, 421, f"The sandbox lives on machine {sandbox.node}: ask the server there.")
    if not _owner_is_live(sandbox):
        return await _refuse(send, 401, "The key or agent that made this sandbox is switched off.")
    path = "/" + scope["path"].removeprefix(PREFIX).lstrip("/")
    first = path.strip("/").partition("/")[0]
    if int(port) != INTERPRETER:
        if first in FORBIDDEN:
            return await _refuse(send, 404, "not found")
    elif path == "/execute" and scope["method"] == "POST":
        return await cells.execute(_caller(scope, sandbox), sandbox, headers, receive, send)
    elif first not in PASSED_ON:
        return await _refuse(send, 404, "not found")
    await _pass_on(scope, path, receive, send, sandbox, int(port))


async def _refuse(send: Any, status: int, message: str) -> None:
    await answer(send, status, {"code": status, "message": message})


async def _pass_on(scope: Any, path: str, receive: Any, send: Any, sandbox: Sandbox, port: int) -> None:
    sandbox_id = sandbox.pk.removeprefix("sbx_")
    try:
        reader, writer = await backends.get(sandbox.backend).open_port(sandbox.handle, port)  # type: ignore[arg-type]
    except ConnectionRefusedError:
        message = "The sandbox is running but port is not open"
        return await answer(send, 502, {"sandboxId": sandbox_id, "message": message, "port": port, "code": 502})
    except SandboxLost:
        return await not_found(send, sandbox_id)
    target = quote(path).encode()  # made anew, so that the agent reads the very path that was judged here
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
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

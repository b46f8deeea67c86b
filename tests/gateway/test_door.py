"""Who is let through to a sandbox, and what a server that cannot stream says. No sandbox is needed to be refused."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from executions.gateway import data
from executions.hop import rows
from executions.keys import make_key
from executions.models import Sandbox, Template
from executions.states import SandboxState

UVICORN = {"version": "3.0", "spec_version": "2.3"}
DAPHNE = {"version": "3.0"}


async def answer_to(
    sandbox_id: str, path: str = "/e2b/health", port: str = "49983", asgi: Any = UVICORN
) -> tuple[int, dict]:
    headers = [(b"e2b-sandbox-id", sandbox_id.encode()), (b"e2b-sandbox-port", port.encode())]
    scope = {"asgi": asgi, "method": "GET", "path": path, "query_string": b"", "headers": headers, "client": ("::1", 1)}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await data.data(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture
def sandbox(agent):
    key, _ = make_key(team=agent.team, agent=agent, name="for the gateway")
    return Sandbox.born(
        SandboxState.LEASED,
        team=agent.team,
        agent=agent,
        key=key,
        template=Template.objects.create(name="default"),
        backend="local",
        handle={"sandbox_id": "sbx0", "dir": "/nonexistent", "token": "t"},
        kept=True,
        leased_until=timezone.now() + timedelta(minutes=1),
    )


def outside(sandbox: Sandbox) -> str:
    return sandbox.pk.removeprefix("sbx_")


async def test_a_live_sandbox_whose_machine_is_gone_is_not_found(sandbox):
    status, body = await answer_to(outside(sandbox))

    assert (status, body["message"]) == (502, "The sandbox was not found")


async def test_a_sandbox_is_closed_once_its_key_is_revoked(sandbox):
    sandbox.key.revoked_at = timezone.now()
    await rows(sandbox.key.save)

    assert (await answer_to(outside(sandbox)))[0] == 401


async def test_a_sandbox_is_closed_while_its_agent_is_switched_off(sandbox):
    sandbox.agent.is_active = False
    await rows(sandbox.agent.save)

    assert (await answer_to(outside(sandbox)))[0] == 401


async def test_a_sandbox_is_not_found_from_its_end_on(sandbox):
    await rows(Sandbox.objects.update, leased_until=timezone.now())

    status, body = await answer_to(outside(sandbox))
    assert (status, body["message"]) == (502, "The sandbox was not found")


@pytest.mark.parametrize("port", ["", "x", "-1", "70000", "²"])
async def test_a_port_that_is_none_is_refused(db, port):
    assert (await answer_to("0", port=port))[0] == 400


async def test_a_server_that_cannot_stream_says_which_can(db):
    status, body = await answer_to("0", asgi=DAPHNE)

    assert status == 501
    assert "manage.py serve" in body["message"]


@pytest.mark.parametrize(
    ("path", "is_data"),
    [
        ("/e2b/execute", True),
        ("/e2b/files", True),
        ("/e2b/process.Process/Start", True),
        ("/e2b/health", True),
        ("/e2b/sandboxes", False),
        ("/e2b/v2/sandboxes/x/connect", False),
        ("/e2b/templates/x", False),
        ("/e2b", False),
        ("/e2b2/execute", False),
        ("/api/v1/executions", False),
    ],
)
def test_the_path_alone_decides_which_plane_it_is(path, is_data):
    assert data.is_for({"path": path, "headers": [(b"e2b-sandbox-id", b"x")]}) is is_data


# With a wildcard domain


def scope_of(host: str, path: str = "/files") -> dict[str, Any]:
    headers = [(b"host", host.encode()), (b"e2b-sandbox-id", b"other")]
    return {"path": path, "headers": headers}


def test_a_host_name_says_which_sandbox_and_no_header_says_otherwise(settings):
    settings.GATEWAY_DOMAIN = "sbx.example.org:8443"
    scope = data.addressed(scope_of("49983-abc0.SBX.example.org:8443", "/sandboxes"))

    assert data.is_for(scope)
    assert scope["path"] == "/e2b/sandboxes"
    assert [value for name, value in scope["headers"] if name.startswith(b"e2b-")] == [b"abc0", b"49983"]


def test_the_api_host_is_the_control_plane(settings):
    settings.GATEWAY_DOMAIN = "sbx.example.org"
    scope = data.addressed(scope_of("api.sbx.example.org", "/v2/sandboxes"))

    assert (scope["path"], data.is_for(scope)) == ("/e2b/v2/sandboxes", False)


@pytest.mark.parametrize(
    "host", ["sandgate.example.org", "sbx.example.org", "a.b.sbx.example.org", "49983-a.evilsbx.example.org", ""]
)
def test_other_hosts_are_the_products_own(settings, host):
    settings.GATEWAY_DOMAIN = "sbx.example.org"
    scope = scope_of(host)

    assert data.addressed(scope) is scope


def test_without_a_domain_no_host_is_a_sandbox(settings):
    settings.GATEWAY_DOMAIN = ""
    scope = scope_of("49983-abc0.sbx.example.org")

    assert data.addressed(scope) is scope

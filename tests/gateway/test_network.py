"""The network of sandboxes, as E2B's own SDK asks for it; nothing is connected beyond this machine."""

from __future__ import annotations

import secrets

import pytest
from e2b import SandboxException
from e2b_code_interpreter import Sandbox

from executions.backends.base import SandboxSpec
from executions.backends.e2b import E2BBackend
from tests.gateway.conftest import options

CONNECT = """
import socket
def connect(authority):
    s = socket.create_connection(('127.0.0.1', 3128), 5)
    s.sendall(f'CONNECT {authority} HTTP/1.1\\r\\n\\r\\n'.encode())
    return s.recv(4096).split(b'\\r\\n')[0].decode()
"""


@pytest.fixture
def online(product, tenants):
    """Of an agent that may reach a.example, and a port of this machine on which nobody listens."""
    return options(product, tenants["online"])


def told(sandbox, authority: str) -> str:
    execution = sandbox.run_code(f"{CONNECT}\nprint(connect({authority!r}))")
    assert execution.error is None
    return "".join(execution.logs.stdout).strip()


def test_a_sandbox_has_the_network_of_its_agent(online):
    with Sandbox.create(timeout=60, **online) as sandbox:
        info = sandbox.get_info()
        known, unknown = told(sandbox, "127.0.0.2:9"), told(sandbox, "b.example:443")

    assert info.allow_internet_access is True
    assert known == "HTTP/1.1 502 Sandgate: 127.0.0.2:9 could not be reached: connection refused."
    assert unknown == (
        "HTTP/1.1 403 Sandgate: agent agent may not reach b.example:443; allowed are: a.example, 127.0.0.2:9"
    )


@pytest.mark.parametrize(
    "asked",
    [{"allow_internet_access": False}, {"network": {"deny_out": ["0.0.0.0/0"]}}],
)
def test_it_may_ask_for_none(online, asked):
    with Sandbox.create(timeout=60, **asked, **online) as sandbox:
        info = sandbox.get_info()
        said = sandbox.run_code(CONNECT + "connect('a.example:443')").error.name

    assert info.allow_internet_access is False
    assert said == "ConnectionRefusedError"


def test_it_may_ask_for_less(online):
    less = {"allow_out": ["a.example"], "deny_out": ["0.0.0.0/0"]}
    with Sandbox.create(timeout=60, network=less, **online) as sandbox:
        said = told(sandbox, "127.0.0.2:9")

    assert said == "HTTP/1.1 403 Sandgate: agent agent may not reach 127.0.0.2:9; allowed are: a.example"


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"allow_out": ["b.example"]}, 403, "agent agent may not reach b.example; allowed are: a.example, 127.0.0.2:9"),
        ({"allow_out": ["0.0.0.0/0"]}, 403, "may not reach *"),
        ({"allow_out": ["http://a.example"]}, 400, "only a host and a port"),
        ({"deny_out": ["1.1.1.1"]}, 400, "denyOut"),
        ({"egress_proxy": {"address": "proxy.example:1080"}}, 400, "egressProxy"),
    ],
)
def test_what_is_more_or_other_is_refused_by_name(online, asked, status, said):
    with pytest.raises(SandboxException) as refused:
        Sandbox.create(timeout=60, network=asked, **online)

    assert str(refused.value).startswith(str(status))
    assert said in str(refused.value)


async def test_the_backend_for_e2b_hands_the_rules_on(product, tenants):
    url = f"{product.url}/e2b"
    backend = E2BBackend("double", {"API_KEY": tenants["online"], "API_URL": url, "SANDBOX_URL": url})
    name = "n" + secrets.token_hex(8)
    handle = await backend.create(SandboxSpec(name, "base", timeout_seconds=60, network_allow=("a.example",)))
    try:
        code = f"{CONNECT}\nprint(connect('127.0.0.2:9'))"
        said = [event.data["text"] async for event in backend.run_code(handle, code) if event.kind == "stdout"]
    finally:
        await backend.kill(handle)

    assert "".join(said).strip() == (
        "HTTP/1.1 403 Sandgate: agent agent may not reach 127.0.0.2:9; allowed are: a.example"
    )

"""The E2B backend keeps the contract of backends, by E2B's own SDK over a real socket, on the product's gateway."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from executions.backends.base import SandboxSpec
from executions.backends.e2b import E2BBackend
from executions.backends.e2b.stream import lines, refusal
from executions.errors import BackendError, BackendUnavailable, ContextUnknown, SandboxLost, SandboxRefused, Unsupported
from tests import servers
from tests.backends.contract import BackendContract
from tests.product import Product


def on_gateway(product: Product) -> E2BBackend:
    """An alias whose E2B is the product that runs: the one double there is."""
    url = f"{product.url}/e2b"
    options = {
        "API_KEY": product.key,
        "API_URL": url,
        "SANDBOX_URL": url,
        "LANGUAGES": ["python", "bash", "javascript", "typescript"],
    }
    return E2BBackend("double", {**options, "ISOLATION": "namespaces"})


class TestE2B(BackendContract):
    template = "code-interpreter-v1"

    @pytest.fixture
    def backend(self, product: Product) -> E2BBackend:
        return on_gateway(product)


if CLOUD_KEY := os.environ.get("SANDGATE_TEST_E2B_KEY"):  # make test-e2b

    class TestCloud(BackendContract):
        """The same contract on E2B itself."""

        template = "code-interpreter-v1"

        @pytest.fixture
        def backend(self) -> E2BBackend:
            return E2BBackend("e2b", {"API_KEY": CLOUD_KEY, "DOMAIN": os.environ.get("SANDGATE_TEST_E2B_DOMAIN", "")})


# What the SDK and other servers say, in this product's words


class Answering(BaseHTTPRequestHandler):
    """An API that answers everything with one status, and repeats the key that it was sent."""

    def do_POST(self) -> None:
        self.server.asked += self.command == "POST"  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"code": self.server.status, "message": f"no, {self.headers['X-API-KEY']}"}).encode()  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_DELETE = do_POST

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def api(status: int) -> Iterator[tuple[E2BBackend, HTTPServer]]:
    with HTTPServer(("127.0.0.1", servers.free_port()), Answering) as server:
        server.status, server.asked = status, 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield E2BBackend("e2b", {"API_KEY": "e2b_5ec7e7", "API_URL": url, "SANDBOX_URL": url}), server
        server.shutdown()
        thread.join()


SPEC = SandboxSpec("sbx0test", "code-interpreter-v1", 60)
HANDLE = {
    "sandbox_id": "sbx0test",
    "e2b_id": "i0",
    "domain": None,
    "envd_version": "0.5.7",
    "token": "",
}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429, 500, 502, 503, 504])
async def test_a_refused_create_means_that_nothing_is_there_and_is_asked_once(status):
    with api(status) as (backend, server):
        with pytest.raises(BackendUnavailable) as refused:
            await backend.create(SPEC)

    assert server.asked == 1
    assert isinstance(refused.value, SandboxRefused) == (status in (400, 404))
    assert bool(refused.value.facts.get("perhaps")) == (status in (409, 422, 500, 502, 504))
    assert str(status) in refused.value.detail
    assert "5ec7e7" not in refused.value.detail
    assert refused.value.__cause__ is None


async def test_nobody_there_means_that_nothing_is_there():
    backend = E2BBackend("e2b", {"API_KEY": "e2b_5ec7e7", "API_URL": f"http://127.0.0.1:{servers.free_port()}"})
    with pytest.raises(BackendUnavailable):
        await backend.create(SPEC)
    check = await backend.check()

    assert not check.ok
    assert "refused" in check.detail


async def test_no_key_is_said_before_anything_is_asked():
    with api(201) as (backend, server):
        with pytest.raises(BackendUnavailable, match="API_KEY"):
            await E2BBackend("e2b", {**backend.options, "API_KEY": ""}).create(SPEC)

    assert server.asked == 0


async def test_what_is_gone_is_killed_and_what_is_not_known_is_not():
    with api(404) as (gone, _):
        assert await gone.kill(HANDLE) is True
    with api(500) as (broken, _):
        with pytest.raises(BackendError) as refused:
            await broken.kill(HANDLE)

    assert "5ec7e7" not in refused.value.detail


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, ContextUnknown), (400, Unsupported), (422, Unsupported), (502, BackendError), (500, BackendError)],
)
async def test_a_refused_cell_says_why(status, error):
    with api(status) as (backend, _):
        with pytest.raises(error):
            async for _ in backend.run_code(HANDLE, "1"):
                pass


def test_what_the_edge_had_nobody_to_forward_to_was_surely_not_run():
    never, perhaps = refusal(503, "no healthy upstream"), refusal(503, "upstream connect error or disconnect")

    assert isinstance(never, BackendUnavailable)
    assert never.facts["nothing_sent"]
    assert type(perhaps) is BackendError


async def test_nothing_is_taken_from_the_environment(product, monkeypatch):
    for name in ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_DOMAIN"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("E2B_API_KEY", "e2b_wrong")
    monkeypatch.setenv("E2B_DEBUG", "true")
    backend = on_gateway(product)
    handle = await backend.create(SandboxSpec("sbx0env", "code-interpreter-v1", 60))
    events = [event.kind async for event in backend.run_code(handle, "1")]
    await backend.kill(handle)

    assert events == ["count", "result"]
    assert not [value for value in map(str, handle.values()) if product.key in value]


def test_an_alias_without_addresses_is_e2bs_cloud(monkeypatch):
    monkeypatch.setenv("E2B_API_URL", "http://elsewhere.example.org")
    cloud, own = (
        E2BBackend("a", {"API_KEY": "k", "API_URL": ""}),
        E2BBackend("b", {"API_KEY": "k", "DOMAIN": "own.example.org"}),
    )

    assert cloud.account.settings["api_url"] == "https://api.e2b.app"
    assert own.account.settings["api_url"] == "https://api.own.example.org"


@pytest.mark.parametrize(
    ("ours", "mapped", "theirs"), [("default", "", "code-interpreter-v1"), ("default", "t0", "t0"), ("ml", "", "ml")]
)
def test_templates_have_e2bs_names(ours, mapped, theirs):
    assert E2BBackend("e2b", {}).template_name(ours, mapped) == theirs


async def alive() -> None:
    """The sandbox is there."""


def test_what_e2b_charges_for_is_its_templates_size():
    plain, own = E2BBackend("a", {}), E2BBackend("b", {"SIZES": {"mine": [8, 8192]}})

    assert plain.billed_size("code-interpreter-v1", 1, 1024) == (2, 512)
    assert plain.billed_size("mine", 4, 4096) == (4, 4096)
    assert own.billed_size("mine", 4, 4096) == (8, 8192)


class Said:
    """A response whose body is these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    async def aiter_bytes(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


async def test_lines_are_put_together_from_pieces():
    said = lines(Said(b'{"a"', b': 1}\n{"b": ', b'"\xc3', b'\xa9"}\n'), time.monotonic() + 5, alive)

    assert [line async for line in said] == [{"a": 1}, {"b": "é"}]


@pytest.mark.parametrize("piece", [b"nonsense\n", b"x" * (33 << 20)], ids=["no_json", "endless"])
async def test_a_stream_that_is_none_is_a_lost_sandbox(piece):
    with pytest.raises(SandboxLost):
        [line async for line in lines(Said(piece, piece, piece), time.monotonic() + 60, alive)]

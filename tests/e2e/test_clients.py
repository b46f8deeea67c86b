"""Programs of agents' developers against the real server: the client that people copy, and connections that break."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.bench import retries
from tests.product import HOME, Product


@pytest.fixture(scope="module")
def sandgate() -> Any:
    """docs/examples/sandgate_client.py, as whoever copies it imports it."""
    path = HOME / "docs" / "examples" / "sandgate_client.py"
    spec = importlib.util.spec_from_file_location("sandgate_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(product: Product, sandgate: Any) -> Iterator[Any]:
    with sandgate.Client(product.url, product.key) as made:
        yield made


def test_the_client_runs_keeps_a_session_and_streams(client, sandgate):
    assert client.run("print(open('a.txt').read())", files={"a.txt": b"hi"})["logs"]["stdout"] == "hi\n"
    with client.session() as session:
        session.run("x = 20")
        session.write("n.txt", b"22")
        assert session.run("x + int(open('n.txt').read())")["results"][0]["text/plain"] == "42"
        assert session.read("n.txt") == b"22"
    with pytest.raises(sandgate.SandgateError) as gone:
        session.run("x")
    assert (gone.value.status, gone.value.code) == (410, "session_gone")
    said = list(client.stream("for n in range(3): print(n)"))
    assert "".join(e["data"]["data"]["text"] for e in said if e["event"] == "stdout") == "0\n1\n2\n"
    assert (said[-1]["event"], said[-1]["data"]["state"]) == ("end", "succeeded")


async def test_the_client_does_the_same_with_await(product: Product, sandgate):
    async with sandgate.AsyncClient(product.url, product.key) as client:
        async with client.session() as session:
            await asyncio.gather(*(session.write(f"{n}.txt", b"x" * n) for n in range(3)))
            answer = await session.run("import os; sum(os.path.getsize(f'{n}.txt') for n in range(3))")
        said = [event async for event in client.stream("print('hi')")]

    assert answer["results"][0]["text/plain"] == "3"
    assert [event["event"] for event in said] == ["stdout", "end"]


class Unreliable(httpx.BaseTransport):
    """Stands before the real server: it breaks off once the server has the request, then is busy, then lets through."""

    def __init__(self) -> None:
        self.real, self.sent = httpx.HTTPTransport(), list[str]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request.headers["Idempotency-Key"])
        if len(self.sent) == 1:
            self.real.handle_request(request).close()
            raise httpx.ReadError("broken off", request=request)
        if len(self.sent) == 2:
            return httpx.Response(429, headers={"Retry-After": "0"}, json={"code": "quota_exceeded"})
        return self.real.handle_request(request)

    def close(self) -> None:
        self.real.close()


def test_the_client_tries_again_when_told_to_and_under_the_same_idempotency_key(product: Product, client):
    where, transport = client.http.base_url, Unreliable()
    client.http.close()
    client.http = httpx.Client(base_url=where, headers=client.http.headers, transport=transport, timeout=60)
    body = client.run("1", workflow="tried again")
    with product.http() as http:
        found = http.get("/api/v1/executions", params={"workflow": "tried again"}).json()["results"]

    assert (len(transport.sent), len(set(transport.sent))) == (3, 1)
    assert [one["id"] for one in found] == [body["id"]]


async def test_nothing_runs_twice_when_connections_are_cut_and_tried_again(product: Product):
    port = int(product.url.rsplit(":", 1)[1])
    tally = await retries.storm(port, product.key, 24, {"code": "1"}, run="slice")

    assert tally.wrong == []
    assert sum(tally.cuts.values()) > 24
    assert retries.stored(product.data / "sandgate.sqlite3", "slice") == (24, 24, 24)


def test_without_an_e2b_key_an_unauthenticated_call_is_401_and_an_authenticated_one_runs_locally_with_a_costed_record(
    product: Product,
):
    refused = httpx.post(f"{product.url}/api/v1/executions", json={"code": "6 * 7"}, trust_env=False)
    with product.http() as http:
        answer = http.post("/api/v1/executions", json={"code": "6 * 7"})
        record = http.get(f"/api/v1/executions/{answer.json()['id']}").json()

    assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")
    assert (answer.status_code, record["backend"], record["results"]) == (201, "local", [{"text/plain": "42"}])
    assert record["cost_nano_usd"] > 0
    assert record["usage"]["cpu_seconds"] > 0


def test_files_go_in_parts_and_as_archives_and_come_back_in_ranges(product: Product):
    with product.http() as http:
        session = http.post("/api/v1/sessions", json={}).json()["id"]
        files = f"/api/v1/sessions/{session}/files"
        first = http.put(files, params={"path": "big", "offset": 0}, content=b"0123456789")
        http.put(files, params={"path": "big", "offset": 10}, content=b"abc")
        twice = http.put(files, params={"path": "big", "offset": 10}, content=b"abc")
        http.put(files, params={"path": "in/a.txt"}, content=b"a")
        http.post(files, params={"path": "big"}, json={"move_to": "in/big"})
        tar = http.get(files, params={"path": "in", "archive": "tar"}).content
        unpacked = http.put(files, params={"path": "out", "archive": "tar"}, content=tar)
        broken = http.put(files, params={"path": "out", "archive": "tar"}, content=b"nonsense")
        part = http.get(files, params={"path": "out/big"}, headers={"Range": "bytes=8-11"})
        size = http.head(files, params={"path": "out/big"})
        ran = http.post(f"/api/v1/sessions/{session}/commands", json={"command": "cat out/a.txt out/big; exit 3"})
        http.delete(f"/api/v1/sessions/{session}")

    assert (first.json(), first.status_code) == ({"path": "big", "size_bytes": 10}, 200)
    assert (twice.status_code, twice.json()["size_bytes"]) == (409, 13)
    assert unpacked.status_code == 201
    assert (broken.status_code, broken.json()["code"]) == (400, "file_refused")
    assert (part.status_code, part.content, size.headers["Content-Length"]) == (206, b"89ab", "13")
    assert (ran.json()["logs"]["stdout"], ran.json()["exit_code"]) == ("a0123456789abc", 3)


def test_a_large_upload_passes_through_with_flat_memory(product: Product):
    """The server holds no more of it than a few pieces, and writes none of it to its own disk."""
    size = 200 << 20
    before = resident(product.process.pid)

    def pieces() -> Iterator[bytes]:
        for _ in range(size >> 20):
            yield bytes(1 << 20)
            seen.append(resident(product.process.pid))

    seen: list[int] = []
    with product.http() as http:
        session = http.post("/api/v1/sessions", json={}).json()["id"]
        where = f"/api/v1/sessions/{session}/files"
        sent = http.put(where, params={"path": "/tmp/big"}, content=pieces())
        found = http.head(where, params={"path": "/tmp/big"})
        http.delete(f"/api/v1/sessions/{session}")

    assert (sent.status_code, found.headers["Content-Length"]) == (201, str(size))
    assert max(seen) - before < 64 << 20


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096

"""The proxy believes nothing that a sandbox sends, and holds nothing back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from executions.gateway import relay


class Exchange:
    """One request through the relay, with the sandbox's side played by a test."""

    def __init__(self, *body: bytes, method: str = "POST", headers: dict[str, str] | None = None) -> None:
        pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope = {"method": method, "headers": pairs}
        self.messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
        self.messages.append({"type": "http.request", "body": b"", "more_body": False})
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.started = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.started.set()

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[tuple[asyncio.Task, asyncio.StreamReader, asyncio.StreamWriter]]:
        """The relay at work, and the sandbox's side of it."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours, limit=64 * 1024)
        sandbox_reader, sandbox_writer = await asyncio.open_connection(sock=theirs)
        work = relay.relay(self.scope, b"/x?y=%20", self.receive, self.send, reader, writer)
        yield asyncio.create_task(work), sandbox_reader, sandbox_writer
        for end in (writer, sandbox_writer):
            end.close()
            with suppress(ConnectionError):  # the other end hung up first
                await end.wait_closed()

    async def answered(self, said: bytes) -> None:
        """Let the sandbox say this and hang up."""
        async with self.going_on() as (task, reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(said)
            writer.close()
            await asyncio.wait({task})
        task.result()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def whole(self) -> bool:
        return self.sent[-1]["type"] == "http.response.body" and not self.sent[-1].get("more_body", False)


async def test_the_request_is_passed_on_without_what_is_not_the_sandboxs():
    headers = {"X-API-KEY": "secret", "Cookie": "sessionid=1", "Host": "us", "Connection": "keep-alive", "X-Mine": "1"}
    exchange = Exchange(b"abc", headers={**headers, "Content-Length": "3"})
    async with exchange.going_on() as (task, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.readexactly(3)
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await task

    assert head.startswith("POST /x?y=%20 HTTP/1.1\r\nhost: sandbox\r\nconnection: close\r\n")
    assert "x-mine: 1" in head
    assert not [word for word in ("secret", "sessionid", "keep-alive") if word in head]
    assert body == b"abc"
    assert (exchange.status, exchange.body, exchange.whole) == (204, b"", True)


async def test_a_chunked_request_is_passed_on_as_it_comes():
    exchange = Exchange(b"hello", b" you", headers={"Transfer-Encoding": "chunked"})
    async with exchange.going_on() as (task, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await task

    assert body == b"5\r\nhello\r\n4\r\n you\r\n0\r\n\r\n"
    assert exchange.body == b"ok"


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    ],
    ids=["length", "chunked", "until_closed", "after_100"],
)
async def test_every_form_of_answer_arrives(said):
    exchange = Exchange()
    await exchange.answered(said)

    assert (exchange.status, exchange.body, exchange.whole) == (200, b"hello", True)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n" + b"1" * 100_000,
    ],
    ids=["short", "no_last_chunk", "negative", "no_number", "endless_number"],
)
async def test_an_answer_that_breaks_off_is_never_ended_as_if_it_were_whole(said):
    exchange = Exchange()
    with pytest.raises(relay.BrokenOff) as broken:
        await exchange.answered(said)

    assert broken.value.begun
    assert exchange.body == b"hello"
    assert not exchange.whole


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 many OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
    ],
    ids=["nothing", "half", "nonsense", "no_number", "endless"],
)
async def test_an_answer_that_is_none_sends_nothing_to_the_client(said):
    exchange = Exchange()
    with pytest.raises(relay.BrokenOff) as broken:
        await exchange.answered(said)

    assert not broken.value.begun
    assert exchange.sent == []


async def test_a_sandbox_sets_no_cookies_here():
    exchange = Exchange()
    await exchange.answered(b"HTTP/1.1 200 OK\r\nset-cookie: sessionid=evil\r\ncontent-length: 0\r\n\r\n")

    assert exchange.sent[0]["headers"] == [(b"content-length", b"0")]


async def test_a_client_that_leaves_closes_the_sandboxs_side():
    exchange = Exchange()
    async with exchange.going_on() as (task, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello")
        await exchange.started.wait()
        exchange.left.set()
        await task
        await reader.read()  # ends with the connection

    assert not exchange.whole


async def test_a_request_that_is_refused_halfway_gets_its_answer():
    exchange = Exchange(*[b"x" * 65536] * 64, headers={"Content-Length": str(64 * 65536)})
    async with exchange.going_on() as (task, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 507 Full\r\ncontent-length: 0\r\n\r\n")
        await task

    assert exchange.status == 507

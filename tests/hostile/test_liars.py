"""An agent that was taken over: whatever it sends, the product's own process stays whole and calls the sandbox lost."""

from __future__ import annotations

import asyncio
import json
import resource
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from executions.attacks import Arena
from executions.errors import BackendError, RunTimedOut, SandboxLost

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
DEEP = b'{"type": "result", "json": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def line(**fields) -> bytes:
    return chunk(json.dumps(fields).encode() + b"\n")


@asynccontextmanager
async def liar(arena: Arena, folder, answer: bytes, *, again: bytes = b"") -> AsyncIterator[dict]:
    """A handle whose sockets are served by somebody who says `answer`, then `again` for ever."""
    handle = await arena.create()

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            while again:
                writer.write(again)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    servers = [await asyncio.start_unix_server(lie, folder / f"{port}.sock") for port in (49983, 49999)]
    try:
        yield {**handle, "dir": str(folder)}
    finally:
        for server in servers:
            server.close()
        await arena.kill(handle)


LIES = {
    "nothing": b"",
    "no_http": b"\x00" * 100 + b"\r\n\r\n",
    "endless_head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000,
    "no_status": b"HTTP/1.1\r\n\r\n",
    "negative_chunk": HEAD + b"-5\r\n" + b"x" * 1000,
    "no_number": HEAD + b"zz\r\n",
    "huge_number": HEAD + b"f" * 300_000 + b"\r\n",
    "half_a_chunk": HEAD + b"ffff\r\n{",
    "no_json": HEAD + chunk(b"hello\n"),
    "no_text": HEAD + chunk(b"\xff\xfe\n"),
    "too_deep": HEAD + chunk(DEEP),
    "no_end": HEAD + line(type="stdout", text="x") + b"0\r\n\r\n",
    "negative_length": b"HTTP/1.1 200 OK\r\ncontent-length: -7\r\n\r\n",
    "short_length": b"HTTP/1.1 200 OK\r\ncontent-length: 70\r\n\r\nx",
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_about_a_run_is_a_lost_sandbox(arena, tmp_path, lie):
    async with liar(arena, tmp_path, LIES[lie]) as handle:
        with pytest.raises(SandboxLost):
            async for _ in arena.backend.run_code(handle, "1", timeout_seconds=5):
                pass


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_about_files_and_commands_is_an_error_of_the_backend(arena, tmp_path, lie):
    async with liar(arena, tmp_path, LIES[lie]) as handle:
        for work in (arena.backend.list_files(handle, "/"), arena.backend.list_contexts(handle)):
            with pytest.raises(BackendError):
                await work
        with pytest.raises(BackendError):
            async for _ in arena.backend.run_command(handle, "true", timeout_seconds=5):
                pass


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "stdout"}, {"type": "stdout", "text": 5}, {"type": ["end"]}, {"type": None}, {}, {"type": "error"}, {"type": "error", "name": {}},
        {"type": "result", "text": {"a": 1}, "extra": 7}, {"type": "number_of_executions"}, {"type": "number_of_executions", "execution_count": "x"},
        {"type": "usage", "cpu_us": 0}, {"type": "exit", "exit_code": 0}, {"type": "result", "extra": {"": None}}, {"type": "keepalive"},
    ],
    ids=repr,
)  # fmt: skip
async def test_what_is_malformed_is_left_out_or_read_as_text(arena, tmp_path, fields):
    answer = HEAD + line(**fields) + line(type="end_of_execution") + b"0\r\n\r\n"
    async with liar(arena, tmp_path, answer) as handle:
        events = [event async for event in arena.backend.run_code(handle, "1", timeout_seconds=5)]

    for event in events:
        assert event.kind in ("stdout", "stderr", "result", "error", "count", "usage")
        assert event.kind != "usage" or event.data["cpu_us"] >= 0
        assert all(isinstance(text, str) for text in event.data.values()) or event.kind in ("result", "count", "usage")


@pytest.mark.parametrize(
    "again", [chunk(b'{"type": "keepalive"}\n'), chunk(b"x" * 65536)], ids=["keepalives", "endless_line"]
)
async def test_what_never_ends_is_ended(arena, tmp_path, again):
    async with liar(arena, tmp_path, HEAD, again=again) as handle:
        with pytest.raises((RunTimedOut, SandboxLost)):
            async for _ in arena.backend.run_code(handle, "1", timeout_seconds=1):
                pass

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 < 600


@pytest.mark.parametrize(
    "envelope",
    [struct.pack(">BI", 0, 0xFFFFFFFF) + b"x" * 1000, struct.pack(">BI", 0, 3) + b"[1]", struct.pack(">BI", 0, 2) + b"\xff{",
     struct.pack(">BI", 0, 27) + b'{"event": {"data": "text"}}', struct.pack(">BI", 0, 16) + b'{"error": "text"}'[:16]],
    ids=["endless", "no_object", "no_json", "no_shape", "half"],
)  # fmt: skip
async def test_a_lie_about_a_command_is_an_error_of_the_backend(arena, tmp_path, envelope):
    async with liar(arena, tmp_path, HEAD + chunk(envelope) + b"0\r\n\r\n") as handle:
        with pytest.raises(BackendError):
            async for _ in arena.backend.run_command(handle, "true", timeout_seconds=5):
                pass

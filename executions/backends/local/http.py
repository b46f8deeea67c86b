"""HTTP/1.1 to a sandbox over its unix socket: one connection a request, bodies streamed both ways."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from executions.errors import SandboxLost

HEAD_LIMIT = 256 * 1024
PIECE = 256 * 1024
WHOLE_LIMIT = 64 << 20  # of a body that is read whole, in bytes
PATH_LIMIT = 100  # of a socket's address, in bytes; longer folders are reached through a descriptor
CONNECT_SECONDS = 5


async def open_socket(folder: str, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams to the unix socket `name` in `folder`. OSError where nobody listens."""
    return await asyncio.open_unix_connection(sock=await connected(folder, name), limit=HEAD_LIMIT)


async def connected(folder: str, name: str) -> socket.socket:
    """A connection to the unix socket `name` in `folder`, however long its path. OSError where nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    descriptor = -1
    try:
        path = os.path.join(folder, name)
        if len(path.encode()) > PATH_LIMIT:
            descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            path = f"/proc/self/fd/{descriptor}/{name}"
        async with asyncio.timeout(CONNECT_SECONDS):
            while True:
                try:
                    sock.connect(path)  # a unix socket connects at once or not at all
                    break
                except BlockingIOError:  # its backlog is full
                    await asyncio.sleep(0.005)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def understood() -> Iterator[None]:
    """What has not the agent's shape comes from one that is not itself any more: SandboxLost."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        raise SandboxLost("The sandbox sent what cannot be understood.") from problem


class Answer:
    """The head of an answer, and its body as a stream."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers, self._reader = status, headers, reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body. SandboxLost when it breaks off."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", ""):
                while size := int((await self._reader.readline()).split(b";")[0] or b"x", 16):
                    while size > 0:
                        piece = await self._reader.read(min(size, PIECE))
                        if not piece:
                            raise ConnectionError
                        size -= len(piece)
                        yield piece
                    if size:
                        raise ValueError("a chunk of negative size")
                    await self._reader.readexactly(2)
                return
            left = int(self.headers.get("content-length", 0))
            while left > 0:
                piece = await self._reader.read(min(left, PIECE))
                if not piece:
                    raise ConnectionError
                left -= len(piece)
                yield piece
        except (ConnectionError, asyncio.IncompleteReadError, ValueError) as problem:
            raise SandboxLost() from problem

    async def whole(self) -> bytes:
        """The body in one piece. SandboxLost where it breaks off or does not end."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > WHOLE_LIMIT:
                raise SandboxLost("The sandbox sent an endless answer.")
        return bytes(body)

    async def json(self) -> Any:
        """The body as JSON. SandboxLost where it is not: then the agent is not itself any more."""
        try:
            return json.loads(await self.whole() or b"null")
        except (ValueError, RecursionError) as problem:
            raise SandboxLost() from problem


@asynccontextmanager
async def request(
    folder: str,
    port: int,
    method: str,
    path: str,
    *,
    headers: dict[str, str] | None = None,
    body: bytes | AsyncIterator[bytes] = b"",
) -> AsyncIterator[Answer]:
    """Send one request and yield its answer; leaving the block closes the connection. SandboxLost where there is none."""
    try:
        reader, writer = await open_socket(folder, f"{port}.sock")
    except (OSError, TimeoutError) as problem:
        raise SandboxLost() from problem
    try:
        fields = {"host": "sandbox", "connection": "close", **(headers or {})}
        fields["content-length" if isinstance(body, bytes) else "transfer-encoding"] = (
            str(len(body)) if isinstance(body, bytes) else "chunked"
        )
        head = (
            f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        )
        try:
            if isinstance(body, bytes):
                writer.write(head.encode("latin-1") + body)
            else:
                writer.write(head.encode("latin-1"))
                await _send_pieces(reader, writer, body)
            with understood():
                answer = await _head(reader)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as problem:
            raise SandboxLost() from problem
        yield answer
    finally:
        writer.close()


async def _send_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: AsyncIterator[bytes]) -> None:
    """Send a chunked body; when the sandbox answers early (disk full) the rest is not sent."""
    async for piece in body:
        if piece:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            try:
                await writer.drain()
            except ConnectionError:
                return  # its answer may be waiting
    writer.write(b"0\r\n\r\n")


async def _head(reader: asyncio.StreamReader) -> Answer:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ", 2)[1])
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
    }
    return Answer(status, headers, reader)
